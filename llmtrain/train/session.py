"""One start of a run, in order: join the ranks, hold the run folder, open the data, find the checkpoint to
resume from, build the engine, open the trackers, run the loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmtrain.checkpoint.manifest import step_folder
from llmtrain.checkpoint.memory import MemoryTier
from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.checkpoint.retention import list_steps, prune
from llmtrain.checkpoint.saver import Saver
from llmtrain.config import encode
from llmtrain.data.datasets.base import Dataset, mean_length
from llmtrain.data.loader import OneReading
from llmtrain.data.stream import Stream
from llmtrain.distributed import processes, stopping
from llmtrain.engine.allocator import Heap, keep_freed_memory
from llmtrain.engine.base import Engine
from llmtrain.engine.evaluation import Totals
from llmtrain.optim.schedules import multiplier
from llmtrain.train.config import recorded
from llmtrain.train.examiner import give_classifier
from llmtrain.train.judging import Judge
from llmtrain.train.loop import Hooks, Outcome, Schedule, Verdict, train
from llmtrain.train.observer import RunObserver
from llmtrain.train.profiling import Profile
from llmtrain.train.reference import give_reference
from llmtrain.train.remote import RemoteCopy
from llmtrain.train.resolve import Resolved
from llmtrain.train.resume import Resume, check_same_validation, find_resume
from llmtrain.train.run_data import RunData
from llmtrain.train.run_record import RunRecord
from llmtrain.train.solved import build_solved_engine, conclude
from llmtrain.train.spikes import SpikeGuard
from llmtrain.train.start import same_work, start_ranks
from llmtrain.train.starting import StartingPoint, build_run_engine
from llmtrain.train.suite import TrainingSuite, tasks_of
from llmtrain.train.text_samples import TextSampler
from llmtrain.train.time_limit import TimeLimit
from llmtrain.train.unfreezing import unfreezing_of
from llmtrain.train.weight_record import WeightRecord
from llmtrain.train.writing import ValidationWriter
from llmtrain.train.writing_rules import rows_to_write
from llmtrain.watch import phases, watch
from llmtrain.watch.watch import watched


def train_run(resolved: Resolved, forecast_bytes: int, started: float) -> bool:
    """Train a run; return whether all its steps are done, False after a request to stop. All ranks call it.

    forecast_bytes: the memory that one process is expected to use; started: time.perf_counter() at the start.
    """
    device = processes.pick_device(resolved.config.device)
    heap = Heap(forecast_bytes) if device.type == "cpu" and keep_freed_memory() else None
    start_ranks(resolved, device)
    config = resolved.config
    with watched(config.watch, config.debug, config.run.dir, device, same_work(resolved.layout)):
        return _train(resolved, device, heap, started)


def _train(resolved: Resolved, device: torch.device, heap: Heap | None, started: float) -> bool:
    """Train, again from the last good checkpoint after each step back; see train_run."""
    while True:
        session = Session(resolved, device, heap, started)
        try:
            is_complete = session.train()
        except BaseException:
            session.close(failed=True)
            raise
        session.close(failed=False)
        if not session.went_back:
            return is_complete
        # As in a start after a kill, ignore the checkpoint that the first session was told to resume from.
        checkpoint = replace(resolved.config.checkpoint, resume="auto")
        resolved = replace(resolved, config=replace(resolved.config, checkpoint=checkpoint))


class Session:
    """The part of one process in one start of a run."""

    def __init__(self, resolved: Resolved, device: torch.device, heap: Heap | None, started: float) -> None:
        """Hold the run folder. Raise CheckpointError when another process does."""
        self._resolved = resolved
        self.config, self.layout, self.corpora = resolved.config, resolved.layout, resolved.corpora
        self.pretrained = resolved.pretrained
        self.device = device
        self.rank = self.layout.coordinates(processes.rank()).data
        self._heap = heap
        self._started = started
        self.record = RunRecord(self.config)
        self._say = self.record.say
        watch.say_by(self._say)
        self.data = RunData(resolved, self._say)
        has_copy = self.config.checkpoint.remote is not None
        self._limit = TimeLimit.of_run(self.config.train.time_limit, self.config.run.dir, has_copy)
        self._saver = Saver(self.root, asynchronous=self.config.checkpoint.asynchronous)
        self._memory = MemoryTier(self.config.checkpoint.memory, self._say)
        self.went_back = False
        """Whether the run goes on in another session, from its newest checkpoint."""
        processes.on_main(self.record.hold_folder)
        self._profile = Profile(self.config.profile, self.config.run.dir, device, self._say)
        self._copy = RemoteCopy(self.config.checkpoint, self.config.run.dir, self._say, self.record.note)

    @property
    def root(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.config.run.dir / "checkpoints"

    def train(self) -> bool:
        """Open everything in order, train, and return whether all steps are done."""
        config = self.config
        # Check everything that may be refused before building anything.
        self._copy.open()
        self._memory.open()
        training = self.data.open()
        validation = self.data.validation
        tasks = None if validation is None else processes.agree(lambda: tasks_of(config))
        start = self._find_start(has_validation=validation is not None)
        judge = self._judge = Judge(config, None if start.resume is None else start.resume.evaluations)
        self._copy.begin(start.step, lambda: judge.rules)
        if start.step >= config.train.steps and not start.evaluation_owed:
            self._say(f"already at step {start.step:,} of {config.train.steps:,}: nothing to train")
            return self._finish_copy()
        if judge.ended and not start.evaluation_owed:
            self._say(f"{judge.why_ended()}; nothing to train")
            return self._finish_copy()
        stream = self.data.open_stream(training, start)
        if start.resume is not None and start.resume.is_own:
            check_same_validation(config, start.resume.checkpoint, self.data.facts())
        spikes = None if start.resume is None else start.resume.spikes
        note, finish = self.record.note, self._finish_before_rollback
        self._guard = SpikeGuard(config.train, spikes, self.root, stream.timeline, self._say, note, finish)
        objective = config.objective.build(config.model, config.data, self.corpora)
        if config.method == "features":
            engine, weights = build_solved_engine(self._resolved, self.device, objective, self._say)
        else:
            engine, weights = build_run_engine(self._resolved, self.device, objective, start, self._say)
        self._saver.left_out = self._memory.left_out = weights.left_out
        if validation is not None and self.corpora is not None and rows_to_write(config):
            judge.writer = ValidationWriter(config, self.corpora, weights.origin, self._say)
        if validation is not None and self.corpora is not None and config.harness.tasks:
            judge.suite = TrainingSuite(config, self.corpora, weights.origin, tasks, self._say)
        if validation is not None and self.corpora is not None and config.evaluation.texts:
            judge.sampler = TextSampler(config, self.corpora, weights.origin, self._say)
        rows = {False: next(iter(training.values())), True: validation}
        give_reference(objective, engine, rows, config, self.rank, start, self._say)
        processes.agree(lambda: give_classifier(objective, config.model, self.device))
        length = mean_length(training.values())
        observer = processes.agree(lambda: self._open_observer(stream, start, weights, length))
        loader = self.data.open_loader(stream, objective, self.rank, self.device.type == "cuda")
        description = self._describe(stream, start, weights)
        reading = OneReading(loader)
        watched = self._profile.watching(reading)
        stopping.request.save_first()

        while True:
            hooks = self._hooks(engine, validation, start, description, observer)
            if config.method == "features":
                outcome = conclude(engine, reading, hooks, observer, config.train.steps, self._asked_to_stop)
            else:
                outcome = train(engine, watched, hooks, observer, self._schedule(start), self._asked_to_stop)
            if outcome.went_back:
                reading.close()
                engine.release()
                self.went_back = True
                return False
            if outcome.interrupted or outcome.ended_early or outcome.step >= config.train.steps:
                break
            engine.release()
            del engine, hooks  # or the memory of two would be held
            start = self._at_step(outcome.step)
            engine, _ = build_run_engine(self._resolved, self.device, objective, start, self._say)
        processes.on_main(observer.raise_failure)
        is_copied = self._finish_copy(outcome.interrupted)
        self._report(outcome)
        return is_copied and not outcome.interrupted

    def close(self, failed: bool) -> None:
        """Release everything; `failed` is how trackers mark the run."""
        self._profile.close()
        self._saver.abandon()
        self._memory.close()
        self._copy.close()
        if not self.went_back:
            self.data.close()
        self.record.close(failed)

    # Opening a start, in order

    def _find_start(self, has_validation: bool) -> StartingPoint:
        resume = find_resume(self.config, self.data.facts(), self._say, self._memory)
        owed = resume is not None and resume.evaluation_owed and has_validation
        return StartingPoint(resume, owed)

    def _open_observer(
        self, stream: Stream, start: StartingPoint, weights: WeightRecord, length: float | None
    ) -> RunObserver:
        """Describe the run in its folder and open its trackers and progress report, on rank 0 alone."""
        config = self.config
        if not processes.is_main():
            return RunObserver(config, self.layout, self.device, None, None)
        self._describe_in_folder(stream, weights)
        own = start.checkpoint if start.resume is not None and start.resume.is_own else None
        self.record.begin(start.step, own)
        self._say(stream.describe(self.layout.micro_size if self.layout.pipeline == 1 else None))
        record, trainable = self.record, self._resolved.trainable
        seen = record.trackers, record.progress, self._counters, length, trainable
        return RunObserver(config, self.layout, self.device, *seen)

    def _counters(self) -> dict[str, float]:
        """Return metrics that other parts of the run count; new ones at each step."""
        return {**(self.corpora.counters() if self.corpora is not None else {}), **watch.times()}

    def _describe_in_folder(self, stream: Stream, weights: WeightRecord) -> None:
        facts: dict[str, Any] = {"device": str(self.device), "world_size": processes.world_size()}
        if self.pretrained is not None:
            facts["started_from"] = str(self.pretrained.path)
        if weights.differences is not None:
            facts |= {f"{which}_parameters": names for which, names in weights.differences.items()}
        data = {**self.data.facts(), "train": stream.describe(), "timeline": stream.timeline.encode()}
        self.record.describe(data, facts)

    def _describe(self, stream: Stream, start: StartingPoint, weights: WeightRecord) -> dict[str, Any]:
        """Return what the manifest of every checkpoint of this start says, as JSON."""
        return {
            "model": encode(self.config.model),
            "config": recorded(self.config),
            "data": {**self.data.facts(), "train": stream.describe()},
            "timeline": stream.timeline.encode(),
            "resumed_from": str(start.checkpoint.path) if start.checkpoint is not None else None,
            "started_from": str(self.pretrained.path) if self.pretrained is not None else None,
            "origin": weights.origin,
            "fresh": weights.never_trained,
            "starting": weights.differences,
            "base": None if weights.base is None else encode(weights.base),
        }

    # Functions that the loop calls

    def _hooks(
        self,
        engine: Engine,
        validation: Dataset | None,
        start: StartingPoint,
        description: Mapping[str, Any],
        observer: RunObserver,
    ) -> Hooks:
        config, judge, record = self.config, self._judge, self.record

        def evaluate(step: int, between: Callable[[], None]) -> Totals:
            assert validation is not None
            return judge.evaluate(engine, validation, self.layout, self.rank, step, between)

        def verdict(step: int, totals: Totals) -> Verdict:
            assert validation is not None
            return judge.judge(step, totals, engine.objective, validation, observer)

        def evaluated_late(loss: float | None) -> None:
            if start.resume is not None:
                start.resume.note_evaluation({"validation_loss": loss, **judge.recorded(start.step)})
                self._copy.submit(start.resume.checkpoint.path)

        def described(step: int, validation_loss: float | None, evaluation_owed: bool) -> dict[str, Any]:
            trackers = processes.from_main(record.trackers.state() if record.trackers is not None else None)
            return {
                **description,
                "validation_loss": validation_loss,
                **judge.recorded(step),
                **self._guard.recorded(),
                "evaluation_owed": evaluation_owed,
                "trackers": trackers,
            }

        def save(step: int, validation_loss: float | None, evaluation_owed: bool) -> None:
            manifest = described(step, validation_loss, evaluation_owed)
            tokenizer = self.corpora.tokenizer_path if self.corpora is not None else None
            self._saver.save(step, engine, manifest, tokenizer, partial(self._on_saved, step))

        def copy(step: int, validation_loss: float | None) -> None:
            if self._memory.is_due(step):
                with phases.SAVE:
                    self._memory.save(step, engine, described(step, validation_loss, False))

        return Hooks(
            lr=lambda step: config.optimizer.lr * multiplier(config.schedule, step, config.train.steps),
            evaluate=evaluate if validation is not None else None,
            save=save,
            evaluated_late=evaluated_late,
            after_step=self._after_step,
            finish_save=self._finish_saves,
            copy=copy,
            judge=verdict,
            accepts=self._guard.accepts,
            rejected=self._guard.rejected,
        )

    def _at_step(self, step: int) -> StartingPoint:
        """Return the point to go on from after a checkpoint that this start has saved."""
        return StartingPoint(Resume(Checkpoint.open(self.root / step_folder(step)), is_own=True))

    def _schedule(self, start: StartingPoint) -> Schedule:
        config, unfreezing = self.config, unfreezing_of(self.config)
        return Schedule(
            start_step=start.step,
            steps=config.train.steps,
            evaluate_every=config.evaluation.every,
            evaluate_at_start=config.evaluation.at_start,
            save_every=config.checkpoint.every,
            pause_at=None if unfreezing is None else unfreezing.next_change(start.step),
            evaluation_owed=start.evaluation_owed,
        )

    def _after_step(self) -> None:
        self._profile.after_step()
        self._saver.poll()
        self._memory.poll()
        self._copy.poll()
        watch.after_step()
        if self._heap is not None:
            self._heap.after_step()

    def _finish_saves(self) -> None:
        self._saver.finish()
        self._memory.finish()

    def _finish_before_rollback(self) -> None:
        self._saver.finish()
        self._memory.forget()

    def _asked_to_stop(self) -> bool:
        return stopping.asked() or (processes.is_main() and self._limit.asks_to_stop())

    def _on_saved(self, step: int, path: Path, seconds: float) -> None:
        self._limit.saved(seconds)
        self._say(f"step {step:,}: checkpoint {path}")
        self.record.note("save", step, seconds=round(seconds, 3))
        self._copy.submit(path)
        self.record.keep(step, path)
        if processes.is_main():
            self._prune(path)

    def _finish_copy(self, interrupted: bool = False) -> bool:
        """Wait for the copy elsewhere, but not for long after a request to stop, and delete what was kept for
        the upload. Return whether it is complete."""
        is_complete = self._copy.finish(
            lambda: interrupted or self._asked_to_stop(), self._limit.upload_seconds
        )
        if processes.is_main() and self.config.checkpoint.remote is not None:
            for newest in list_steps(self.root)[-1:]:
                self._prune(newest)
        return is_complete

    def _prune(self, current: Path) -> None:
        try:
            prune(self.root, current, self._judge.rules, self._copy.held)
        except OSError as error:  # training needs none of this
            self._say(f"warning: old checkpoints could not be deleted: {error}")

    def _report(self, outcome: Outcome) -> None:
        if outcome.interrupted:
            facts = {"why": "time limit"} if self._limit.is_over else {}
            self.record.note("stop", outcome.step, **facts)
            why = self._limit.why()
            self._say(f"stopped at step {outcome.step:,} as {why}; run the same command to resume")
            return
        self.record.note("done", outcome.step)
        for line in self._judge.closing_lines(outcome):
            self._say(line)
        loss = "" if outcome.validation_loss is None else f", validation loss {outcome.validation_loss:.4f}"
        seconds = time.perf_counter() - self._started
        self._say(f"done: step {outcome.step:,}{loss}, {seconds:.0f} s, run folder {self.config.run.dir}")
