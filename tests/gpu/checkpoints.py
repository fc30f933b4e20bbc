"""A checkpoint that is written beside training holds the state at its call: from pinned memory, filled on a
stream of its own, while the next steps wait for nothing but that copy."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmtrain.checkpoint import store
from llmtrain.checkpoint.manifest import step_folder
from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.checkpoint.saver import Copier, Saver
from tests.gpu.runs import engine_of, family_overrides
from tests.gpu.table import Row, judged


class SlowCopier(Copier):
    """Gives the next step time to come first."""

    def copy(self, share: store.Share) -> store.Share:
        time.sleep(0.5)
        return super().copy(share)


def check(device: str, folder: Path) -> Iterator[Row]:
    engine, loader = engine_of(family_overrides("Llama form", device, folder))
    steps = loader.steps(0)

    def train(count: int) -> None:
        for _ in range(count):
            engine.train_step(next(steps).micro_batches, lr=1e-2)

    def save(name: str) -> Any:
        return Checkpoint.open(store.save(folder / "saved" / name, 2, engine, {}, None))

    train(2)
    waited = save("waited").manifest["files"]
    saver = Saver(folder / "saved" / "beside")
    saver._copier = SlowCopier()
    saver.save(2, engine, {}, None)
    pending = saver._pending
    assert pending is not None
    has_stream = pending._stream is not None
    train(2)
    saver.poll()
    saver.finish()
    beside = Checkpoint.open(folder / "saved" / "beside" / step_folder(2)).manifest["files"]
    later = save("later").manifest["files"]
    good = beside == waited and later != waited
    detail = f"the same files: {beside == waited}, and others two steps later: {later != waited}"
    yield judged("checkpoints", "the state at the call", good, detail)
    pinned = all(buffer.is_pinned() for buffer in saver._copier._buffers.values())
    on_gpu = device == "cuda"
    detail = f"pinned memory: {pinned}, a stream of its own: {has_stream}"
    if on_gpu:
        yield judged("checkpoints", "how it is copied", pinned and has_stream, detail)
    else:
        yield Row("checkpoints", "how it is copied", "passed over", f"{detail}; a CPU needs neither")
