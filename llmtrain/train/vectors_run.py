"""A run that trains word vectors: the run folder, trackers, checkpoints and resume of every run, around steps
that are slices of a text. There are no batches over ranks, and so not the loop of the other models."""

from __future__ import annotations

import math
import os
import platform
import sys
import time
from typing import Any

from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.checkpoint.retention import Rules, prune
from llmtrain.config import encode
from llmtrain.distributed import stopping
from llmtrain.errors import CheckpointError, Problem, TrainingError
from llmtrain.standard_streams import print_note
from llmtrain.track.progress import Progress
from llmtrain.track.throughput import ThroughputMeter, memory_bytes
from llmtrain.track.trackers import Trackers, open_trackers
from llmtrain.train.changes import changed_settings
from llmtrain.train.config import model_differences
from llmtrain.train.resume import Located, go_on, locate
from llmtrain.train.run_folder import RunFolder
from llmtrain.train.time_limit import TimeLimit
from llmtrain.train.vectors_config import VectorRunConfig, with_steps
from llmtrain.train.vectors_store import VectorSaver, load
from llmtrain.urls import without_credentials_in
from llmtrain.vectors.registry import build_trainer
from llmtrain.vectors.text import Text, open_text
from llmtrain.vectors.trainer import Setting, Trained, Trainer

WORDS = "words"
"""Folder of the run: its vocabulary and its text as rows of it."""


def train_vectors(config: VectorRunConfig) -> bool:
    """Train word vectors; return whether all steps are done, False after a request to stop.

    Raise UserError for whatever a user can fix."""
    started = time.perf_counter()
    folder = RunFolder(config.run.dir)
    run = _Run(config, folder)
    try:
        is_complete = run.train(started)
    except BaseException:
        run.close(failed=True)
        raise
    run.close(failed=False)
    return is_complete


