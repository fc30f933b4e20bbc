import pytest
import torch
import torch.distributed as dist

from llmtrain.parallel.upstream import accelerator


@pytest.mark.parametrize(("backend", "expected"), [("gloo", "cpu"), ("nccl", "cuda"), (None, "cuda")])
def test_deepspeed_goes_where_the_run_is(
    backend: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a host with GPUs, which torch sees: device=cpu has a group of gloo."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dist, "is_initialized", lambda: backend is not None)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    assert accelerator() == expected
