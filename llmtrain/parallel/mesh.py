"""Coordinates of this process in the layout, and its process groups along each axis.

Tensor parallelism uses fairscale's model-parallel group, which its mappings look up. DeepSpeed receives the
mesh as its `mpu`: the replicas over which ZeRO shards are data · sequence.
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
"""Partition of all ranks → this rank's group in it; cached, because a process may use several layouts in
turn."""


class Mesh:
    """The process groups of a layout. All ranks create it together, after the process group is
    initialized."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.coordinates = layout.coordinates(processes.rank())
        self.replicas = layout.data * layout.sequence
        """Number of processes that hold the same weights."""
        self.replica = self.coordinates.data * layout.sequence + self.coordinates.sequence
        """Number of this process among its replicas."""
        if not dist.is_initialized():
            return
        self.replica_ranks = self._ranks("data", "sequence")
        self.replica_group = self._group("data", "sequence")
        # Skip groups of one process: there would be one per process, and each takes time to create.
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
    def contributes_loss(self) -> bool:
        """Whether this rank contributes its loss to sums over all ranks: one of several with the same loss
        does."""
        return self.is_last_stage and self.coordinates.tensor == 0

    def stage_rank(self, stage: int) -> int:
        """Return the rank at `stage` of this pipeline."""
        return self.layout.rank(self.coordinates._replace(pipeline=stage))

    def group_of_stages(self, *stages: int) -> Any:
        """Return the group of this pipeline's ranks at `stages`. All ranks of the world must call it."""
        return self._group("pipeline", among=set(stages))

    def _ranks(self, *axes: str, among: set[int] | None = None, of: Coordinates | None = None) -> list[int]:
        """Return the ranks whose coordinates differ from `of` (default: this rank's) along `axes` only.

        among: restrict the first axis to these coordinates.
        """
        origin = of or self.coordinates
        ranges = [range(getattr(self.layout, axis)) for axis in axes]
        ranks = []
        for values in product(*ranges):
            if among is None or values[0] in among:
                ranks.append(self.layout.rank(origin._replace(**dict(zip(axes, values, strict=True)))))
        return sorted(ranks)

    def _group(self, *axes: str, among: set[int] | None = None) -> Any:
        others = [axis for axis in Coordinates._fields if axis not in axes]
        fixed = product(*(range(getattr(self.layout, axis)) for axis in others))
        origins = (self.coordinates._replace(**dict(zip(others, values, strict=True))) for values in fixed)
        partition = tuple(sorted(tuple(self._ranks(*axes, among=among, of=origin)) for origin in origins))
        if partition not in _GROUPS:
            # torch requires that all ranks create all groups in the same order.
            for ranks in partition:
                group = dist.new_group(list(ranks))
                if processes.rank() in ranks:
                    _GROUPS[partition] = group
            _GROUPS.setdefault(partition, None)
        return _GROUPS[partition]

    # Interface of DeepSpeed's mpu.

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
    """Return fairscale's model-parallel group for tensor parallelism of size `tensor`."""
    from fairscale.nn.model_parallel import initialize

    if not initialize.model_parallel_is_initialized() or initialize.get_model_parallel_world_size() != tensor:
        initialize.destroy_model_parallel()
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its sizes
            initialize.initialize_model_parallel(tensor)
    return initialize.get_model_parallel_group()


def all_sum_over(values: torch.Tensor, group: Any) -> torch.Tensor:
    """Sum `values` over the ranks of `group`, in place."""
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(values, group=group)
    return values
