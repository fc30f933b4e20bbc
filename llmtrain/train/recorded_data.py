"""Reopen the stream of a run's samples from what the run folder records."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llmtrain.config import LARGEST_INT, decode
from llmtrain.corpus import packages
from llmtrain.corpus.config import CacheConfig
from llmtrain.corpus.transport import is_remote
from llmtrain.data.config import DataConfig, data_config_type
from llmtrain.data.mixture import Segment, Timeline, timeline_problems
from llmtrain.data.streaming import Order, open_stream
from llmtrain.errors import CheckpointError, ConfigError, DataError, Problem
from llmtrain.files import expand_home
from llmtrain.models.registry import family_of, model_config_type
from llmtrain.nn.model_config import ModelConfig
from llmtrain.objectives.base import ObjectiveConfig
from llmtrain.objectives.older import run_with_objective
from llmtrain.objectives.reading import open_data
from llmtrain.objectives.registry import objective_config_type
from llmtrain.reading import parse_object, parse_yaml, read_decoded
from llmtrain.report.record import METRICS, RECORD_BYTES
from llmtrain.track.events import EVENTS, read_events, skipped_steps
from llmtrain.track.jsonl import read_metrics

if TYPE_CHECKING:
    from llmtrain.corpus.text_source import TextSource
    from llmtrain.data.datasets.base import Dataset
    from llmtrain.data.stream import Skipped, Stream

T = TypeVar("T")


@dataclass(frozen=True)
class MovedConfig:
    """Locations of corpora that were moved since the run; others are where the run read them."""

    path: str | None = None
    """The corpus; for a mixture, the folder or URL that holds its corpora; null: where the run read it."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Corpus of a mixture → its path. A URL that only the run folder names is not fetched."""
    cache: CacheConfig = field(default_factory=CacheConfig)


@dataclass(frozen=True)
class _Train:
    steps: int


@dataclass(frozen=True)
class _Config:
    """The part of config.yaml that is read."""

    data: Mapping[str, Any]
    model: Mapping[str, Any]
    train: _Train
    objective: Mapping[str, Any] | None = None
    """None: the default objective of the model's family."""


@dataclass(frozen=True)
class _Environment:
    folder: str


@dataclass(frozen=True)
class _Data:
    """The part of data.json that is read."""

    timeline: tuple[Segment, ...] | None = None
    paths: Mapping[str, str] = field(default_factory=dict)

    def problems(self) -> Iterator[Problem]:
        if self.timeline is not None:
            yield from timeline_problems(self.timeline)


@dataclass(frozen=True)
class Opened:
    """A stream and the data that it reads."""

    stream: Stream
    sources: Mapping[str, Dataset]
    corpora: TextSource | None
    data: DataConfig
    model: ModelConfig
    objective: ObjectiveConfig

    def skipped(self, step: int) -> Skipped:
        """Return the tar files that `step` skips in their present state."""
        # Otherwise nothing but the rows of the step has to be read.
        is_asked = self.data.on_bad_tar == "skip"
        return self.stream.enter(step - 1) if is_asked else frozenset()


