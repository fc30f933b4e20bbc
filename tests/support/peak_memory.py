"""The most memory that real ranks hold in training, beside what the plan forecasts.

    ranks.run(2, warm_up, corpus)
    held = ranks.run(2, measure, composed)          # one Held a rank
    planned = forecasts(composed, 2)                # and what the plan says of it, in bytes

Measured is the resident memory of the process (VmHWM, which the kernel counts and `clear_refs` sets back)
from before the model is built to after two steps, the second of which has the optimizer's state too. What
the process held before, the libraries', is subtracted, as the plan's `runtime` is. Each large block goes back
to the kernel when it is freed, so that resident is what lives; a run keeps freed blocks for its next step
(engine/allocator.py), within its forecast.
"""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any, NamedTuple

STEPS = 2
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_BLOCK_BYTES = 2**16
TINY = ("model.num_layers=1", "model.hidden_size=64", "model.vocab_size=512", "batch.sequence_length=16")
WARMING = (
    (),
    ("precision=bf16",),
    ("parallel.zero=1", "precision=bf16"),
    ("parallel.zero=2",),
    ("parallel.zero=3", "precision=bf16"),
)
"""What a process runs first, so that libraries are loaded and have their own buffers."""


class Held(NamedTuple):
    """Bytes of one rank."""

    most: int
    """Above what the process held before."""
    phases: dict[str, int]
    """Phase of the step → the most held in it; empty if it was not asked for."""


def forecasts(mapping: dict[str, Any], size: int) -> list[dict[str, int]]:
    """Of each of `size` ranks, the terms of the plan but the libraries'."""
    from llmtrain.plan.estimate import estimate
    from llmtrain.train.resolve import resolve

    resolved = resolve(mapping, size, data_optional=True)
    plan = estimate(resolved.config.model, resolved.layout, resolved.config, resolved.trainable)
    stages = [resolved.layout.coordinates(rank).pipeline for rank in range(size)]
    return [{n: b for n, b in plan.stage_memory[stage].terms.items() if n != "runtime"} for stage in stages]


def keep_no_freed_blocks() -> None:
    """Let glibc give each large block back when it is freed. Call it first: blocks that were freed before are
    kept, and used again."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(_M_MMAP_THRESHOLD, _BLOCK_BYTES)
    libc.mallopt(_M_TRIM_THRESHOLD, _BLOCK_BYTES)


def warm_up(corpus: str) -> None:
    """Run a tiny model in each way, in a process that has run nothing else."""
    from llmtrain.distributed import processes
    from tests.support.training import compose

    keep_no_freed_blocks()
    size = processes.world_size()
    for overrides in WARMING:
        if size == 1 and any("zero" in word for word in overrides):
            overrides = (*overrides, "engine=deepspeed")
        batch = (f"batch.global_size={size}", "batch.micro_size=1", f"data.path={corpus}")
        measure(compose(("model=gpt_tiny", *TINY, *batch, *overrides)))


def measure(mapping: dict[str, Any], by_phase: bool = False) -> Held:
    """Build the engine of a composed run, take its first steps on its own data, with a checkpoint after each
    where these are asynchronous, and return the peak."""
    import torch

    from llmtrain.checkpoint.saver import Saver
    from llmtrain.distributed import processes
    from llmtrain.engine.build import build_engine
    from llmtrain.train.resolve import resolve
    from llmtrain.watch import recorder
    from tests.support.training import open_loader

    resolved = resolve(mapping, processes.world_size())
    config, layout = resolved.config, resolved.layout
    objective = config.objective.build(config.model, config.data, resolved.corpora)
    steps = iter(open_loader(resolved, objective=objective).steps(0))
    batches = [next(steps).micro_batches for _ in range(STEPS)]
    saver = Saver(Path(str(config.data.path)) / "saved")
    before, phases = _settled(), _PhasePeaks()
    most = 0
    engine = build_engine(config, layout, torch.device("cpu"), objective, None)
    most = max(most, _status("VmHWM"))
    phases.peaks["start"] = most
    if by_phase:
        recorder.current = phases  # type: ignore[assignment]
    try:
        for step, micro_batches in enumerate(batches, start=1):
            engine.train_step(micro_batches, lr=1e-4)
            if config.checkpoint.asynchronous:
                saver.save(step, engine, {}, None)
        saver.finish()
    finally:
        recorder.current = None
    most = max(most, phases.note("end"))
    engine.release()
    del engine
    return Held(most - before, {n: p - before for n, p in phases.peaks.items()} if by_phase else {})


class _PhasePeaks:
    """The most that was resident in each phase of a step; takes the place of a watch's recorder."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self._inside = ["between"]

    def note(self, name: str) -> int:
        """Count what was resident since the last note as of the phase `name`; return the most of all."""
        from_here = _status("VmHWM")
        self.peaks[name] = max(self.peaks.get(name, 0), from_here)
        _set_back()
        return max(self.peaks.values())

    def enter(self, number: int) -> None:
        from llmtrain.watch.layout import PHASES

        self.note(self._inside[-1])
        self._inside.append(PHASES[number])

    def leave(self) -> None:
        self.note(self._inside.pop())

    def begin_micro_batch(self, number: int) -> None:
        """Micro-batches are not told apart."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def _settled() -> int:
    """Give back what is not needed, begin a new peak, and return the bytes held."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    _set_back()
    return _status("VmRSS")


def _set_back() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
