"""Offload, hierarchical partitions and DeepSpeed's CPU Adam compute what one plain process computes, and what
they save is taken up by any layout.

On a CPU's ranks nothing changes its place, but DeepSpeed's code is that of offload: gradients go to a
buffer of their own, norms are taken there, and the step runs over it. Tolerances are the matrix'.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.parity.matrix import TOLERANCES, Tolerance, deviation
from tests.parity.test_resume import assert_bitwise_resume
from tests.support import kernel, ranks
from tests.support.training import TINY_GPT, Trace, train

pytestmark = pytest.mark.slow

STEPS = 3
OPTIMIZER = "parallel.offload_optimizer=cpu"
PARAMETERS = "parallel.offload_parameters=cpu"
HIERARCHY = "parallel.hierarchical_partition=2"
ZERO_1, ZERO_2, ZERO_3 = (f"parallel.zero={stage}" for stage in (1, 2, 3))
KERNEL = "optimizer.implementation=deepspeed"


FP32 = TOLERANCES["fp32"]
DROPOUT = "model.dropout=0.1"
OTHER_OPTIMIZERS = {
    "adam": ("optimizer=adam", "optimizer.weight_decay=0.1"),
    **{
        name: (f"optimizer={name}", "optimizer.weight_decay=0", "optimizer.lr=1e-3")
        for name in ("sgd", "adagrad", "rmsprop")
    },
}


def settings(corpus: Path, *overrides: str) -> list[str]:
    return [*TINY_GPT, f"data.path={corpus}", "train.steps=20", "optimizer.lr=3e-3", "seed=7", *overrides]


@pytest.fixture(scope="module")
def references(corpus: Path) -> dict[str, Trace]:
    """By optimizer: what one plain process computes; all at once, since pools of ranks take turns."""
    cases = {"adamw": (DROPOUT,), **OTHER_OPTIMIZERS}
    return {name: train(1, settings(corpus, *overrides), STEPS)[0] for name, overrides in cases.items()}


@pytest.fixture(scope="module")
def built() -> None:
    """DeepSpeed's CPU Adam is compiled."""
    kernel.build()


def uses_kernel(test: Callable[..., None]) -> Callable[..., None]:
    compiles = pytest.mark.long("on a new machine DeepSpeed's kernel is compiled first")
    return pytest.mark.usefixtures("built")(compiles(test))


@pytest.mark.in_turns(2)
@pytest.mark.parametrize(
    "overrides",
    [
        (ZERO_1, OPTIMIZER),
        (ZERO_2, OPTIMIZER),
        (ZERO_3, OPTIMIZER),
        (ZERO_3, PARAMETERS),
        (ZERO_3, HIERARCHY),
    ],
)
def test_two_ranks_equal_one_plain_process(
    corpus: Path, references: dict[str, Trace], overrides: tuple[str, ...]
):
    for trace in train(2, settings(corpus, DROPOUT, *overrides), STEPS):
        assert deviation(trace, references["adamw"]).within(FP32)


@pytest.mark.in_turns(2)
@pytest.mark.parametrize("overrides", [(ZERO_1, OPTIMIZER), (ZERO_3, OPTIMIZER, PARAMETERS)])
def test_bf16_stays_near_fp32(corpus: Path, references: dict[str, Trace], overrides: tuple[str, ...]):
    low = settings(corpus, DROPOUT, "precision=bf16", *overrides)
    for trace in train(2, low, STEPS):
        assert deviation(trace, references["adamw"]).within(TOLERANCES["bf16"])


@pytest.mark.in_turns(3)
@uses_kernel
@pytest.mark.parametrize(("name", "zero"), [("adamw", ZERO_1), ("adamw", ZERO_3), ("adam", ZERO_2)])
def test_deepspeeds_kernel_steps_as_torch_does(
    corpus: Path, references: dict[str, Trace], zero: str, name: str
):
    optimizer = OTHER_OPTIMIZERS.get(name, (DROPOUT,))
    for trace in train(2, settings(corpus, *optimizer, zero, OPTIMIZER, KERNEL), STEPS):
        assert deviation(trace, references[name]).within(FP32)


@pytest.mark.in_turns(3)
@pytest.mark.parametrize("name", ["sgd", "adagrad", "rmsprop"])
@pytest.mark.parametrize("zero", [ZERO_2, ZERO_3])
def test_other_optimizers(corpus: Path, references: dict[str, Trace], zero: str, name: str):
    overrides = settings(corpus, *OTHER_OPTIMIZERS[name], zero, OPTIMIZER)
    for trace in train(2, overrides, STEPS):
        assert deviation(trace, references[name]).within(Tolerance(1e-5, 1e-3, 0.01))


