"""`llmtrain data show`: print samples of a run or of a corpus as text, as the model sees them.

Tokens that the objective hides are shown in ⟦ ⟧ with the target. Tokens without a loss are shown in ⟦ ⟧, or
in grey on a terminal.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtrain.config import decode, encode, require
from llmtrain.corpus.config import TokenDataConfig
from llmtrain.data.config import DataConfig, data_config_type
from llmtrain.data.mixture import begin
from llmtrain.data.streaming import open_stream, source_shares
from llmtrain.errors import ConfigError, Problem
from llmtrain.models.registry import families
from llmtrain.objectives.reading import corpora_problems, data_problems, open_data
from llmtrain.objectives.registry import objective_config_type
from llmtrain.objectives.text import Spelling
from llmtrain.standard_streams import escape_controls, unescaped
from llmtrain.train.recorded_data import MovedConfig, Opened, Run, steps_of
from llmtrain.train.vocabulary import resolve_vocabulary

if TYPE_CHECKING:
    from llmtrain.data.trace import Sample


_GREY = ("\ufdd0", "\ufdd1")
"""On a terminal, around what is printed in grey; Unicode reserves these characters for programs."""


@dataclass(frozen=True)
class ShowConfig:
    run: Path | None
    """A run folder; null: show the first samples of a stream over data.path."""
    data: DataConfig | MovedConfig
    step: str | None = None
    """A step N of a run, or FIRST:LAST, both included; null: 1."""
    sequence_length: int = 256
    """Tokens of one sequence, without a run."""
    seed: int = 0
    """Seed of the order of samples, without a run."""
    max_samples: int = 4
    """Largest number of samples to print."""

    def problems(self) -> Iterator[Problem]:
        yield from require(self.max_samples >= 1, "max_samples", self.max_samples, "1 or more")
        yield from require(self.sequence_length >= 1, "sequence_length", self.sequence_length, "1 or more")
        yield from require(self.seed >= 0, "seed", self.seed, "0 or more")


@dataclass(frozen=True, kw_only=True)
class OfRun(ShowConfig):
    """Samples of a run."""

    run: Path
    data: MovedConfig


@dataclass(frozen=True, kw_only=True)
class OfData(ShowConfig):
    """Samples of a stream over data."""

    data: DataConfig


def show(mapping: Mapping[str, Any]) -> None:
    """Print samples as text. Raise UserError for whatever a user can fix."""
    from llmtrain.data.trace import samples_of

    given = dict(mapping)
    objective = given.pop("objective", None) or {"kind": "causal_lm"}
    if given.get("run") is not None:
        settings = _of_a_run(given, mapping.get("objective"))
        of_run = decode(OfRun, settings)
        run = Run(of_run.run, of_run.data)
        steps = steps_of(of_run.step or "1")
        run.check_reached(steps)
        shown = of_run.max_samples
        for step in steps:
            opened = run.open(step)
            printer = _Printer(opened)
            for sample in samples_of(opened.stream, step, opened.skipped(step)):
                if shown == 0:
                    return
                printer.print(f"step {step}, sample {sample.sample}", sample)
                shown -= 1
        return
    data = given.get("data", {})
    if not any(data.get(key) for key in ("path", "mixture", "train")):
        remedy = "give run=… or data.path=…"
        raise ConfigError(Problem("run", "nothing", "a run folder, or a corpus in data.path", remedy))
    if given.get("step") is not None:
        raise ConfigError(Problem("step", str(given["step"]), "nothing without a run", "give run=…"))
    config = decode(OfData, _without_nulls(given), {"data": data_config_type})
    opened = _open_fresh(config, objective)
    printer = _Printer(opened)
    for sample in samples_of(opened.stream, 1, opened.skipped(1)):
        printer.print(f"sample {sample.sample}", sample)


def _without_nulls(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Remove null keys except `run`, so that they take the defaults of ShowConfig."""
    return {key: value for key, value in mapping.items() if value is not None or key == "run"}


