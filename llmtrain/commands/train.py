"""`llmtrain train`: from a configuration to a finished run folder."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.config import encode
from llmtrain.distributed import launcher, stopping
from llmtrain.errors import INTERRUPTED_EXIT_CODE, DataError
from llmtrain.models.registry import skeleton_of
from llmtrain.objectives.reading import open_dataset
from llmtrain.optim.freezing import frozen_names
from llmtrain.optim.schedules import multiplier
from llmtrain.plan.estimate import estimate
from llmtrain.standard_streams import tell
from llmtrain.train.config import recorded
from llmtrain.train.resolve import Resolved, resolve
from llmtrain.train.start import start_ranks
from llmtrain.urls import without_credentials_in

if TYPE_CHECKING:
    from torch import Tensor

    from llmtrain.checkpoint.finite import FiniteCheck
    from llmtrain.checkpoint.reader import Checkpoint
    from llmtrain.data.datasets.base import Dataset
    from llmtrain.data.stream import Stream
    from llmtrain.engine.allocator import Heap
    from llmtrain.engine.evaluation import Totals
    from llmtrain.parallel.materialize import Source
    from llmtrain.tensor_boxes import Shard
    from llmtrain.track.progress import Progress
    from llmtrain.track.trackers import Trackers
    from llmtrain.train.observer import RunObserver
    from llmtrain.train.pretrained import StartingWeights
    from llmtrain.train.resume import Resume


def run(mapping: Mapping[str, Any]) -> int:
    """Train as `mapping` (conf/train.yaml, composed) says; all ranks call it alike. → exit code.

    Raises UserError for whatever a user can mend.
    """
    with stopping.request.listening():
        return _run(mapping)


def _run(mapping: Mapping[str, Any]) -> int:
    started = time.perf_counter()
    resolved = resolve(mapping)
    plan = estimate(resolved.config.model, resolved.layout, resolved.config, resolved.trainable)
    if launcher.rank() == 0:
        tell(plan.summary())
    plan.refuse_if_too_large()

    from llmtrain.distributed import processes
    from llmtrain.engine.allocator import Heap, keep_freed_memory

    device = processes.pick_device(resolved.config.device)
    heap = Heap(plan.memory.total) if device.type == "cpu" and keep_freed_memory() else None
    start_ranks(resolved, device)
    session = Session(resolved, device, heap, started)
    try:
        is_whole = session.train()
    except BaseException:
        session.close(failed=True)
        raise
    session.close(failed=False)
    return 0 if is_whole else INTERRUPTED_EXIT_CODE


class Session:
    """One process' part in one start of a run: what the loop needs, opened in order."""

    def __init__(self, resolved: Resolved, device: Any, heap: Heap | None, started: float) -> None:
        from llmtrain.checkpoint.saver import Saver
        from llmtrain.distributed import processes
        from llmtrain.train.run_folder import RunFolder

        self.config, self.layout, self.corpora = resolved.config, resolved.layout, resolved.corpora
        self.pretrained = resolved.pretrained
        self.device = device
        self._heap = heap
        self._started = started
        self._folder: RunFolder | None = None
        self._trackers: Trackers | None = None
        self._progress: Progress | None = None
        self._saver = Saver(self.root, asynchronous=self.config.checkpoint.asynchronous)
        self.rank = self.layout.coordinates(processes.rank()).data

        def hold_folder() -> None:
            self._folder = RunFolder(self.config.run.dir)

        processes.on_main(hold_folder)

    @property
    def root(self) -> Path:
        return self.config.run.dir / "checkpoints"

    def train(self) -> bool:
        """→ whether all steps are done, not interrupted."""
        from llmtrain.data.loader import Loader
        from llmtrain.distributed import processes, set_union
        from llmtrain.train.loop import Hooks, Schedule, train
        from llmtrain.train.resume import find_resume
        from llmtrain.train.streaming import open_stream, plan_timeline

        config, layout = self.config, self.layout
        # Whatever may be refused is looked at before anything is built.
        length = config.batch.sequence_length
        training = processes.agree(
            lambda: config.objective.open(config.model, config.data, self.corpora, "train", length)
        )
        validation = processes.agree(self._validation_dataset)
        resume = find_resume(config, self._data_facts(), self._say)
        checkpoint = resume.checkpoint if resume is not None else None
        start_step = checkpoint.step if checkpoint is not None else 0
        owed = resume is not None and resume.evaluation_owed and validation is not None
        if start_step >= config.train.steps and not owed:
            self._say(f"already at step {start_step:,} of {config.train.steps:,}: nothing to train")
            return True

        timeline = plan_timeline(
            config, training, resume.timeline if resume is not None else None, start_step, self._say
        )
        stream = processes.agree(
            lambda: open_stream(
                config.data,
                training,
                timeline,
                seed=config.seed,
                agree=set_union.of_all_ranks(),
                on_skip=self._on_skip,
            )
        )
        objective = config.objective.build(config.model, config.data, self.corpora)
        from llmtrain.checkpoint.finite import FiniteCheck
        from llmtrain.engine.build import build_engine
        from llmtrain.interchange.trained import listed

        check = FiniteCheck()
        starting = self._starting_weights() if checkpoint is None else None
        weights = None if starting is None else _watched(starting.source(config.seed), check)
        engine = build_engine(config, layout, self.device, objective, checkpoint, weights)
        never_trained = sorted(self._never_trained(checkpoint, starting))
        if never_trained and checkpoint is None:
            self._say(f"warning: frozen, and yet never trained: {listed(never_trained)}")
        if self.pretrained is not None:
            where = f"model.path={self.pretrained.path}"
            processes.agree(lambda: check.refuse(where))
        differences = checkpoint.manifest.get("starting") if checkpoint is not None else None
        if starting is not None:
            differences = {"new": list(starting.new), "unused": list(starting.unused)}
        observer = processes.agree(lambda: self._open_observer(stream, start_step, resume, differences))
        loader = Loader(
            stream,
            objective.collate,
            micro_size=layout.micro_size,
            data_rank=self.rank,
            data_size=layout.data,
            workers=config.data.workers,
            pin_memory=self.device.type == "cuda",
        )
        tokenizer = self.corpora.tokenizer_path if self.corpora is not None else None
        description = {
            "model": encode(config.model),
            "config": recorded(config),
            "data": {**self._data_facts(), "train": stream.describe()},
            "timeline": timeline.encode(),
            "resumed_from": str(checkpoint.path) if checkpoint is not None else None,
            "started_from": str(self.pretrained.path) if self.pretrained is not None else None,
            "origin": self._origin(checkpoint),
            "fresh": never_trained,
            "starting": differences,
        }

        def evaluate(between: Callable[[], None]) -> Totals:
            assert validation is not None
            from llmtrain.train.evaluation import evaluate_dataset

            rules, workers = config.evaluation, config.data.workers
            return evaluate_dataset(
                engine, validation, layout, self.rank, workers, rules.max_samples, between
            )

        def save(step: int, validation_loss: float | None, evaluation_owed: bool) -> None:
            state = processes.from_main(self._trackers.state() if self._trackers is not None else None)
            facts = {
                "validation_loss": validation_loss,
                "evaluation_owed": evaluation_owed,
                "trackers": state,
            }
            self._saver.save(
                step, engine, {**description, **facts}, tokenizer, lambda path: self._on_saved(step, path)
            )

        stopping.request.save_first()
        outcome = train(
            engine,
            loader,
            Hooks(
                lr=lambda step: config.optimizer.lr * multiplier(config.schedule, step, config.train.steps),
                evaluate=evaluate if validation is not None else None,
                save=save,
                evaluated_late=resume.note_evaluation if resume is not None else lambda loss: None,
                after_step=self._after_step,
                finish_save=self._saver.finish,
            ),
            observer,
            Schedule(
                start_step=start_step,
                steps=config.train.steps,
                evaluate_every=config.evaluation.every,
                evaluate_at_start=config.evaluation.at_start,
                save_every=config.checkpoint.every,
                evaluation_owed=owed,
            ),
            asked_to_stop=lambda: stopping.request.asked,
        )
        processes.on_main(observer.raise_failure)
        if outcome.interrupted:
            self._say(f"stopped at step {outcome.step:,} as asked; the same command resumes")
            return False
        loss = "" if outcome.validation_loss is None else f", validation loss {outcome.validation_loss:.4f}"
        seconds = time.perf_counter() - self._started
        self._say(f"done: step {outcome.step:,}{loss}, {seconds:.0f} s, run folder {config.run.dir}")
        return True

    def _origin(self, checkpoint: Checkpoint | None) -> Any:
        """Of the folder that the weights once came from; as JSON, None where there is none."""
        if checkpoint is not None:
            return checkpoint.manifest.get("origin")
        return None if self.pretrained is None else encode(self.pretrained.origin)

    def _starting_weights(self) -> StartingWeights | None:
        """Those of `model=pretrained`; None: the seed's."""
        from llmtrain.train.pretrained import open_weights

        if self.pretrained is None:
            return None
        starting = open_weights(self.pretrained, self.config.model)
        self._say(f"starting from the weights of {starting.trained.source}, with a fresh optimizer")
        for note in starting.notes():
            self._say(note)
        return starting

    def _never_trained(
        self, checkpoint: Checkpoint | None, starting: StartingWeights | None
    ) -> frozenset[str]:
        """Parameters whose values no step changes and none before this run did."""
        if checkpoint is not None:
            return frozenset(checkpoint.manifest.get("fresh", ()))
        freeze = self.config.train.freeze
        if not freeze:
            return frozenset()
        if starting is not None:
            return frozen_names(starting.untrained, freeze)
        return frozen_names([name for name, _ in skeleton_of(self.config.model).named_parameters()], freeze)

    def _after_step(self) -> None:
        self._saver.poll()
        if self._heap is not None:
            self._heap.after_step()

    def _on_saved(self, step: int, path: Path) -> None:
        from llmtrain.distributed import processes

        self._say(f"step {step:,}: checkpoint {path}")
        if processes.is_main():
            self._prune(path)

    def _prune(self, current: Path) -> None:
        from llmtrain.checkpoint.retention import prune

        rules = self.config.checkpoint
        try:
            prune(
                self.root,
                current,
                keep_last=rules.keep_last,
                keep_best=rules.keep_best,
                keep_every=rules.keep_every,
            )
        except OSError as error:  # nothing that training needs
            self._say(f"warning: old checkpoints could not be deleted: {error}")

    def close(self, failed: bool) -> None:
        self._saver.abandon()
        if self.corpora is not None:
            self.corpora.close()
        if self._progress is not None:
            self._progress.close()
        if self._trackers is not None:
            self._trackers.close(failed)
        if self._folder is not None:
            self._folder.close()

    def _say(self, text: str) -> None:
        if launcher.rank() == 0:
            if self._progress is not None:
                self._progress.message(text)
            else:
                tell(text)

    def _validation_dataset(self) -> Dataset | None:
        config = self.config
        if config.evaluation.every is None and not config.evaluation.at_start:
            return None
        try:
            self._say_what_is_not_evaluated()
            return open_dataset(
                config.objective,
                config.model,
                config.data,
                self.corpora,
                "validation",
                config.batch.sequence_length,
                lambda shard, samples: self._say(_left_out(shard, samples)),
            )
        except DataError as error:
            self._say(f"no evaluation: {error}")
            return None

    def _say_what_is_not_evaluated(self) -> None:
        without = [] if self.corpora is None else self.corpora.without("validation")
        if without and self.corpora is not None and len(without) < len(self.corpora.by_name):
            self._say(f"note: {', '.join(without)} has no validation split; the others are evaluated")

    def _on_skip(self, shard: str, samples: int) -> None:
        self._say(f"{_left_out(shard, samples)} in this epoch")

    def _data_facts(self) -> dict[str, Any]:
        data = self.config.data
        return {
            "kind": data.kind,
            "paths": without_credentials_in({"": data.path} if data.kind == "images" else data.paths),
            "tokenizer_sha256": self.corpora.tokenizer_sha256 if self.corpora is not None else None,
        }

    def _open_observer(
        self,
        stream: Stream,
        start_step: int,
        resume: Resume | None,
        differences: Mapping[str, Sequence[str]] | None,
    ) -> RunObserver:
        from llmtrain.distributed import processes
        from llmtrain.train.observer import RunObserver

        config = self.config
        if not processes.is_main():
            return RunObserver(config, self.layout, self.device, None, None)
        from llmtrain.track.progress import Progress
        from llmtrain.track.trackers import open_trackers

        assert self._folder is not None
        facts: dict[str, Any] = {"device": str(self.device), "world_size": processes.world_size()}
        if self.pretrained is not None:
            facts["started_from"] = str(self.pretrained.path)
        if differences is not None:
            facts |= {f"{which}_parameters": names for which, names in differences.items()}
        self._folder.describe(
            recorded(config),
            {**self._data_facts(), "train": stream.describe(), "timeline": stream.timeline.encode()},
            facts,
        )
        self._trackers = open_trackers(
            config.track,
            run_dir=config.run.dir,
            run_name=config.run.name,
            resolved_config=recorded(config),
            # A fork of another run has tracks of its own.
            resume_step=start_step if resume is not None and resume.is_own else None,
            state=resume.checkpoint.manifest.get("trackers")
            if resume is not None and resume.is_own
            else None,
        )
        every = 1 if sys.stderr.isatty() else config.train.log_every
        self._progress = Progress(config.train.steps, start_step=start_step, every=every)
        self._say(stream.describe())
        counters = self.corpora.counters if self.corpora is not None else dict
        return RunObserver(config, self.layout, self.device, self._trackers, self._progress, counters)


def _watched(source: Source, check: FiniteCheck) -> Source:
    """`source`, all of whose values `check` sees."""

    def watched(out: Tensor, name: str, shard: Shard, start: int) -> None:
        source(out, name, shard, start)
        check.look(name, out)

    return watched


def _left_out(shard: str, samples: int) -> str:
    return f"warning: {shard} is bad: its {samples:,} sequences are left empty"
