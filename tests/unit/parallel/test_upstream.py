import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import llmtrain
from llmtrain.errors import TrainingError
from llmtrain.parallel import undocumented, upstream
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


def test_deepspeed_has_what_its_manual_does_not_name() -> None:
    upstream.import_deepspeed()
    assert upstream.missing() == [], f"look through parallel/upstream.py, written from {upstream.VERSION}"


def test_what_deepspeed_has_no_more_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    zero_3 = "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3"
    table = {zero_3: ("grad_position", "grad_positions_of_old"), "deepspeed.gone.Class": ("name",)}
    monkeypatch.setattr(upstream, "UNDOCUMENTED", table)
    assert upstream.missing() == [f"{zero_3}.grad_positions_of_old", "deepspeed.gone.Class.name"]
    upstream._refuse_unknown(upstream.VERSION)
    with pytest.raises(TrainingError, match=r"got release 0\.19\.9, which has no .*pip install deepspeed=="):
        upstream._refuse_unknown("0.19.9")


def test_no_other_file_names_it() -> None:
    plain = {"optimizer", "partition", "micro_batches", "num_stages", "stage_id"}
    names = {name for names in upstream.UNDOCUMENTED.values() for name in names} - plain
    package = Path(llmtrain.__file__).parent
    named = {
        f"{path.relative_to(package)}: {name}"
        for path in package.rglob("*.py")
        if path not in (Path(upstream.__file__), Path(undocumented.__file__))
        for name in names
        if re.search(rf"\b{name}\b", path.read_text())
    }
    assert not named


@pytest.mark.parametrize("sizes", [(1, 1, 2), (4, 2, 3), (2, 8, 1)])
def test_a_quick_grid_is_the_same(sizes: tuple[int, int, int]) -> None:
    upstream.import_deepspeed()
    from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology

    pipeline, tensor, data = sizes
    grid = PipelineParallelGrid.__new__(PipelineParallelGrid)
    grid._topo = PipeModelDataParallelTopology(num_pp=pipeline, num_mp=tensor, num_dp=data)
    grid.pipe_parallel_size, grid.world_size = pipeline, pipeline * tensor * data
    pairs = grid._build_p2p_groups()
    assert len(pairs) == grid.world_size
    with upstream.quick_grid():
        assert grid._build_p2p_groups() == pairs
