from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.config import decode
from llmtrain.errors import ConfigError, Problem
from llmtrain.parallel.config import BatchConfig, ParallelConfig
from llmtrain.parallel.layout import Coordinates, Layout
from llmtrain.parallel.nearest import nearest_global_sizes, nearest_micro_sizes
from llmtrain.parallel.planning import plan_layout

CONF = Path(__file__).parents[3] / "conf"


def plan(
    parallel: ParallelConfig | None = None,
    batch: BatchConfig | None = None,
    *,
    engine: str = "deepspeed",
    precision: str = "fp32",
    world_size: int = 1,
    device: str = "cpu",
) -> Layout:
    return plan_layout(
        parallel or ParallelConfig(),
        batch or BatchConfig(global_size=8, micro_size=2, sequence_length=16),
        engine=engine,  # type: ignore[arg-type]
        precision=precision,  # type: ignore[arg-type]
        world_size=world_size,
        device=device,
    )


def refusals(*args, **kwargs) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError) as caught:
        plan(*args, **kwargs)
    return caught.value.problems


def test_one_process() -> None:
    layout = plan(engine="local")
    assert (layout.data, layout.accumulation, layout.tokens_per_step, layout.replica_size) == (1, 4, 128, 8)


def test_data_takes_the_processes_that_are_left() -> None:
    assert plan(world_size=4).data == 4
    assert plan(world_size=4).accumulation == 1


@given(
    data=st.integers(1, 64), micro=st.integers(1, 16), accumulation=st.integers(1, 16), zero=st.integers(0, 3)
)
def test_sizes_add_up(data: int, micro: int, accumulation: int, zero: int) -> None:
    batch = BatchConfig(data * micro * accumulation, micro, 8)
    layout = plan(ParallelConfig(zero=zero), batch, world_size=data)  # type: ignore[arg-type]
    assert layout.accumulation * layout.micro_size * layout.data == layout.global_size == batch.global_size
    assert layout.data * layout.tensor * layout.pipeline * layout.sequence == layout.world_size


@given(global_size=st.integers(1, 300), micro=st.integers(1, 40), data=st.integers(1, 32))
def test_offered_sizes_are_legal(global_size: int, micro: int, data: int) -> None:
    batch = BatchConfig(global_size, micro, 8)
    micro_sizes, global_sizes = nearest_micro_sizes(batch, data), nearest_global_sizes(batch, data)
    if global_size % (data * micro):
        (problem,) = refusals(batch=batch, world_size=data)
        assert problem.where == "batch.global_size"
        assert str(global_sizes[-1]) in problem.remedy
    for offered in micro_sizes:
        plan(batch=BatchConfig(global_size, offered, 8), world_size=data)
    assert global_sizes
    for offered in global_sizes:
        plan(batch=BatchConfig(offered, micro, 8), world_size=data)
    assert bool(micro_sizes) == (global_size % data == 0)


def test_nearest_sizes_are_named() -> None:
    (problem,) = refusals(batch=BatchConfig(12, 5, 8), world_size=2)
    assert str(problem) == (
        "batch.global_size: got 12 with micro_size 5 on 2 data-parallel processes; allowed: a multiple of "
        "micro_size · data = 10, so that every replica gets whole micro-batches; "
        "nearest: batch.micro_size 2, 3, 6 or batch.global_size 10, 20"
    )


def test_all_problems_come_together() -> None:
    problems = refusals(
        ParallelConfig(tensor=2, pipeline=3, zero=2),
        BatchConfig(9, 2, 8),
        engine="local",
        precision="fp16",
        world_size=7,
    )
    assert {p.where for p in problems} == {
        "parallel",
        "parallel.pipeline",
        "parallel.zero",
        "precision",
        "batch.global_size",
    }


def test_world_size_must_be_the_product() -> None:
    (problem,) = refusals(ParallelConfig(data=3), BatchConfig(12, 1, 8), world_size=4)
    assert problem.where == "parallel"
    assert problem.remedy == "start 3 processes or give parallel.data=4 (null finds it)"


def test_fp16_needs_a_device_that_has_it() -> None:
    (problem,) = refusals(ParallelConfig(zero=1), precision="fp16")
    assert problem.where == "precision"
    assert plan(ParallelConfig(zero=1), precision="fp16", device="cuda").world_size == 1


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_zero_needs_deepspeed(zero: int) -> None:
    (problem,) = refusals(ParallelConfig(zero=zero), engine="local")  # type: ignore[arg-type]
    assert problem.where == "parallel.zero"
    assert "engine=deepspeed" in problem.remedy


def test_sizes_below_one() -> None:
    problems = refusals(ParallelConfig(tensor=0, data=-1), BatchConfig(0, 1, 8))
    assert [p.where for p in problems] == ["parallel.data", "parallel.tensor", "batch.global_size"]


@given(
    data=st.integers(1, 5), tensor=st.integers(1, 4), pipeline=st.integers(1, 4), sequence=st.integers(1, 3)
)
def test_coordinates_are_a_bijection(data: int, tensor: int, pipeline: int, sequence: int) -> None:
    world_size = data * tensor * pipeline * sequence
    layout = Layout(world_size, data, tensor, pipeline, sequence, 0, 1, 1, data, 8)
    places = [layout.coordinates(rank) for rank in range(world_size)]
    assert len(set(places)) == world_size
    assert [layout.rank(place) for place in places] == list(range(world_size))
    assert places == sorted(places), "tensor must be innermost, pipeline outermost"


def test_coordinates_by_table() -> None:
    layout = Layout(8, 2, 2, 2, 1, 1, 1, 1, 2, 8)
    assert layout.coordinates(0) == Coordinates(0, 0, 0, 0)
    assert layout.coordinates(1) == Coordinates(0, 0, 0, 1)
    assert layout.coordinates(2) == Coordinates(0, 1, 0, 0)
    assert layout.coordinates(4) == Coordinates(1, 0, 0, 0)
    with pytest.raises(ValueError, match="outside"):
        layout.coordinates(8)


@pytest.mark.parametrize("path", sorted((CONF / "parallel").glob("*.yaml")), ids=lambda p: p.stem)
def test_presets_decode(path: Path) -> None:
    config = decode(ParallelConfig, yaml.safe_load(path.read_text()))
    assert path.stem == ("auto" if config.auto else f"zero{config.zero}" if config.zero else "data")


def test_all_axes_together() -> None:
    layout = plan(ParallelConfig(tensor=2, pipeline=2, zero=1), world_size=8)
    assert (layout.data, layout.model) == (2, 4)
