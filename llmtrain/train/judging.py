"""The evaluations of a run: their figures, the best one, whether the run ends early, and what the run folder
keeps of them at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from llmtrain import files
from llmtrain.checkpoint.retention import Rules
from llmtrain.data.datasets.base import Dataset
from llmtrain.distributed import processes
from llmtrain.engine.base import Engine
from llmtrain.engine.evaluation import Totals
from llmtrain.objectives.base import Scores
from llmtrain.objectives.turns import DrawsSamples
from llmtrain.parallel.layout import Layout
from llmtrain.scoring.pictures import draw, grid
from llmtrain.scoring.report import Report
from llmtrain.sweeps import FIGURES_FILE
from llmtrain.track.base import WrittenText
from llmtrain.train.config import TrainConfig
from llmtrain.train.early_stopping import History, metric_of, plain
from llmtrain.train.evaluation import evaluate_dataset
from llmtrain.train.loop import Outcome, Verdict
from llmtrain.train.observer import RunObserver
from llmtrain.train.suite import TrainingSuite
from llmtrain.train.text_samples import TextSampler, leave_texts
from llmtrain.train.writing import ValidationWriter

SAMPLES = "samples"
"""Folder of a run with the grids of images that the model made, and the texts that it wrote."""


class Judge:
    """Judges a run by its evaluations. All ranks call its methods alike."""

    def __init__(self, config: TrainConfig, recorded: Mapping[str, Any] | None) -> None:
        """recorded: `History.encode` of the checkpoint that the run resumes from."""
        self._config = config
        self.writer: ValidationWriter | None = None
        """Writes texts whose figures are those of an evaluation; None: none are written."""
        self.suite: TrainingSuite | None = None
        """Does tasks of the harness at evaluations; None: there are none."""
        self.sampler: TextSampler | None = None
        """Writes samples of text at evaluations; None: there are none."""
        self.metric = metric_of(config)
        self._history = History.of(self.metric, recorded)
        self._is_asked = config.checkpoint.best is not None or config.early_stopping.metric is not None
        self._step, self._figures = -1, dict[str, float]()
        self._grid: bytes | None = None
        """Picture of the images that the model makes; None: it makes none."""
        self._texts: list[WrittenText] = []
        """Samples of text of the last evaluation, on rank 0."""

    @property
    def rules(self) -> Rules:
        """Which checkpoints are kept."""
        keep = self._config.checkpoint
        return Rules(keep.keep_last, keep.keep_best, keep.keep_every, self.metric)

    @property
    def ended(self) -> bool:
        """Whether the evaluations that were recorded end the run."""
        return self._history.ends(self._config.early_stopping)

    def evaluate(
        self,
        engine: Engine,
        dataset: Dataset,
        layout: Layout,
        data_rank: int,
        step: int,
        between: Callable[[], None],
    ) -> Totals:
        """Return the sums and figures over the validation split, and the figures of tasks that are due after
        `step`. between: see evaluate_dataset."""
        totals = self._of_split(engine, dataset, layout, data_rank, between)
        self._grid = _grid(engine)
        self._texts = [] if self.sampler is None else self.sampler.texts(engine, dataset)
        if self.suite is None or not self.suite.is_due(step):
            return totals
        return replace(totals, figures={**totals.figures, **self.suite.figures(engine, between)})

    def _of_split(
        self, engine: Engine, dataset: Dataset, layout: Layout, data_rank: int, between: Callable[[], None]
    ) -> Totals:
        workers, max_samples = self._config.data.workers, self._config.evaluation.max_samples
        totals = evaluate_dataset(engine, dataset, layout, data_rank, workers, max_samples, between)
        objective = engine.objective
        if self.writer is not None:
            return replace(totals, figures=processes.from_main(self.writer.figures(engine, dataset)))
        if not (isinstance(objective, Scores) and totals.rows):
            return totals
        # Intervals would take longer than the evaluation; one rank computes, so that all decide alike.
        found = objective.scores(dataset, totals.rows, intervals=False) if processes.is_main() else {}
        figures = processes.from_main({name: figure.value for name, figure in found.items()})
        return replace(totals, figures=figures)

    def judge(
        self, step: int, totals: Totals, objective: Any, dataset: Dataset, observer: RunObserver
    ) -> Verdict:
        """Record an evaluation and return what follows from it; after the last one write figures and
        pictures."""
        self._step, self._figures = step, totals.measured
        is_best = self._history.note(step, self._figures)
        is_last = step >= self._config.train.steps
        if isinstance(objective, DrawsSamples) and processes.is_main():
            self._leave_samples(step, objective, observer)
        if self._texts:
            self._leave_texts(step, observer)
        if (self.ended or is_last) and processes.is_main():
            report = None
            if isinstance(objective, Scores) and totals.rows:
                report = objective.report(dataset, totals.rows)
            self._leave(report, observer)
        return Verdict(saves=is_best and self._is_asked and step > 0, ends=self.ended and not is_last)

    def recorded(self, step: int) -> dict[str, Any]:
        """Return what the manifest of a checkpoint of `step` says of the run's evaluations."""
        figures = plain(self._figures) if step == self._step else None
        return {"validation": figures, "evaluations": self._history.encode()}

    def closing_lines(self, outcome: Outcome) -> Iterator[str]:
        """Yield the lines about the evaluations that are printed at the end of a run."""
        if outcome.ended_early:
            yield self.why_ended()
        elif self._is_asked and self._history.best is not None:
            yield self._history.describe_best()
        if self._is_asked and self._history.best is not None:
            yield f"the best checkpoint is {self._config.run.dir / 'best'}"

    def why_ended(self) -> str:
        return self._history.why_ended(self._config.early_stopping)

    def _leave_samples(self, step: int, objective: DrawsSamples, observer: RunObserver) -> None:
        """Write the grid of samples to the run folder and the trackers, and warn of failures that the figures
        show."""
        # What a generator makes at first is alike too.
        for warning in objective.warnings(self._figures) if 4 * step >= self._config.train.steps else ():
            observer.warn(f"step {step:,}: {warning}")
        if self._grid is None:
            return
        folder = self._config.run.dir / SAMPLES
        try:
            folder.mkdir(exist_ok=True)
            files.write_atomically(folder / f"step-{step:08d}.png", self._grid)
        except OSError as error:  # training needs none of this
            observer.warn(f"the samples of step {step:,} could not be left in {folder}: {error}")
        observer.on_pictures(step, {"samples": self._grid})

    def _leave_texts(self, step: int, observer: RunObserver) -> None:
        """Write the samples of text to the run folder and the trackers."""
        folder = self._config.run.dir / SAMPLES
        try:
            leave_texts(folder, step, self._texts)
        except OSError as error:  # training needs none of this
            observer.warn(f"the texts of step {step:,} could not be left in {folder}: {error}")
        observer.on_texts(step, self._texts)

    def _leave(self, report: Report | None, observer: RunObserver) -> None:
        folder, best = self._config.run.dir, self._history.best_step
        found: dict[str, Any] = {"step": self._step, "figures": plain(self._figures), "best": None}
        if best is not None and self._is_asked:
            of_best = plain(self._history.best_figures)
            found["best"] = {"metric": self.metric, "step": best, "figures": of_best}
        try:
            if report is not None:
                found |= report.encode()
                pictures = draw(report, f"{self._config.run.name}, step {self._step:,}")
                for name, png in pictures.items():
                    files.write_atomically(folder / f"{name}.png", png)
                observer.on_pictures(self._step, pictures)
            files.write_json_atomically(folder / FIGURES_FILE, found)
        except OSError as error:  # training needs none of this
            observer.warn(f"the figures of step {self._step:,} could not be left in {folder}: {error}")


def _grid(engine: Engine) -> bytes | None:
    """Return a picture of the images that the engine's model makes, on rank 0 alone; None: it makes none."""
    objective = engine.objective
    if not isinstance(objective, DrawsSamples) or not processes.is_main():
        return None
    engine.model.eval()
    with torch.no_grad():
        images = objective.samples(engine.model)
    engine.model.train()
    return grid(images, columns=8)