@pytest.mark.in_turns(3)
@pytest.mark.parametrize(
    "overrides",
    [
        (ZERO_1, OPTIMIZER),
        (ZERO_2, OPTIMIZER),
        (ZERO_3, OPTIMIZER, PARAMETERS),
        (ZERO_3, HIERARCHY),
        (ZERO_1, OPTIMIZER, "precision=bf16"),
        (ZERO_3, OPTIMIZER, PARAMETERS, "precision=bf16"),
    ],
)
def test_resume_is_bit_exact(corpus: Path, tmp_path: Path, overrides: tuple[str, ...]):
    assert_bitwise_resume(2, settings(corpus, DROPOUT, *overrides), tmp_path)


@pytest.mark.in_turns(2)
@uses_kernel
@pytest.mark.parametrize("zero", [ZERO_1, ZERO_3])
def test_resume_is_bit_exact_in_deepspeeds_kernel(corpus: Path, tmp_path: Path, zero: str):
    assert_bitwise_resume(2, settings(corpus, zero, OPTIMIZER, KERNEL), tmp_path)


def steps_with_a_restart_before(restart: int | None) -> list[float]:
    """A parameter after 40 steps of DeepSpeed's kernel; before step `restart` a new optimizer takes over."""
    import torch

    from llmtrain.engine.cpu_adam import build_cpu_adam
    from llmtrain.optim.config import OptimizerConfig
    from llmtrain.optim.groups import Group

    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(100, generator=generator))

    def build() -> torch.optim.Optimizer:
        config = OptimizerConfig(implementation="deepspeed")
        return build_cpu_adam(config, [("w", parameter)], {"w": Group(False)})

    optimizer = build()
    for step in range(40):
        if step == restart:
            state = optimizer.state[parameter]
            state["step"] = torch.tensor(float(state["step"]))  # as a checkpoint gives it
            optimizer = build()
            optimizer.state[parameter] = state
        parameter.grad = torch.randn(100, generator=generator)
        optimizer.step()
    return parameter.tolist()


@uses_kernel
def test_deepspeeds_kernel_remembers_nothing_but_its_state():
    whole = ranks.run(2, steps_with_a_restart_before, None)[0]
    for restart in (1, 17, 30):
        assert ranks.run(2, steps_with_a_restart_before, restart)[0] == whole


@uses_kernel
def test_checkpoint_fits_other_layouts(corpus: Path, tmp_path: Path):
    """From offload to none and back, between kernels and stages: the same curve."""
    overrides = settings(corpus)
    runs = {
        "kernel": (2, (ZERO_1, OPTIMIZER, KERNEL)),
        "parameters": (2, (ZERO_3, OPTIMIZER, PARAMETERS)),
        "plain": (1, ()),
    }
    whole = {
        name: train(size, [*overrides, *layout], 4, save_to=tmp_path / name, save_at=2)[0]
        for name, (size, layout) in runs.items()
    }["plain"]
    for taken_up_by, (size, layout) in reversed(runs.items()):
        for name in runs.keys() - {taken_up_by}:  # its own: see the tests above
            saved = tmp_path / name / "step-00000002"
            trace = train(size, [*overrides, *layout], 4, None, saved)[0]
            message = f"{name} taken up by {taken_up_by}"
            np.testing.assert_allclose(trace.losses, whole.losses[2:], rtol=1e-5, err_msg=message)


@pytest.mark.in_turns(4)
@pytest.mark.parametrize(
    "overrides",
    [
        (ZERO_3, OPTIMIZER, PARAMETERS, HIERARCHY),
        (ZERO_2, OPTIMIZER, "parallel.tensor=2"),
        (ZERO_3, OPTIMIZER, PARAMETERS, "parallel.tensor=2"),
        (ZERO_3, OPTIMIZER, HIERARCHY, "parallel.sequence=2"),
    ],
)
def test_four_ranks_equal_one_plain_process(
    corpus: Path, references: dict[str, Trace], overrides: tuple[str, ...]
):
    for trace in train(4, settings(corpus, DROPOUT, *overrides), STEPS):
        assert deviation(trace, references["adamw"]).within(FP32)
