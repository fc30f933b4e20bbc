"""Times of phases on all ranks, and ranks that are slower than others with the same work."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from llmtrain.watch.clock import Clock
from llmtrain.watch.config import WatchConfig
from llmtrain.watch.layout import PHASES

CATEGORIES = (*PHASES, "communication")
SHOWN = ("data", "forward", "backward", "communication", "optimizer", "evaluation", "save")
"""Categories whose times are tracked."""
OWN = ("data", "forward", "backward", "optimizer")
"""Categories of a rank's own work, by which ranks are compared."""
NEGLIGIBLE_SECONDS = 0.001
"""Smaller differences of a step are no sign of a slow rank."""


@dataclass(frozen=True)
class Slow:
    """A rank that has become slow, or has caught up again."""

    rank: int
    is_slow: bool
    factor: float
    """Its own work, as a multiple of the median."""
    phase: str
    """Where most of the difference comes from."""
    seconds: float
    """Of this phase, a step."""
    median: float
    """Of the other ranks' in this phase."""


class Comparison:
    """Compares the ranks' times of one window of steps after another."""

    def __init__(self, config: WatchConfig, peers: Sequence[Sequence[int]]) -> None:
        """peers: groups of ranks that do the same work."""
        self._config, self._peers = config, peers
        self._slow_for: dict[int, int] = {}

    def add(self, seconds: Sequence[Mapping[str, float]], steps: int) -> list[Slow]:
        """Return the ranks that have become slow, or no longer are, with this window.

        seconds: of each rank, category → mean seconds of a step; steps: length of the window.
        """
        found = []
        needed = self._config.straggler_steps
        for peers in self._peers:
            if len(peers) < 2:
                continue
            own = {rank: sum(seconds[rank][name] for name in OWN) for rank in peers}
            median = statistics.median_low(own.values())
            for rank in peers:
                is_slow = own[rank] > max(self._config.straggler_factor * median, median + NEGLIGIBLE_SECONDS)
                before = self._slow_for.get(rank, 0)
                self._slow_for[rank] = now = before + steps if is_slow else 0
                if (before < needed <= now) or (before >= needed and not is_slow):
                    found.append(
                        self._described(rank, is_slow, own[rank] / max(median, 1e-9), seconds, peers)
                    )
        return found

    def _described(
        self,
        rank: int,
        is_slow: bool,
        factor: float,
        seconds: Sequence[Mapping[str, float]],
        peers: Sequence[int],
    ) -> Slow:
        medians = {name: statistics.median_low(seconds[peer][name] for peer in peers) for name in OWN}
        phase = max(OWN, key=lambda name: seconds[rank][name] - medians[name])
        return Slow(rank, is_slow, factor, phase, seconds[rank][phase], medians[phase])


class Stragglers:
    """Gathers the times of all ranks every few steps, and reads them steps later: nobody waits for them."""

    def __init__(
        self,
        config: WatchConfig,
        clock: Clock,
        peers: Sequence[Sequence[int]],
        device: torch.device,
        on_slow: Callable[[Slow], None],
    ) -> None:
        self._config, self._clock, self._device = config, clock, device
        self._comparison = Comparison(config, peers)
        self._on_slow = on_slow
        self._steps = 0
        self._sent: tuple[torch.Tensor, Any] | None = None
        """The times of all ranks, and what must be done before they may be read."""
        self._metrics: dict[str, float] = {}
        self._is_first = True

    def after_step(self) -> None:
        """Gather and read times when it is time to. All ranks call it after each step."""
        self._steps += 1
        if self._sent is not None:
            self._read()
        if self._steps < self._config.times_every:
            return
        seconds, steps, self._steps = self._clock.take(), self._steps, 0
        if self._is_first:  # it has the start, and the first step, in which much is allocated and compiled
            self._is_first = False
            return
        own = torch.tensor([[value / steps for value in seconds]], dtype=torch.float32, device=self._device)
        if not dist.is_initialized() or dist.get_world_size() == 1:
            self._sent = own, None
            return
        all_ranks = own.new_empty(dist.get_world_size(), len(CATEGORIES))
        self._sent = all_ranks, dist.all_gather([*all_ranks.unbind()], own[0], async_op=True)

    def _read(self) -> None:
        assert self._sent is not None
        values, work = self._sent
        if values.is_cuda:
            # Waiting makes the stream wait, not this process: copy behind it, and read once that is done.
            if work is not None:
                work.wait()
            copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            copy.copy_(values, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            self._sent = copy, copied
            return
        if isinstance(work, torch.cuda.Event):
            if not work.query():
                return
        elif work is not None:
            work.wait()
        self._sent = None
        seconds = [dict(zip(CATEGORIES, row, strict=True)) for row in values.tolist()]
        self._metrics = {}
        for name in SHOWN:
            column = [of_rank[name] for of_rank in seconds]
            self._metrics[f"seconds/{name}"] = statistics.fmean(column)
            if len(column) > 1:
                self._metrics[f"seconds/{name}_max"] = max(column)
        for slow in self._comparison.add(seconds, self._config.times_every):
            self._on_slow(slow)

    def take_metrics(self) -> dict[str, float]:
        """Return the times that were read since the last call: mean and maximum over ranks of the seconds of
        a step that each phase takes."""
        taken, self._metrics = self._metrics, {}
        return taken