class _Run:
    def __init__(self, config: VectorRunConfig, folder: RunFolder) -> None:
        self._config, self._folder = config, folder
        self._root = config.run.dir / "checkpoints"
        self._threads = config.train.threads or len(os.sched_getaffinity(0))
        self._trackers: Trackers | None = None
        self._progress: Progress | None = None
        self._saver: VectorSaver | None = None
        self._limit = TimeLimit.of_run(config.train.time_limit, config.run.dir)
        self._save_began = 0.0

    def train(self, started: float) -> bool:
        config = self._config
        # Before the text is read, which may take long: a run that goes on must be one of this model.
        found = locate(self._root, config.checkpoint.resume, self._say)
        if found is not None:
            self._check_model(found)
        text = open_text(config.data, config.model, config.run.dir / WORDS, self._say)
        if found is not None:
            self._check_text(found, text)
        trainer = build_trainer(config.model, self._setting(text))
        self._config = config = with_steps(config, trainer.steps_per_epoch)
        steps = config.train.steps
        assert steps is not None
        start = 0
        if found is not None:
            go_on(self._root, found, self._say)
            for change in changed_settings(found.checkpoint.manifest["config"], self._recorded()):
                self._say(f"note: {change}")
            load(trainer, found.checkpoint)
            start = found.checkpoint.step
        if start >= steps:
            self._say(f"already at step {start:,} of {steps:,}: nothing to train")
            return True
        self._open(text, trainer, found)
        assert self._saver is not None
        stopping.request.save_first()
        done = self._loop(trainer, start, steps)
        facts = {"why": "time limit"} if self._limit.is_over else {}
        self._folder.note("stop" if done < steps else "done", done, **facts)
        if done < steps:
            self._say(f"stopped at step {done:,} as {self._limit.why()}; run the same command to resume")
            return False
        seconds = time.perf_counter() - started
        self._say(f"done: step {done:,}, {seconds:.0f} s, run folder {config.run.dir}")
        return True

    def close(self, failed: bool) -> None:
        if failed:
            self._folder.note("fail")
        if self._saver is not None:
            self._saver.close()
        if self._progress is not None:
            self._progress.close()
        if self._trackers is not None:
            self._trackers.close(failed)
        self._folder.close()

    def _setting(self, text: Text) -> Setting:
        config = self._config
        return Setting(
            text=text,
            folder=config.run.dir / WORDS,
            seed=config.seed,
            words_per_step=config.train.words_per_step,
            rate=config.optimizer.lr,
            last_rate=config.optimizer.min_lr,
            say=self._say,
        )

    def _recorded(self) -> dict[str, Any]:
        """Return the configuration as it is stored, compared and sent."""
        plain: dict[str, Any] = without_credentials_in(encode(self._config))
        return plain

    def _check_model(self, found: Located) -> None:
        """Raise CheckpointError for a checkpoint of another model, or whose steps are others."""
        found.checkpoint.require("model", "data", "config")
        manifest, path = found.checkpoint.manifest, found.checkpoint.path
        different = model_differences(encode(self._config.model), manifest["model"])
        problems = []
        if different:
            got, remedy = (
                f"another model ({', '.join(different)})",
                "give another run.dir, or the model that it has",
            )
            problems.append(Problem(str(path), got, "", remedy))
        before = manifest["config"]["train"].get("words_per_step")
        size = self._config.train.words_per_step
        if not different and before != size:
            got, remedy = (
                f"{size:,} over a checkpoint of {before:,}",
                "steps would be others; give another run.dir",
            )
            problems.append(Problem("train.words_per_step", got, f"{before}", remedy))
        if not different and manifest["config"].get("seed") != self._config.seed:
            before = manifest["config"].get("seed")
            got = f"{self._config.seed} over a checkpoint of {before}"
            problems.append(Problem("seed", got, str(before), "give another run.dir to start anew"))
        if problems:
            raise CheckpointError(problems)

    def _check_text(self, found: Located, text: Text) -> None:
        before = found.checkpoint.manifest["data"].get("fingerprint")
        if before != text.fingerprint:
            got = f"a text with other words than that of {found.checkpoint.path}"
            raise CheckpointError(
                Problem("data", got, "the same texts and keys of data", "give another run.dir")
            )

    def _open(self, text: Text, trainer: Trainer, found: Located | None) -> None:
        """Describe the run in its folder, and open trackers, progress and saver."""
        config, start = self._config, 0 if found is None else found.checkpoint.step
        own = found.checkpoint if found is not None and found.is_own else None
        self._data = {
            "kind": config.data.kind,
            "paths": [str(without_credentials_in(path)) for path in config.data.path],
            "fingerprint": text.fingerprint,
            "words": text.num_words,
            "vocabulary": len(text.words),
        }
        recorded = self._recorded()
        self._folder.describe(
            recorded, self._data, {"device": "cpu", "world_size": 1, "threads": self._threads}
        )
        self._trackers = open_trackers(
            config.track,
            run_dir=config.run.dir,
            run_name=config.run.name,
            resolved_config=recorded,
            resume_step=None if own is None else own.step,
            state=None if own is None else own.manifest.get("trackers"),
        )
        self._folder.note("start", start, host=platform.node(), processes=1)
        steps = config.train.steps
        assert steps is not None
        every = 1 if sys.stderr.isatty() else config.train.log_every
        self._progress = Progress(steps, start_step=start, every=every)
        threads = "1 thread" if self._threads == 1 else f"{self._threads} threads"
        self._say(
            f"{len(text.words):,} words × {config.model.width(len(text.words)):,} "
            f"dimensions; {trainer.steps_per_epoch:,} steps of up to {config.train.words_per_step:,} "
            f"{trainer.counts} an epoch, on {threads}"
        )
        self._saver = VectorSaver(
            self._root,
            text.vocabulary_file,
            config.train.words_per_step,
            asynchronous=config.checkpoint.asynchronous,
        )
        self._description = {"model": encode(config.model), "config": recorded, "data": self._data}

    def _loop(self, trainer: Trainer, start: int, steps: int) -> int:
        """Train until the last step or a request to stop, and save; return the steps that are done."""
        every, meter = self._config.checkpoint.every, ThroughputMeter()
        assert self._trackers is not None
        assert self._saver is not None
        done = start
        while done < steps:
            began = time.perf_counter()
            trained = trainer.step(done, steps, self._threads)
            seconds = time.perf_counter() - began
            done += 1
            if trained.loss is not None and not math.isfinite(trained.loss):
                got, remedy = f"a loss of {trained.loss} at step {done:,}", "lower optimizer.lr, then resume"
                raise TrainingError(Problem("loss", got, "a finite number", remedy))
            meter.add(trained.words, seconds)
            self._track(done, trained, meter, seconds)
            stops = stopping.request.asked or self._limit.asks_to_stop()
            if stops or done == steps or (every is not None and done % every == 0):
                self._save(done, trainer)
            elif self._saver.is_written():
                self._after_save()
            if stops:
                break
        self._after_save()
        return done

    def _track(self, step: int, trained: Trained, meter: ThroughputMeter, seconds: float) -> None:
        assert self._trackers is not None
        assert self._progress is not None
        metrics: dict[str, float] = {} if trained.loss is None else {"loss": trained.loss}
        metrics |= {
            **trained.metrics,
            "tokens_per_second": meter.tokens_per_second,
            "step_tokens_per_second": trained.words / seconds,
            "memory_bytes": memory_bytes("cpu"),
        }
        self._trackers.log(step, metrics)
        self._progress.update(step, metrics)

    def _save(self, step: int, trainer: Trainer) -> None:
        assert self._saver is not None
        assert self._trackers is not None
        self._after_save()
        self._save_began = time.monotonic()
        self._saver.save(step, trainer, {**self._description, "trackers": self._trackers.state()})

    def _after_save(self) -> None:
        """Wait for the checkpoint that was begun, say where it is, and delete those that no rule keeps."""
        assert self._saver is not None
        path = self._saver.finish()
        if path is None:
            return
        step = Checkpoint.open(path).step
        self._say(f"step {step:,}: checkpoint {path}")
        seconds = time.monotonic() - self._save_began
        self._limit.saved(seconds)
        self._folder.note("save", step, seconds=round(seconds, 3))
        keep = self._config.checkpoint
        try:
            prune(self._root, path, Rules(keep.keep_last, keep.keep_best, keep.keep_every, keep.best))
        except OSError as error:  # training needs none of this
            self._say(f"warning: old checkpoints could not be deleted: {error}")

    def _say(self, text: str) -> None:
        if self._progress is not None:
            self._progress.message(text)
        else:
            print_note(text)
