"""Profile some steps of a run with torch's profiler, and its memory on a GPU.

RUN/profile/rank0.json.gz          a trace, for https://ui.perfetto.dev or chrome://tracing
RUN/profile/rank0-memory.pickle    on a GPU: a snapshot for https://pytorch.org/memory_viz
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llmtrain.data.loader import Reading, StepBatches
from llmtrain.distributed import processes
from llmtrain.standard_streams import Say, print_note
from llmtrain.train.profile_config import ProfileConfig

FOLDER = "profile"
MEMORY_ENTRIES = 100_000
"""Most allocations that a snapshot of memory shows, the last ones."""


class Profile:
    """The profile of one start. Only the ranks that write one do anything."""

    def __init__(self, config: ProfileConfig, run_dir: Path, device: torch.device, say: Say) -> None:
        self._range = config.steps if config.steps and processes.rank() in config.ranks else None
        self._folder, self._device, self._say = run_dir / FOLDER, device, say
        self._step = 0
        self._profiler: Any = None

    def watching(self, reading: Reading) -> Reading:
        """Return a reading of the same steps, which begins the profile before the data of its first step."""
        return reading if self._range is None else _Watched(reading, self)

    def before_step(self, step: int) -> None:
        """Called before the data of the `step`-th step is read."""
        self._step = step
        if self._range is not None and self._profiler is None and self._range[0] <= step <= self._range[1]:
            self._begin()

    def after_step(self) -> None:
        """Called after each step; writes the profile after the last."""
        if self._range is not None and self._profiler is not None and self._step >= self._range[1]:
            self.close()

    def close(self) -> None:
        """Write what was profiled, also where the run ends before the last step."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        trace = self._folder / f"rank{processes.rank()}.json.gz"
        # The name of the temporary file tells the profiler to compress.
        temporary = trace.with_name(f".{trace.name.removesuffix('.json.gz')}.{os.getpid()}.json.gz")
        try:
            profiler.stop()
            self._folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(temporary))
            os.replace(temporary, trace)
            self._write_memory()
        except (OSError, RuntimeError) as error:  # training needs none of this
            temporary.unlink(missing_ok=True)
            print_note(f"warning: the profile could not be written to {self._folder}: {error}")
            return
        self._say(f"step {self._step:,}: profile {trace}")

    def _begin(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_ENTRIES)
        self._profiler = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profiler.start()

    def _write_memory(self) -> None:
        if self._device.type != "cuda":
            return
        torch.cuda.memory._dump_snapshot(str(self._folder / f"rank{processes.rank()}-memory.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)


class _Watched:
    """A reading that tells a profile which step comes next."""

    def __init__(self, reading: Reading, profile: Profile) -> None:
        self._reading, self._profile = reading, profile

    def steps(self, start_step: int = 0) -> Iterator[StepBatches]:
        steps, step = iter(self._reading.steps(start_step)), start_step
        while True:
            step += 1
            self._profile.before_step(step)
            yield next(steps)
