"""Save checkpoints while training goes on. Training waits only before a step that would change state that
has not been copied yet."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmtrain.checkpoint import store
from llmtrain.checkpoint.store import Part, Share
from llmtrain.distributed import processes
from llmtrain.engine.base import Engine

Then = Callable[[Path, float], None]
"""Called with the path of a checkpoint and the seconds that saving it took, without waits for training."""


class Copier:
    """Copies shares to buffers in host memory, which are reused for the next checkpoint; pinned if a GPU
    is used."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str, int], torch.Tensor] = {}

    def copy(self, share: Share) -> Share:
        parts = [part if part.is_constant else self._copy(part) for part in share.parts]
        return replace(share, parts=parts)

    def _copy(self, part: Part) -> Part:
        place, size = (part.kind, part.name, part.start), part.values.numel()
        buffer = self._buffers.get(place)
        if buffer is None or buffer.numel() != size:
            buffer = torch.empty(size, dtype=torch.float32, pin_memory=part.values.is_cuda)
            self._buffers[place] = buffer
        if part.values.is_cuda:
            buffer.copy_(part.values, non_blocking=True)
        else:
            # numpy, since torch would start a thread pool for this thread, which takes cores from training.
            np.copyto(buffer.numpy(), part.values.float().numpy())
        return part._replace(values=buffer)


class Pending:
    """A checkpoint in progress. A thread copies and writes this rank's share, but calls no collective,
    since collectives of two threads would mix. The next optimizer step waits for the copy."""

    def __init__(
        self,
        step: int,
        partial: Path,
        engine: Engine,
        copier: Copier,
        description: Mapping[str, Any],
        tokenizer: Path | None,
        then: Then | None,
        left_out: Collection[str],
    ) -> None:
        self._step = step
        self.partial = partial
        self.device = engine.device
        self._copier = copier
        self._description = store.describe(engine, step, description)
        self._tokenizer = tokenizer
        self._then = then
        self._began = time.monotonic()
        self._seconds = 0.0
        self._written: dict[str, Any] | None = None
        self._problem: tuple[str, str] | None = None
        self._is_handed_in = False
        self._is_copied = threading.Event()
        self._is_called_off = threading.Event()
        share = store.collect(engine, left_out)
        self._stream = None
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        self._hook = engine.optimizer.register_step_pre_hook(lambda *_: self.wait_for_copy())
        self._thread = threading.Thread(target=self._work, args=(share,), name="checkpoint", daemon=True)
        self._thread.start()

    def _work(self, share: Share) -> None:
        try:
            with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                copied = self._copier.copy(share)
            if self._stream is not None:
                self._stream.synchronize()
            self._is_copied.set()
            self._written = store.write_share(
                self.partial, processes.rank(), copied, go_on=lambda: not self._is_called_off.is_set()
            )
            self._written["seconds"] = time.monotonic() - self._began
        except Exception as error:  # hand_in reports it to all ranks
            self._problem = store.why(error, self.partial)
        finally:
            self._is_copied.set()

    def wait_for_copy(self) -> None:
        """Wait until the engine's state may change."""
        self._is_copied.wait()

    @property
    def is_busy(self) -> bool:
        return self._thread.is_alive()

    def advance(self) -> bool:
        """Take the next step on all ranks together, when no thread is busy: hand in the files, from which
        rank 0's thread then assembles a checkpoint; after that, conclude. Return whether it was the last
        step.

        Raise as store.hand_in does.
        """
        self.wait()
        if not self._is_handed_in:
            shares = store.hand_in(self.partial, self._written, self._problem)
            self._is_handed_in = True
            # The slowest rank's; the others' values are of no use.
            self._seconds = max((share["seconds"] for share in shares), default=0.0)
            if processes.is_main():
                self._thread = threading.Thread(target=self._assemble, args=(shares,), daemon=True)
                self._thread.start()
            return False
        path = store.conclude(self.partial, self._step, self._problem)
        if self._then is not None:
            self._then(path, self._seconds)
        return True

    def _assemble(self, shares: list[dict[str, Any]]) -> None:
        began = time.monotonic()
        try:
            store.assemble(self.partial, self._step, shares, self._description, self._tokenizer)
            self._seconds += time.monotonic() - began
        except Exception as error:
            self._problem = store.why(error, self.partial)

    def wait(self) -> None:
        """Wait until this rank's thread has finished."""
        self._thread.join()
        self._hook.remove()

    def call_off(self) -> None:
        """Stop writing at the next chunk, and wait until it has stopped."""
        self._is_called_off.set()
        self.wait()


class Saver:
    """Saves an engine's checkpoints under `root`. All ranks must call the same methods in the same order.

    With `asynchronous`, `save` returns at once: a thread copies the state to host memory and writes it.
    `poll` or `finish` commits the checkpoint when all ranks' files are on disk; until then it has a
    temporary name.
    """

    def __init__(self, root: Path, *, asynchronous: bool = True, makes_folders: bool | None = None) -> None:
        """makes_folders: whether this rank creates the folders of checkpoints; None: rank 0 does, for all."""
        self._root = root
        self._makes_folders = makes_folders
        self._asynchronous = asynchronous
        self.left_out: Collection[str] = ()
        """Names of the frozen weights that checkpoints leave out, because their base holds them."""
        self._pending: Pending | None = None
        self._copier = Copier()

    def save(
        self,
        step: int,
        engine: Engine,
        description: Mapping[str, Any],
        tokenizer: Path | None,
        then: Then | None = None,
    ) -> None:
        """Save the engine's current state, after finishing the previous checkpoint.

        `then` is called on each rank once the checkpoint is committed; the seconds that it is told are those
        of all ranks on rank 0 alone. `description` is JSON for the manifest. Raise TrainingError on all ranks
        if the folder cannot be made, or as `finish` does.
        """
        self.finish()
        if not self._asynchronous:
            began = time.monotonic()
            path = store.save(self._root, step, engine, description, tokenizer, self.left_out)
            if then is not None:
                then(path, time.monotonic() - began)
            return
        partial = store.begin(self._root, step, self._makes_folders)
        self._pending = Pending(
            step, partial, engine, self._copier, description, tokenizer, then, self.left_out
        )

    def poll(self) -> None:
        """Advance the pending checkpoint if no rank's thread is busy with it. A collective if one is
        pending, otherwise a no-op. Raise as `finish` does."""
        if self._pending is None:
            return
        busy = torch.tensor([float(self._pending.is_busy)], device=self._pending.device)
        if processes.all_sum(busy).item() == 0:
            self._advance()

    def finish(self) -> None:
        """Wait for the pending checkpoint and commit it.

        Raise TrainingError on all ranks if any could not write, such as on a full disk; the incomplete
        checkpoint is removed, earlier ones stay.
        """
        while self._pending is not None:
            self._advance()

    def _advance(self) -> None:
        assert self._pending is not None
        pending, self._pending = self._pending, None  # a failure ends it
        if not pending.advance():
            self._pending = pending

    def abandon(self) -> None:
        """Abandon the pending checkpoint without a collective, for a rank that fails while others may not."""
        if self._pending is not None:
            self._pending.call_off()
            if processes.is_main() or self._makes_folders:
                shutil.rmtree(self._pending.partial, ignore_errors=True)
            self._pending = None