def _of_a_run(mapping: Mapping[str, Any], objective: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the settings that can be given with a run; raise ConfigError for the others."""
    problems = []
    remedy = "leave it out, or leave out run=…"
    allowed = "what the run had"
    section = mapping["data"]
    defaults = encode(TokenDataConfig())
    moved = [item.name for item in dataclasses.fields(MovedConfig)]
    for key in ("sequence_length", "seed"):
        if mapping.get(key) is not None:
            problems.append(Problem(key, str(mapping[key]), allowed, remedy))
    if objective:
        problems.append(Problem("objective", "one of its own", allowed, remedy))
    for key, value in section.items():
        if key not in moved and key != "kind" and value != defaults.get(key):
            problems.append(Problem(f"data.{key}", str(value), allowed, remedy))
    if problems:
        raise ConfigError(problems)
    kept = {key: value for key, value in section.items() if key in moved}
    return {**_without_nulls(mapping), "data": kept}


def _open_fresh(config: OfData, section: Mapping[str, Any]) -> Opened:
    """Open a stream of one step without a run. Raise UserError if the corpora do not fit the objective."""
    data = config.data
    if not data.has_text:
        raise _no_text()
    try:
        objective = decode(objective_config_type(section), section)
    except ConfigError as error:
        where = [p if p.where.startswith("objective") else p.within("objective") for p in error.problems]
        raise ConfigError(where) from error
    family = next(family for family in families().values() if objective.trains(family.kind))
    model = objective.fitted(family.config())
    problems = data_problems(objective, data)
    for problem in objective.length_problems(config.sequence_length, model):
        problems.append(dataclasses.replace(problem, where=problem.where.removeprefix("batch.")))
    if problems:
        raise ConfigError(problems)
    corpora = open_data(objective, data)
    if problems := corpora_problems(objective, corpora):
        raise ConfigError(problems)
    model = resolve_vocabulary(model, objective, corpora)
    sources = objective.open(model, data, corpora, "train", config.sequence_length)
    timeline = begin(config.max_samples, source_shares(data, sources, 0), {})
    # What drop_last leaves out depends on the batch size, which is unknown here.
    stream = open_stream(data, sources, timeline, seed=config.seed, drop_last=False)
    return Opened(stream, sources, corpora, data, model, objective)


def _no_text() -> ConfigError:
    return ConfigError(Problem("data.kind", "images, which have no text", "tokens", "see data trace"))


class _Printer:
    """Prints samples as text."""

    def __init__(self, opened: Opened) -> None:
        if opened.corpora is None:
            raise _no_text()
        self._opened = opened
        tokenizer, config = opened.corpora.load_tokenizer(), opened.objective
        self._objective = config.build(opened.model, opened.data, opened.corpora)
        names = config.special_names(opened.model, tokenizer)
        self._coloured = sys.stdout.isatty()
        self._text = Spelling(tokenizer, names, _GREY) if self._coloured else Spelling(tokenizer, names)

    def print(self, title: str, sample: Sample) -> None:
        from llmtrain.data.datasets.base import EMPTY
        from llmtrain.data.loader import KEYS
        from llmtrain.data.stream import Origins
        from llmtrain.data.trace import parts_of

        opened = self._opened
        corpus = f"{sample.corpus}, " if sample.corpus else ""
        if sample.row == EMPTY:
            print(f"{title}: {corpus}epoch {sample.epoch}, left empty, since its tar file cannot be read\n")
            return
        raw = opened.sources[sample.corpus].get(np.array([sample.row]))
        source = opened.stream.names.index(sample.corpus)
        origins = Origins(*(np.array([number]) for number in (source, sample.epoch, sample.row)))
        batch = self._objective.collate({**raw, KEYS: opened.stream.keys(origins)})
        row = {name: tensor[0].numpy() for name, tensor in batch.items()}
        facts, lines = self._objective.show(row, raw, self._text, lambda: parts_of(opened.sources, sample))
        print(f"{title}: {corpus}epoch {sample.epoch}, row {sample.row}, {facts}")
        for line in lines:
            self._print_line(line.rstrip())
        print(flush=True)

    def _print_line(self, line: str) -> None:
        if not self._coloured:
            print(line)
            return
        line = escape_controls(line).replace(_GREY[0], "\x1b[90m").replace(_GREY[1], "\x1b[0m")
        print(line, file=unescaped(sys.stdout), flush=True)
