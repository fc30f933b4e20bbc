"""When a checkpoint is written: beside training, which stops only while its state is copied."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmtrain.checkpoint import store
from llmtrain.checkpoint.store import Part, Share
from llmtrain.engine.base import Engine
from llmtrain.parallel import distributed

Then = Callable[[Path], None]


@dataclass
class Pending:
    """A checkpoint on its way, whose share of this rank a thread writes."""

    step: int
    partial: Path
    description: Mapping[str, Any]
    tokenizer: Path | None
    then: Then | None
    device: torch.device
    """For the collective that asks whether all ranks are done."""
    written: dict[str, Any] | None = None
    problem: tuple[str, str] | None = None
    _called_off: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def write(self, share: Share) -> None:
        """Start the thread. It calls no collective: two threads' would mix."""
        self._thread = threading.Thread(target=self._write, args=(share,), name="checkpoint", daemon=True)
        self._thread.start()

    def _write(self, share: Share) -> None:
        try:
            self.written = store.write_share(
                self.partial, distributed.rank(), share, go_on=lambda: not self._called_off.is_set()
            )
        except Exception as error:  # told to all ranks by commit
            self.problem = store.why(error, self.partial)

    @property
    def is_busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def call_off(self) -> None:
        """Stop writing at the next chunk, and wait until it has stopped."""
        self._called_off.set()
        self.wait()


class Saver:
    """Saves an engine's checkpoints under `root`; all ranks call the same methods in the same order.

    With `asynchronous`, `save` returns when the state is copied to host memory, which is kept for the next
    save; a thread writes the copy, and `poll` or `finish` makes the files a checkpoint once all ranks' are on
    the disk. Until then nothing has the checkpoint's name.
    """

    def __init__(self, root: Path, *, asynchronous: bool = True) -> None:
        self._root = root
        self._asynchronous = asynchronous
        self._pending: Pending | None = None
        self._buffers: dict[tuple[str, str, int], torch.Tensor] = {}

    def save(
        self,
        step: int,
        engine: Engine,
        description: Mapping[str, Any],
        tokenizer: Path | None,
        then: Then | None = None,
    ) -> None:
        """Save the engine's state as that after `step`; one save at a time, so the one before is finished
        first. `then` is called on every rank with the path, once it is a checkpoint.

        `description` is JSON that goes into the manifest. Raises TrainingError on all ranks when the folder
        cannot be made, or as `finish`.
        """
        self.finish()
        if not self._asynchronous:
            path = store.save(self._root, step, engine, description, tokenizer)
            if then is not None:
                then(path)
            return
        partial = store.begin(self._root, step)
        facts = store.describe(engine, step, description)
        pending = self._pending = Pending(step, partial, facts, tokenizer, then, engine.device)
        try:
            pending.write(self._copy(store.collect(engine)))
        except Exception as error:  # no memory for the copy, say: told to all ranks by commit
            pending.problem = store.why(error, partial)

    def poll(self) -> None:
        """Commit the pending checkpoint if all ranks' files are on the disk. A collective while one is
        pending, else nothing. Raises as `finish`."""
        if self._pending is None:
            return
        busy = torch.tensor([float(self._pending.is_busy)], device=self._pending.device)
        if distributed.all_sum(busy).item() == 0:
            self.finish()

    def finish(self) -> None:
        """Wait for the pending checkpoint and commit it.

        Raises TrainingError on all ranks when any could not write, its disk being full, say; the half
        written checkpoint is removed, earlier ones stay.
        """
        if self._pending is None:
            return
        pending = self._pending
        pending.wait()
        self._pending = None
        path = store.commit(
            pending.partial,
            pending.step,
            pending.written,
            pending.problem,
            pending.description,
            pending.tokenizer,
        )
        if pending.then is not None:
            pending.then(path)

    def abandon(self) -> None:
        """Drop the pending checkpoint, for a rank that fails while others may not: no collective."""
        if self._pending is not None:
            self._pending.call_off()
            if distributed.is_main():
                shutil.rmtree(self._pending.partial, ignore_errors=True)
            self._pending = None

    def _copy(self, share: Share) -> Share:
        """The share in host memory of our own, pinned where it comes from a GPU."""
        parts: list[Part] = []
        for part in share.parts:
            place = part.kind, part.name, part.start
            buffer = self._buffers.get(place)
            if buffer is None or buffer.numel() != part.values.numel():
                pinned = part.values.is_cuda
                buffer = torch.empty(part.values.numel(), dtype=torch.float32, pin_memory=pinned)
                self._buffers[place] = buffer
            buffer.copy_(part.values, non_blocking=True)
            parts.append(part._replace(values=buffer))
        if any(part.values.is_cuda for part in share.parts):
            torch.cuda.synchronize()
        return Share(parts, share.counters, share.scaler)
