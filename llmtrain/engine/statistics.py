"""The statistics of a model, such as the running averages of batch norm, over the steps of an engine.

All replicas hold the same: after each step they are averaged, so that a checkpoint needs one copy and a
resumed run goes on exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from llmtrain.nn.state import named_statistics
from llmtrain.parallel.mesh import Mesh


class Statistics:
    """The buffers of a model by canonical name, fp32, whole on each rank."""

    def __init__(self, model: nn.Module, mesh: Mesh) -> None:
        self.by_name = named_statistics(model)
        self._mesh = mesh

    @contextmanager
    def kept_on_failure(self) -> Iterator[None]:
        """Inside, forward passes change them; an exception puts back what they were before, as weights that a
        step did not reach are."""
        before = [values.clone() for values in self.by_name.values()]
        try:
            yield
        except BaseException:
            for values, were in zip(self.by_name.values(), before, strict=True):
                values.copy_(were)
            raise

    def average(self) -> None:
        """Average them over the replicas. A collective if there are several and the model has any."""
        if not self.by_name or self._mesh.replicas == 1:
            return
        flat = torch.cat([values.view(-1) for values in self.by_name.values()])
        dist.all_reduce(flat, group=self._mesh.replica_group)
        flat /= self._mesh.replicas
        parts = flat.split([values.numel() for values in self.by_name.values()])
        for values, part in zip(self.by_name.values(), parts, strict=True):
            values.copy_(part.view_as(values))
