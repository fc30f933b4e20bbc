import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from llmtrain.parallel.upstream import accelerator

ZERO_IMPORTS = """
import sys
from llmtrain.parallel.upstream import import_deepspeed

import_deepspeed()
from deepspeed.runtime import compiler
from deepspeed.runtime.zero.muon import muon_optimizer, original_muon

assert callable(original_muon.zeropower_via_newtonschulz5)
print("torch._inductor" in sys.modules, compiler.compile.__name__)
"""


@pytest.mark.parametrize(("backend", "expected"), [("gloo", "cpu"), ("nccl", "cuda"), (None, "cuda")])
def test_deepspeed_goes_where_the_run_is(
    backend: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a host with GPUs, which torch sees: device=cpu has a group of gloo."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dist, "is_initialized", lambda: backend is not None)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    assert accelerator() == expected


def test_deepspeed_starts_without_inductor() -> None:
    """A ZeRO engine imports Muon, whose functions would be decorated by torch.compile."""
    done = subprocess.run([sys.executable, "-c", ZERO_IMPORTS], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False compile"
