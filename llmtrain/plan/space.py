"""All legal layouts of a model on a number of processes, which a search goes through."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from llmtrain.errors import ConfigError
from llmtrain.models.registry import family_of
from llmtrain.nn.recompute_config import RecomputeConfig
from llmtrain.parallel.config import BatchConfig, ParallelConfig
from llmtrain.parallel.layout import Layout
from llmtrain.parallel.model_shape import shape_of
from llmtrain.parallel.planning import plan_layout
from llmtrain.plan.estimate import Plan
from llmtrain.plan.interleaving import interleaving_problem

LARGEST_MICRO = 64
"""Largest micro-batch that is tried, in rows."""
MODES = ("none", "selective", "full")


@dataclass(frozen=True)
class Choice:
    """One way to run the model."""

    parallel: ParallelConfig
    batch: BatchConfig
    recompute: RecomputeConfig
    layout: Layout = field(compare=False)

    @property
    def key(self) -> object:
        """What distinguishes it from other choices."""
        usual = ParallelConfig()
        parallel = replace(self.parallel, data=None, auto=usual.auto, elastic=usual.elastic)
        return parallel, self.batch, self.recompute, self.layout.world_size

    def overrides(self) -> list[str]:
        """Return the overrides that choose it, without those that say what is the default."""
        parallel, default = self.parallel, ParallelConfig()
        names = [name for name in parallel.__dataclass_fields__ if name not in ("data", "auto", "elastic")]
        changed = [name for name in names if getattr(parallel, name) != getattr(default, name)]
        found = [f"parallel.{name}={_word(getattr(parallel, name))}" for name in changed]
        found.append(f"batch.micro_size={self.batch.micro_size}")
        if self.recompute.mode != "none":
            found.append(f"recompute={self.recompute.mode}")
        return found


@dataclass(frozen=True)
class Space:
    """The layouts that the rules of `parallel/` allow."""

    plan: Plan
    """A plan of the run in some layout."""
    batch: BatchConfig
    max_grad_norm: float
    exact_dropout: bool
    implementation: Any
    """That of the optimizer."""
    engine: str = "auto"
    """The engine that the user named; auto: the one that a layout needs."""
    on_this_machine: bool = False
    """Whether the run starts here, so that it may need only what this machine has."""

    @cached_property
    def shape(self) -> Any:
        return shape_of(self.plan.model)

    @cached_property
    def host(self) -> int | None:
        """Processes of one host; None: unknown."""
        return self.plan.cluster.devices_per_node

    def layout(self, parallel: ParallelConfig, batch: BatchConfig, world_size: int) -> Layout | None:
        """Return the layout; None if a rule refuses it."""
        engine: Any = self.engine
        if engine == "auto":
            engine = "deepspeed" if parallel.zero > 0 or parallel.pipeline > 1 else "local"
        try:
            layout = plan_layout(
                parallel,
                batch,
                engine=engine,
                precision=self.plan.precision,
                world_size=world_size,
                device=self.plan.conditions.device,
                model=self.shape,
                max_grad_norm=self.max_grad_norm,
                exact_dropout=self.exact_dropout,
                implementation=self.implementation,
                on_this_machine=self.on_this_machine,
            )
        except ConfigError:
            return None
        chunks = self.plan.assume.virtual_stages
        if layout.pipeline > 1 and interleaving_problem(self.plan.model, layout, chunks):
            return None
        return layout

    def choices(self, world_size: int) -> Iterator[Choice]:
        """Yield all choices, those of one layout with the least recomputation first."""
        for parallel in self.parallels(world_size):
            data = world_size // (parallel.tensor * parallel.pipeline * parallel.sequence)
            replica, rest = divmod(self.batch.global_size, data)
            if rest or replica == 0:
                continue
            for micro in _divisors(replica):
                if micro > LARGEST_MICRO:
                    break
                batch = replace(self.batch, micro_size=micro)
                if layout := self.layout(parallel, batch, world_size):
                    for mode in MODES if self.recomputes else MODES[:1]:
                        yield Choice(parallel, batch, RecomputeConfig(mode), layout)  # type: ignore[arg-type]

    def parallels(self, world_size: int) -> Iterator[ParallelConfig]:
        """Yield ways to divide the processes and the states, with the data axis left to the rest."""
        shape = self.shape
        length = self.batch.sequence_length
        tensors = [1]
        if "tensor" in shape.axes:
            most = min(self.host or world_size, world_size)
            tensors = [size for size in _divisors(world_size) if size <= most and shape.kv_heads % size == 0]
        for tensor in tensors:
            rest = world_size // tensor
            pipelines = [1]
            if "pipeline" in shape.axes:
                pipelines = [size for size in _divisors(rest) if size <= shape.num_layers]
            for pipeline in pipelines:
                sequences = [1]
                if "sequence" in shape.axes and pipeline == 1:
                    most = max(1, (self.host or world_size) // tensor)
                    of_heads = _divisors(shape.kv_heads // tensor)
                    sequences = [size for size in of_heads if size <= most and rest % size == 0]
                for sequence in sequences:
                    replicas = rest // pipeline
                    shares = tensor > 1 and shape.shares_tokens and length % (tensor * sequence) == 0
                    yield from self._states(tensor, pipeline, sequence, replicas, shares)

    def _states(
        self, tensor: int, pipeline: int, sequence: int, replicas: int, shares: bool
    ) -> Iterator[ParallelConfig]:
        """Yield what the replicas shard, and what is kept in host memory."""
        zeros: tuple[int, ...]
        if pipeline > 1:
            zeros = (1,) if self.max_grad_norm else (0, 1)
        else:
            zeros = (0, 1, 2, 3) if replicas > 1 else (0, 1)
        for zero in zeros:
            base = ParallelConfig(
                tensor=tensor,
                pipeline=pipeline,
                sequence=sequence,
                zero=zero,  # type: ignore[arg-type]
                tensor_sequence=shares,
                balance="time" if pipeline > 1 else "parameters",
            )
            yield base
            if zero and self.plan.conditions.device != "cpu":
                yield replace(base, offload_optimizer="cpu")

    @cached_property
    def recomputes(self) -> bool:
        """Whether the model has layers that can be computed again."""
        return family_of(self.plan.model).has_stages


def _divisors(number: int) -> list[int]:
    """Return the divisors of a number, the smallest first."""
    small = [size for size in range(1, int(number**0.5) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
