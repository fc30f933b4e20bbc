"""Decide, once the gradient of a step is known, whether the step may change the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from llmtrain.data.loader import MicroBatch
from llmtrain.distributed import processes

Accepts = Callable[[float, float], bool]
"""(loss, gradient norm) → whether the step may be taken."""


class NonFiniteError(Exception):
    """The loss or the gradient norm is NaN or infinite; the weights after this step must not be kept.

    `what` says which, with its value; `samples` are the global sample numbers of the affected
    micro-batches, or of the whole step if they cannot be determined.
    """

    def __init__(self, what: str, samples: Sequence[int]) -> None:
        super().__init__(what)
        self.what = what
        self.samples = tuple(samples)


class Gate:
    """Asks once in a step whether its gradient may change weights. All ranks get the same answer."""

    def __init__(self, accepts: Accepts, loss: float, device: torch.device) -> None:
        self._accepts, self._loss, self._device = accepts, loss, device
        self._norm: float | None = None
        self.rejected = False
        """Whether the step must leave everything as it was."""

    def __call__(self, norm: float) -> bool:
        """Return whether the step may be taken, given the norm of its whole gradient. All ranks call it
        together, before anything has changed."""
        # One rank's number for all: a difference in the last bit could divide them.
        own = torch.tensor(norm if processes.is_main() else 0.0, dtype=torch.float64, device=self._device)
        self._norm = float(processes.all_sum(own))
        self.rejected = not self._accepts(self._loss, self._norm)
        return not self.rejected

    def conclude(self, norm: float, *, scales_loss: bool) -> float:
        """Judge a step that the engine itself has skipped, and return the norm of its gradient.

        norm: as the engine reports it.
        scales_loss: whether the engine scales the loss, as fp16 needs. A gradient that overflows is then part
            of finding the scale, and no fault of the step.
        """
        overflows = not math.isfinite(norm) and not (scales_loss and math.isfinite(self._loss))
        if self._norm is None and overflows:
            self(norm)
        return norm if self._norm is None else self._norm


def samples_of(micro_batches: Sequence[MicroBatch]) -> list[int]:
    """Return the global sample numbers of all ranks' `micro_batches`."""
    gathered = processes.gather([int(sample) for micro in micro_batches for sample in micro.samples])
    return sorted({sample for of_rank in gathered for sample in of_rank})
