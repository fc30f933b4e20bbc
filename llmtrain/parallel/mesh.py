"""This process' place among all, and the groups that it talks to along each axis of the layout.

Tensor parallelism runs on fairscale's model-parallel group, which its mappings find by themselves.
DeepSpeed is handed the mesh as its `mpu`: replicas, which ZeRO shards over, are data · sequence.
"""

from __future__ import annotations

import contextlib
import io
from itertools import product
from typing import Any

import torch
import torch.distributed as dist

from llmtrain.distributed import processes
from llmtrain.parallel.layout import Coordinates, Layout

_GROUPS: dict[tuple[tuple[int, ...], ...], Any] = {}
"""Divisions of all ranks → this rank's group of each: a process may run several layouts in turn."""


class Mesh:
    """Groups of one layout; made by all ranks together, once the process group is up."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.coordinates = layout.coordinates(processes.rank())
        self.replicas = layout.data * layout.sequence
        """Processes that hold the same weights."""
        self.replica = self.coordinates.data * layout.sequence + self.coordinates.sequence
        """Number of this process among them."""
        if not dist.is_initialized():
            return
        self.replica_ranks = self._ranks("data", "sequence")
        self.replica_group = self._group("data", "sequence")
        # Groups of one are as many as there are processes, and each takes time to make.
        if layout.sequence > 1:
            self.sequence_group = self._group("sequence")
        if layout.pipeline > 1:
            self.pipeline_group = self._group("pipeline")
        self.tensor_group = _fairscale_group(layout.tensor)

    @property
    def is_first_stage(self) -> bool:
        return self.coordinates.pipeline == 0

    @property
    def is_last_stage(self) -> bool:
        return self.coordinates.pipeline == self.layout.pipeline - 1

    @property
    def tells_the_loss(self) -> bool:
        """Whether sums over all ranks take this rank's loss: one of those that have the same."""
        return self.is_last_stage and self.coordinates.tensor == 0

    def stage_rank(self, stage: int) -> int:
        """The rank that stands at `stage` of this pipeline."""
        return self.layout.rank(self.coordinates._replace(pipeline=stage))

    def group_of_stages(self, *stages: int) -> Any:
        """The group of this pipeline's ranks at `stages`; all ranks of the world call it alike."""
        return self._group("pipeline", among=set(stages))

    def _ranks(self, *axes: str, among: set[int] | None = None, of: Coordinates | None = None) -> list[int]:
        """Ranks that differ from a place (this rank's by default) along `axes` alone."""
        place = of or self.coordinates
        ranges = [range(getattr(self.layout, axis)) for axis in axes]
        ranks = []
        for values in product(*ranges):
            if among is None or values[0] in among:
                ranks.append(self.layout.rank(place._replace(**dict(zip(axes, values, strict=True)))))
        return sorted(ranks)

    def _group(self, *axes: str, among: set[int] | None = None) -> Any:
        places = (self.layout.coordinates(rank) for rank in range(self.layout.world_size))
        division = tuple(sorted({tuple(self._ranks(*axes, among=among, of=place)) for place in places}))
        if division not in _GROUPS:
            # Every rank makes every group, in one order, as torch asks for.
            for ranks in division:
                group = dist.new_group(list(ranks))
                if processes.rank() in ranks:
                    _GROUPS[division] = group
            _GROUPS.setdefault(division, None)
        return _GROUPS[division]

    # DeepSpeed's mpu.

    def get_data_parallel_rank(self) -> int:
        return self.replica

    def get_data_parallel_world_size(self) -> int:
        return self.replicas

    def get_data_parallel_group(self) -> Any:
        return self.replica_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return self.replica_ranks

    def get_model_parallel_rank(self) -> int:
        return self.coordinates.tensor

    def get_model_parallel_world_size(self) -> int:
        return self.layout.tensor

    def get_model_parallel_group(self) -> Any:
        return self.tensor_group


def _fairscale_group(tensor: int) -> Any:
    """fairscale's model-parallel group for tensor parallelism of this size."""
    from fairscale.nn.model_parallel import initialize

    if not initialize.model_parallel_is_initialized() or initialize.get_model_parallel_world_size() != tensor:
        initialize.destroy_model_parallel()
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its sizes
            initialize.initialize_model_parallel(tensor)
    return initialize.get_model_parallel_group()


def all_sum_over(values: torch.Tensor, group: Any) -> torch.Tensor:
    """`values` summed over the ranks of `group`, in place."""
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(values, group=group)
    return values