class Run:
    """The recorded data of a run."""

    def __init__(self, path: Path, moved: MovedConfig) -> None:
        """moved: the present locations of corpora. Raise CheckpointError if the folder records too little."""
        self.path = path
        self._moved = moved
        self._config = _read(path, "config.yaml", _parse_config, _Config)
        self._data = _read(path, "data.json", parse_object, _Data)
        self._folder = _read(path, "environment.json", parse_object, _Environment).folder
        if self._data.timeline is None:
            got = "a run of before streams were recorded"
            raise CheckpointError(Problem(str(path / "data.json"), got, "a timeline"))
        self._timeline = Timeline(self._data.timeline)
        self.digests = recorded_digests(path)
        self.skipped = skipped_steps(read_events(path / EVENTS))
        """Step → why it was not taken."""
        self._opened: tuple[Segment, Opened] | None = None

    def left_out_before(self, step: int) -> range:
        """Return the samples that were left out just before `step` because the run went back; mostly none."""
        return self._timeline.left_out_before(step - 1)

    def check_reached(self, steps: range) -> None:
        """Raise ConfigError unless the run has made all of these steps."""
        is_recorded = (self.path / METRICS).exists()
        last = max(self.digests, default=0) if is_recorded else self._config.train.steps
        if steps[-1] > last:
            allowed = f"1 to {last:,}, the steps that {self.path} has made" if last else "none was made yet"
            raise ConfigError(Problem("step", f"{steps[-1]:,}", allowed))

    def open(self, step: int) -> Opened:
        """Return the stream of `step`; consecutive steps share what is opened.

        Raise UserError for corpora that cannot be read, or that have changed.
        """
        from llmtrain.data.trace import until

        timeline = until(self._timeline, step)
        segment = timeline.segments[-1]
        if self._opened is None or self._opened[0] != segment:
            settings = Order.of(segment, str(self.path / "data.json"))
            data = self._data_config(segment, settings)
            model: ModelConfig = self._decoded("model", model_config_type)
            usual = family_of(model).objective(model) if self._config.objective is None else {}
            objective: ObjectiveConfig = self._decoded("objective", objective_config_type, usual)
            corpora = open_data(objective, data, self.path)
            sources = objective.open(model, data, corpora, "train", settings.sequence_length)
            self._check_same(data, settings, sources)
            stream = open_stream(data, sources, timeline, seed=settings.seed)
            self._opened = segment, Opened(stream, sources, corpora, data, model, objective)
        return self._opened[1]

    def _data_config(self, segment: Segment, settings: Order) -> DataConfig:
        """Return the run's data config as it was in `segment`, with the present locations and cache."""
        section, names = self._config.data, list(segment.shares)
        if unknown := sorted(set(self._moved.sources) - set(names)):
            allowed = ", ".join(filter(None, names)) or "data.path, of a run with one source"
            raise ConfigError(Problem(f"data.sources.{unknown[0]}", "no corpus of this step", allowed))
        with self._blames_config("data"):
            kind = data_config_type(section)
        section = kind.reopened(section, names, settings, self._location, self._moved.cache)
        with self._blames_config("data"):
            return decode(kind, section)

    @contextmanager
    def _blames_config(self, name: str) -> Iterator[None]:
        """Raise errors of a section as a CheckpointError that names config.yaml."""
        try:
            yield
        except ConfigError as error:
            file = str(self.path / "config.yaml")
            raise CheckpointError(problem.of_file(file, name) for problem in error.problems) from error

    def _decoded(
        self, name: str, kind: Callable[[Mapping[str, Any]], type], changes: Mapping[str, Any] | None = None
    ) -> Any:
        """Return a section of the run's configuration. Raise CheckpointError if it is invalid."""
        section = {**(getattr(self._config, name) or {}), **(changes or {})}
        with self._blames_config(name):
            return decode(kind(section), section)

    def _location(self, name: str, recorded: str | None = None) -> str:
        """Return the present location of a source. recorded: where the run read it; None: see data.json."""
        moved = self._moved
        if name in moved.sources:
            return moved.sources[name]
        if moved.path:
            return moved.path if name == "" else f"{moved.path.rstrip('/')}/{name}"
        path = recorded or self._data.paths.get(name)
        if path is None:
            remedy = f"give data.sources.{name}=…"
            raise ConfigError(
                Problem(
                    f"data.sources.{name}", "nothing", "the location of a corpus that left the run", remedy
                )
            )
        if path.startswith(packages.PREFIX):
            return path
        if is_remote(path):
            # The URL was chosen by whoever made the folder.
            where = f"data.sources.{name}" if name else "data.path"
            got = f"{path}, which the run's folder names"
            allowed = "an address that you give, since what lies there is fetched"
            raise ConfigError(Problem(where, got, allowed, f"give {where}={path} if you trust it"))
        # Path.exists would raise for a name that is too long.
        if os.path.exists(expand_home(path)):
            return path
        return str(Path(self._folder) / path)

    def _check_same(self, data: DataConfig, settings: Order, sources: Mapping[str, Dataset]) -> None:
        recorded = settings.fingerprints
        locations = data.paths
        problems = [
            Problem(
                str(locations[name]),
                "other data than those of the step (another fingerprint)",
                "the corpus that the run read, unchanged",
                f"give its location: {f'data.sources.{name}' if name else 'data.path'}=…",
            )
            for name, dataset in sources.items()
            if dataset.fingerprint != recorded.get(name)
        ]
        if problems:
            raise DataError(problems)


def recorded_digests(run: Path) -> dict[int, int]:
    """Return step → data_digest from the run's metrics; the latest record of a step counts."""
    if not run.is_dir():
        raise CheckpointError(Problem(str(run), "no such folder", "the folder of a run"))
    try:
        return {
            record["step"]: record["data_digest"]
            for record in read_metrics(run / METRICS)
            if type(record.get("data_digest")) is int and abs(record["data_digest"]) <= LARGEST_INT
        }
    except OSError as error:
        got = f"an unreadable file ({error.strerror})"
        raise CheckpointError(Problem(str(run / METRICS), got, "what llmtrain train wrote")) from None


def _read(run: Path, name: str, parse: Callable[[bytes], dict[str, Any]], kind: type[T]) -> T:
    """Read a file of a run folder. Raise CheckpointError if there is none."""
    path = run / name
    if not run.is_dir():
        raise CheckpointError(Problem(str(run), "no such folder", "the folder of a run"))
    if not path.exists():
        got = f"a folder without {name}"
        raise CheckpointError(Problem(str(run), got, "the folder of a run of llmtrain train"))
    return read_decoded(kind, path, RECORD_BYTES, CheckpointError, "what llmtrain train wrote", parse=parse)


def _parse_config(content: bytes) -> dict[str, Any]:
    return run_with_objective(parse_yaml(content))


def steps_of(text: str) -> range:
    """Parse N or FIRST:LAST. Raise ConfigError for anything else."""
    match = re.fullmatch(r"([0-9]{1,18})(?::([0-9]{1,18}))?", text)
    first = int(match[1]) if match else 0
    last = int(match[2] or first) if match else 0
    if not 1 <= first <= last:
        raise ConfigError(Problem("step", repr(text), "N, or FIRST:LAST, from 1 on"))
    return range(first, last + 1)
