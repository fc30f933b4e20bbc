"""Offload and ZeRO++ that cannot run, each refused before torch is there, with the key, the reason and what
would do instead; and what DeepSpeed is told of those that can."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.distributed import toolchain
from llmtrain.errors import UserError
from llmtrain.parallel.config import BatchConfig, ParallelConfig
from llmtrain.parallel.layout import Layout
from llmtrain.parallel.planning import plan_layout
from llmtrain.train.resolve import resolve
from tests.support.training import compose

BATCH = ("batch.global_size=8", "batch.micro_size=2", "batch.sequence_length=32")
ON_GPUS = ("cluster=h100_80g", "parallel.zero=3")

CASES = [
    # (overrides, processes, key, reason, remedy)
    (("parallel.offload_optimizer=cpu",), 2, "parallel.offload_optimizer:", "without ZeRO", "zero=1"),
    (
        ("parallel.offload_optimizer=cpu", "engine=local"),
        1,
        "parallel.offload_optimizer:",
        "without ZeRO",
        "zero=1",
    ),
    (
        ("parallel.offload_optimizer=cpu", "parallel.zero=1", "engine=local"),
        1,
        "parallel.zero:",
        "keeps whole copies",
        "engine=deepspeed",
    ),
    (
        ("parallel.offload_optimizer=cpu", "parallel.zero=1", "parallel.pipeline=2"),
        2,
        "parallel.offload_optimizer:",
        "none with pipeline parallelism",
        "parallel.pipeline=1",
    ),
    *[
        ((f"parallel.{key}=nvme", "parallel.zero=3"), 2, f"parallel.{key}:", "cannot read", f"{key}=cpu")
        for key in ("offload_optimizer", "offload_parameters")
    ],
    (
        ("parallel.offload_parameters=cpu", "parallel.zero=2"),
        2,
        "parallel.offload_parameters:",
        "below ZeRO 3",
        "zero=3",
    ),
    (
        ("optimizer.implementation=deepspeed", "parallel.zero=1"),
        2,
        "optimizer.implementation:",
        "updates weights in host memory",
        "parallel.offload_optimizer=cpu",
    ),
    (("parallel.quantized_weights=true", "parallel.zero=3"), 2, "quantized_weights:", "on a cpu", "=false"),
    (
        ("parallel.quantized_gradients=true", "parallel.zero=3"),
        2,
        "quantized_gradients:",
        "on a cpu",
        "=false",
    ),
    (
        ("cluster=h100_80g", "parallel.quantized_weights=true", "parallel.zero=2"),
        2,
        "parallel.quantized_weights:",
        "only ZeRO 3 gathers",
        "zero=3",
    ),
    (
        (*ON_GPUS, "parallel.quantized_gradients=true", "precision=bf16"),
        2,
        "parallel.quantized_gradients:",
        "reads the gradients as fp16",
        "precision=fp16",
    ),
    (
        (*ON_GPUS, "parallel.quantized_gradients=true", "precision=fp16", "parallel.tensor=2"),
        2,
        "parallel.quantized_gradients:",
        "as if each were a data-parallel replica",
        "parallel.tensor=1",
    ),
    (
        ("parallel.hierarchical_partition=0",),
        2,
        "parallel.hierarchical_partition:",
        "1 or more",
        "1 turns it off",
    ),
    (
        ("parallel.hierarchical_partition=2", "parallel.zero=2"),
        2,
        "parallel.hierarchical_partition:",
        "below ZeRO 3",
        "zero=3",
    ),
    (
        ("parallel.hierarchical_partition=3", "parallel.zero=3"),
        4,
        "parallel.hierarchical_partition:",
        "a divisor of the 4 replicas",
        "nearest: 2, 4",
    ),
    (
        ("parallel.hierarchical_partition=2", "parallel.zero=3", "parallel.tensor=2"),
        4,
        "parallel.hierarchical_partition:",
        "assumes that neighbouring processes are",
        "parallel.tensor=1",
    ),
]


@pytest.mark.parametrize(("overrides", "processes", "key", "reason", "remedy"), CASES)
def test_refused_with_the_reason_and_what_would_do(
    overrides: tuple[str, ...], processes: int, key: str, reason: str, remedy: str
) -> None:
    with pytest.raises(UserError) as caught:
        resolve(compose([*BATCH, *overrides]), processes, data_optional=True)
    told = [str(problem) for problem in caught.value.problems if key in f"{problem.where}:"]
    assert [text for text in told if reason in text and remedy in text], told


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("optimizer=sgd", "+optimizer.implementation=deepspeed"), "DeepSpeed's kernel implements Adam only"),
        (("optimizer.implementation=deepspeed", "optimizer.fused=true"), "fused selects a kernel of torch"),
    ],
)
def test_what_the_kernel_lacks_is_refused(overrides: tuple[str, ...], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        resolve(compose([*BATCH, *overrides]), 1, data_optional=True)


def layout_of(parallel: ParallelConfig, world_size: int = 4, **settings: object) -> Layout:
    arguments = {"engine": "deepspeed", "precision": "bf16", "device": "cpu"} | settings
    return plan_layout(parallel, BatchConfig(8, 2, 16), world_size=world_size, **arguments)  # type: ignore[arg-type]


def test_without_a_compiler_the_kernel_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    offload = ParallelConfig(zero=2, offload_optimizer="cpu")
    layout_of(offload, implementation="deepspeed")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(
        UserError, match=r"no compiler c\+\+.*install g\+\+, or give optimizer.implementation"
    ):
        layout_of(offload, implementation="deepspeed")
    layout_of(offload, implementation="torch")
    layout_of(offload, implementation="deepspeed", on_this_machine=False)


def test_what_compiling_needs_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("c++", "ninja"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert toolchain.compiler_flaw() is None
    monkeypatch.setenv("CXX", "clang++-99")
    assert "clang++-99" in toolchain.compiler_flaw().what  # type: ignore[union-attr]
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(toolchain, "executables", lambda: str(tmp_path))
    (tmp_path / "ninja").unlink()
    assert "ninja" in toolchain.compiler_flaw().what  # type: ignore[union-attr]


def test_quantization_needs_a_cuda_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("c++", "ninja"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setattr(toolchain, "executables", lambda: str(tmp_path))
    monkeypatch.setattr(toolchain, "USUAL_CUDA_HOME", "/nowhere")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    quantized = ParallelConfig(zero=3, quantized_weights=True)
    with pytest.raises(UserError, match=r"no nvcc.*install the CUDA toolkit"):
        layout_of(quantized, device="cuda")
    assert layout_of(quantized, device="cuda", on_this_machine=False).quantized_weights
    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    (tmp_path / "cuda" / "bin" / "nvcc").touch(mode=0o755)
    assert layout_of(quantized, device="cuda").quantized_weights


def test_what_is_asked_for_reaches_deepspeed() -> None:
    """Names that DeepSpeed's own configuration knows, and values that it takes."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from llmtrain.engine.deepspeed import deepspeed_config
    from llmtrain.optim.config import OptimizerConfig

    parallel = ParallelConfig(
        zero=3,
        offload_optimizer="cpu",
        offload_parameters="cpu",
        quantized_weights=True,
        quantized_gradients=True,
        hierarchical_partition=2,
    )
    layout = layout_of(parallel, device="cuda", precision="fp16", on_this_machine=False)
    config = deepspeed_config(layout, "fp16", OptimizerConfig(), 1000, "cuda")
    zero = DeepSpeedZeroConfig(**config["zero_optimization"])
    assert zero.offload_optimizer.device == zero.offload_param.device == "cpu"
    assert zero.offload_optimizer.pin_memory
    assert zero.offload_param.pin_memory
    assert zero.zero_quantized_weights
    assert zero.zero_quantized_gradients
    assert zero.zero_hpz_partition_size == 2
    plain = deepspeed_config(layout_of(ParallelConfig(zero=3)), "bf16", OptimizerConfig(), 1000, "cpu")
    zero = DeepSpeedZeroConfig(**plain["zero_optimization"])
    assert zero.offload_optimizer is None
    assert zero.offload_param is None
    assert not zero.zero_quantized_weights
    assert zero.zero_hpz_partition_size == 1


def test_answers_without_torch() -> None:
    code = (
        "import sys; from llmtrain.parallel.config import *; from llmtrain.parallel.planning import *; "
        "plan_layout(ParallelConfig(zero=1, offload_optimizer='cpu'), BatchConfig(8, 2, 16), world_size=1, "
        "engine='deepspeed', precision='fp32', device='cpu', implementation='deepspeed'); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_locks_that_killed_compilations_left_are_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(toolchain.time, "sleep", lambda _: None)
    for name in ("left", "held"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
    (tmp_path / "done").mkdir()
    hold = "import sys; held = open(sys.argv[1]); print(flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "held/lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        toolchain.drop_stale_locks(tmp_path)
        assert not (tmp_path / "left/lock").exists()
        assert (tmp_path / "held/lock").exists()
    finally:
        holder.kill()
        holder.communicate()
    toolchain.drop_stale_locks(tmp_path)
    assert not (tmp_path / "held/lock").exists()
    said = capsys.readouterr().err.splitlines()
    removed = [tmp_path / name / "lock" for name in ("left", "held")]
    assert said == [f"removing {lock}, which a killed process left behind" for lock in removed]
