"""What the jobs of a storm train, in which layouts, and with which samples that give NaN."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.corpora import random_documents, write_corpus
from tests.support.training import TINY_GPT
from tests.support.warm import PRELUDE, finish, start_ranks

SIZE = 8
"""Samples of a step."""
NAN_PARTS = ((0.15, 0.25), (0.4, 0.5), (0.6, 0.7))
"""In which parts of a run the gradients of a step are NaN, at a random one of each."""
SETTINGS = (
    *TINY_GPT,
    *("optimizer.lr=3e-3", "seed=7", "device=cpu", "data.workers=1"),
    *("data.shuffle_tars=2", "checkpoint.every=4", "evaluation.every=null", "evaluation.at_start=false"),
    *("train.spikes.deviations=1000", "train.spikes.in_a_row=2"),
    *("watch.hang_seconds=6", "watch.start_seconds=40", "watch.data_seconds=40", "watch.save_seconds=20"),
)
STREAMED = ("data.cache.bytes=45000", "data.cache.retries=4", "data.cache.timeout=3")
"""A cache of four files, so that the server is asked for one in nearly every step."""
SPOILS = """
import mmap, struct, time
from llmtrain.engine.base import Engine
from llmtrain.engine.deepspeed import DeepSpeedEngine
from llmtrain.engine.local import LocalEngine
from llmtrain.engine.pipeline import PipelineEngine

step = Engine.train_step

def train_step(self, micro_batches, **named):
    time.sleep(pause())
    self.factor = float("nan") if micro_batches[0].samples.start in {samples} else 1.0
    return step(self, micro_batches, **named)

def spoil(kind):
    accumulate = kind._accumulate
    def spoiled(self, count, batch, scale):
        return accumulate(self, count, batch, scale * self.factor)
    kind._accumulate = spoiled

def pause():
    return {pause}

Engine.train_step = train_step
for kind in (LocalEngine, DeepSpeedEngine, PipelineEngine):
    spoil(kind)
"""
"""A prelude: the gradients of the replica that takes some samples are NaN, and each step begins with a pause,
in seconds."""


@dataclass(frozen=True)
class Layout:
    """One way to divide the training over two hosts."""

    name: str
    ranks: int
    """Of each host."""
    overrides: tuple[str, ...]
    on_spike: str = "skip"
    steps: int = 340

    @property
    def settings(self) -> tuple[str, ...]:
        own = (f"train.on_spike={self.on_spike}", f"train.steps={self.steps}")
        return (*SETTINGS, *self.overrides, *own)

    def nan_samples(self, seed: int) -> list[int]:
        """The first samples of the steps whose gradients are NaN; with rollback two in a row, so that the run
        goes back."""
        source = random.Random(f"{seed}/{self.name}/nan")
        steps = [round(source.uniform(*part) * self.steps) for part in NAN_PARTS]
        count = 2 if self.on_spike == "rollback" else 1
        return [(step + i) * SIZE for step in steps for i in range(count)]


LAYOUTS = (
    Layout("data 2", 1, ("engine=local",)),
    Layout("ZeRO 2", 1, ("parallel.zero=2",), "rollback"),
    Layout("tensor 2", 1, ("parallel.tensor=2",)),
    Layout("pipeline 2, data 2", 2, ("parallel.pipeline=2", "parallel.zero=1")),
    Layout("sequence 2", 1, ("parallel.sequence=2",), "rollback"),
    Layout("ZeRO 3", 1, ("parallel.zero=3",)),
    Layout("tensor 2, data 2, ZeRO 1", 2, ("parallel.tensor=2", "parallel.zero=1")),
    Layout("pipeline 2", 1, ("parallel.pipeline=2", "parallel.zero=1")),
    Layout("data 4, ZeRO 1", 2, ("parallel.zero=1",), "rollback"),
)


def make_corpus(folder: Path) -> Path:
    """A corpus of 40 tar files, each of about the tokens of a step."""
    return write_corpus(folder, {"train": random_documents(600)})


def curve(run: Path) -> dict[int, tuple[Any, ...]]:
    """Step → what training computed there, as the run folder has it last."""
    found = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "loss" in record:
            found[record["step"]] = tuple(
                record.get(name) for name in ("loss", "grad_norm", "data_digest", "rejected")
            )
    return found


def undisturbed(layout: Layout, seed: int, corpus: Path, folder: Path) -> dict[int, tuple[Any, ...]]:
    """The curve of the same training, with the same NaN, that nothing disturbs: ranks of this host without a
    launcher, which read the corpus from its folder."""
    run, prelude = folder / "run", folder / "prelude.py"
    folder.mkdir(parents=True)
    prelude.write_text(SPOILS.format(samples=layout.nan_samples(seed), pause=0.0))
    words = ["train", *layout.settings, f"data.path={corpus}", f"run.dir={run}"]
    ranks = finish(start_ranks(2 * layout.ranks, *words, **{PRELUDE: str(prelude)}))
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), ranks[0].stderr[-3000:]
    found = curve(run)
    assert list(found) == list(range(1, layout.steps + 1))
    return found
