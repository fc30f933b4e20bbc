"""State of a model that forward passes change: its statistics, such as the running averages of batch norm,
and the states that rows carry from step to step.

All replicas hold the same statistics: after each step they are averaged, so that a checkpoint needs one copy
and a resumed run goes on exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from llmtrain.engine.carried import carried_by
from llmtrain.nn.state import named_statistics
from llmtrain.parallel.mesh import Mesh


class Statistics:
    """The buffers of a model by canonical name, fp32, whole on each rank."""

    def __init__(self, model: nn.Module, mesh: Mesh) -> None:
        self.by_name = named_statistics(model)
        self._mesh = mesh
        self._model = model

    @contextmanager
    def kept_on_failure(self) -> Iterator[Callable[[], None]]:
        """Inside, forward passes change them and the carried states. Yield a function that puts back what
        they were before. An exception does so too: they go with the weights, which a step may not reach."""
        before = [values.clone() for values in self.by_name.values()]
        states = carried_by(self._model)
        packed = None if states is None else states.packed()

        def put_back() -> None:
            for values, were in zip(self.by_name.values(), before, strict=True):
                values.copy_(were)
            if states is not None and packed is not None:
                states.unpack(packed)

        try:
            yield put_back
        except BaseException:
            put_back()
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
