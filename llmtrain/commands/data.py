"""`llmtrain data VERB`: which documents made a step of a run, what they say, and one hash over all that a
run consumed. In one process and without a GPU; nothing of a run is changed.

A run's stream is a pure function of what data.json in its folder tells, so it is computed again and not
kept; the data_digest that every step recorded proves that what is read now is what was read then.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import yaml

from llmtrain.config import decode, encode, require
from llmtrain.data.mixture import Segment, Timeline, begin
from llmtrain.data.train_config import ImageDataConfig, TokenDataConfig, data_config_type
from llmtrain.data.transport import is_remote
from llmtrain.errors import CheckpointError, ConfigError, DataError, Problem
from llmtrain.families import family_of, model_config_type, open_data, open_sources
from llmtrain.files import disk_problem, write_atomically
from llmtrain.models.bert_config import BertConfig
from llmtrain.models.config import GPTConfig
from llmtrain.models.configs import ModelConfig
from llmtrain.track.jsonl import read_metrics
from llmtrain.train.streaming import open_stream, source_shares

if TYPE_CHECKING:
    from llmtrain.data.corpora import Corpora
    from llmtrain.data.datasets import Dataset
    from llmtrain.data.stream import Skipped, Stream
    from llmtrain.data.trace import Sample

DIFFERENT = 1
"""Exit code of `trace` when what is read now is not what the run recorded."""
METRICS = "metrics.jsonl"
T = TypeVar("T")


@dataclass(frozen=True)
class MovedConfig:
    """Where a run's corpora are now; what is left out is where the run found it."""

    path: str | None = None
    sources: Mapping[str, str] = field(default_factory=dict)


# trace


@dataclass(frozen=True)
class TraceConfig:
    run: Path
    step: str
    """N, or FIRST:LAST, both with it."""
    output: Path | None = None
    """A file for one JSON object a document; null: a table is printed."""
    data: MovedConfig = field(default_factory=MovedConfig)


def trace(mapping: Mapping[str, Any]) -> int:
    """A line for each document of the steps, then what their digests say; → exit code.

    Raises UserError for whatever a user can mend.
    """
    from llmtrain.data.trace import digest_of, parts_of, samples_of

    config = decode(TraceConfig, mapping)
    steps = _steps(config.step)
    run = Run(config.run, config.data)
    run.check_reached(steps)
    records: list[dict[str, Any]] = []
    verdicts: list[str] = []
    code = 0
    for step in steps:
        opened = run.open(step)
        skipped = opened.skipped(step)
        for sample in samples_of(opened.stream, step, skipped):
            facts = dataclasses.asdict(sample)
            parts = parts_of(opened.sources, sample)
            records += [{**facts, **dataclasses.asdict(part)} for part in parts] or [facts]
        found, recorded = digest_of(opened.stream, step, skipped), run.digests.get(step)
        verdict = f"step {step}: data_digest {found}, "
        if recorded is None:
            verdict += "none was recorded"
        elif found == recorded:
            verdict += "as recorded"
        else:
            verdict += f"recorded was {recorded}: these are not the data that the run read"
            code = DIFFERENT
        verdicts.append(verdict)
    if config.output is not None:
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        try:
            write_atomically(config.output, lines)
        except OSError as error:
            raise ConfigError(disk_problem(error, config.output, key="output")) from error
    else:
        _print_table(records)
    print("\n".join(verdicts), flush=True)
    return code


def _print_table(records: Sequence[Mapping[str, Any]]) -> None:
    """Columns that say nothing are left out: the corpus of a run over one, documents of images."""
    from llmtrain.data.datasets import EMPTY

    columns = {
        "step": len({record["step"] for record in records}) > 1,
        "sample": True,
        "corpus": any(record["corpus"] for record in records),
        "epoch": True,
        "row": True,
        "shard": any("shard" in record for record in records),
        "document": any("document" in record for record in records),
        "tokens": any("tokens" in record for record in records),
    }
    names = [name for name, is_shown in columns.items() if is_shown]
    rows = [names]
    for record in records:
        cells = {name: str(record.get(name, "")) for name in names}
        if record["row"] == EMPTY:
            cells["row"] = "skipped"
        if "shard" in record:
            cells["shard"] = PurePosixPath(record["shard"]).name
        rows.append(list(cells.values()))
    widths = [max(len(row[i]) for row in rows) for i in range(len(names))]
    is_text = [name in ("corpus", "shard") for name in names]
    for row in rows:
        cells_of = zip(row, widths, is_text, strict=True)
        print("  ".join(c.ljust(w) if text else c.rjust(w) for c, w, text in cells_of).rstrip())


# show


@dataclass(frozen=True)
class ShowConfig:
    run: Path | None
    data: TokenDataConfig | ImageDataConfig | MovedConfig
    step: str = "1"
    sequence_length: int = 256
    seed: int = 0
    max_samples: int = 4

    def problems(self) -> Iterator[Problem]:
        yield from require(self.max_samples >= 1, "max_samples", self.max_samples, "1 or more")
        yield from require(self.sequence_length >= 1, "sequence_length", self.sequence_length, "1 or more")
        yield from require(self.seed >= 0, "seed", self.seed, "0 or more")


def show(mapping: Mapping[str, Any]) -> None:
    """Samples as text, each document by itself, with marks around what bears no loss.

    Raises UserError for whatever a user can mend.
    """
    from llmtrain.data.trace import samples_of

    if mapping.get("run") is not None:
        config = decode(ShowConfig, _of_a_run(mapping), {"data": lambda _: MovedConfig})
        assert config.run is not None
        assert isinstance(config.data, MovedConfig)
        run = Run(config.run, config.data)
        steps = _steps(config.step)
        run.check_reached(steps)
        shown = config.max_samples
        for step in steps:
            opened = run.open(step)
            printer = _Printer(opened)
            for sample in samples_of(opened.stream, step, opened.skipped(step)):
                if shown == 0:
                    return
                printer.print(f"step {step}, sample {sample.sample}", sample)
                shown -= 1
        return
    section = mapping.get("data", {})
    if not section.get("path") and not section.get("mixture"):
        remedy = "give run=… or data.path=…"
        raise ConfigError(Problem("run", "nothing", "a run folder, or a corpus in data.path", remedy))
    if mapping.get("step") is not None:
        raise ConfigError(Problem("step", str(mapping["step"]), "nothing without a run", "give run=…"))
    config = decode(ShowConfig, _without_nulls(mapping), {"data": data_config_type})
    assert not isinstance(config.data, MovedConfig)
    opened = _open_fresh(config.data, config.sequence_length, config.seed, config.max_samples)
    printer = _Printer(opened)
    for sample in samples_of(opened.stream, 1, opened.skipped(1)):
        printer.print(f"sample {sample.sample}", sample)


def _without_nulls(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Keys left at null have the defaults of ShowConfig, but for `run`."""
    return {key: value for key, value in mapping.items() if value is not None or key == "run"}


def _of_a_run(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with what still says something beside a run; raises ConfigError for the rest."""
    problems = []
    remedy = "leave it out, or leave out run=…"
    allowed = "what the run had"
    section = mapping["data"]
    defaults = encode(TokenDataConfig())
    moved = [item.name for item in dataclasses.fields(MovedConfig)]
    for key in ("sequence_length", "seed"):
        if mapping.get(key) is not None:
            problems.append(Problem(key, str(mapping[key]), allowed, remedy))
    for key, value in section.items():
        if key not in moved and key not in ("kind", "cache") and value != defaults.get(key):
            problems.append(Problem(f"data.{key}", str(value), allowed, remedy))
    if problems:
        raise ConfigError(problems)
    kept = {key: value for key, value in section.items() if key in moved}
    return {**_without_nulls(mapping), "data": kept}


class _Printer:
    """Prints samples as text."""

    def __init__(self, opened: Opened) -> None:
        from llmtrain.data.tokenizer import load_tokenizer

        if opened.corpora is None:
            raise ConfigError(Problem("data.kind", "images, which have no text", "tokens", "see data trace"))
        self._opened = opened
        self._tokenizer = load_tokenizer(opened.corpora.tokenizer_path)
        self._objective = family_of(opened.model).objective(opened.model, opened.data)

    def print(self, title: str, sample: Sample) -> None:
        from llmtrain.data.datasets import EMPTY
        from llmtrain.data.trace import parts_of
        from llmtrain.models.head import IGNORE_INDEX

        corpus = f"{sample.corpus}, " if sample.corpus else ""
        if sample.row == EMPTY:
            print(f"{title}: {corpus}epoch {sample.epoch}, left empty, since its shard cannot be read\n")
            return
        raw = self._opened.sources[sample.corpus].get(np.array([sample.row]))
        if isinstance(self._opened.model, BertConfig):
            self._print_masked(f"{title}: {corpus}epoch {sample.epoch}, row {sample.row}", sample, raw)
            return
        labels_T = self._objective.collate(raw)["labels"][0].numpy()
        tokens_W = raw["tokens"][0]
        # The first token of a row has nothing before it in the row.
        bears_loss_W = np.concatenate([[False], labels_T != IGNORE_INDEX])
        bears = int(bears_loss_W.sum())
        print(f"{title}: {corpus}epoch {sample.epoch}, row {sample.row}, {bears} tokens with loss")
        place = 0
        for part in parts_of(self._opened.sources, sample):
            here = slice(place, place + part.tokens)
            place += part.tokens
            shard = PurePosixPath(part.shard).name
            print(f"  document {part.document} of {shard}, {part.tokens} tokens")
            for line in self._text(tokens_W[here], bears_loss_W[here]).split("\n"):
                print(f"    {line}".rstrip())
        if place < len(tokens_W):
            print(f"  padding, {len(tokens_W) - place} tokens without loss")
        print(flush=True)

    def _print_masked(self, title: str, sample: Sample, raw: dict[str, np.ndarray]) -> None:
        """The row as the model sees it, with what it is asked for."""
        from llmtrain.data.loader import KEYS
        from llmtrain.data.stream import Places
        from llmtrain.models.head import IGNORE_INDEX

        stream, model = self._opened.stream, self._opened.model
        assert isinstance(model, BertConfig)
        source = stream.names.index(sample.corpus)
        places = Places(*(np.array([number]) for number in (source, sample.epoch, sample.row)))
        batch = self._objective.collate({**raw, KEYS: stream.keys(places)})
        tokens_T, labels_T = batch["tokens"][0].numpy(), batch["labels"][0].numpy()
        length = len(tokens_T)
        if "documents" in batch:
            length = int((batch["documents"][0] >= 0).sum())
        asked = int((labels_T != IGNORE_INDEX).sum())
        pair = f", pair {int(batch['pair_labels'][0])}" if "pair_labels" in batch else ""
        print(f"{title}, {length} tokens, {asked} of them asked for{pair}")
        special = dict(zip(model.special_ids, ("[MASK]", "[CLS]", "[SEP]"), strict=True))
        is_text_T = (labels_T == IGNORE_INDEX) & ~np.isin(tokens_T, list(special))
        text, place = "", 0
        while place < length:
            run = place
            while run < length and is_text_T[run]:
                run += 1
            text += self._tokenizer.decode(tokens_T[place:run].tolist())
            if run < length:
                shown = special.get(int(tokens_T[run])) or self._tokenizer.decode([int(tokens_T[run])])
                asked_for = labels_T[run] != IGNORE_INDEX
                text += f"⟦{shown}→{self._tokenizer.decode([int(labels_T[run])])}⟧" if asked_for else shown
            place = run + 1
        for line in text.split("\n"):
            print(f"    {line}".rstrip())
        print(flush=True)

    def _text(self, tokens: np.ndarray, bears_loss: np.ndarray) -> str:
        borders = np.flatnonzero(np.diff(bears_loss)) + 1
        text = ""
        for run in np.split(np.arange(len(tokens)), borders):
            decoded = self._tokenizer.decode(tokens[run].tolist())
            text += decoded if bears_loss[run[0]] else f"⟦{decoded}⟧"
        return text


# digest


@dataclass(frozen=True)
class DigestConfig:
    run: Path
    steps: int | None = None
    """null: all that are recorded."""

    def problems(self) -> Iterator[Problem]:
        yield from require(self.steps is None or self.steps >= 1, "steps", self.steps, "1 or more, or null")


def digest(mapping: Mapping[str, Any]) -> None:
    """One hash over what the run's first steps consumed, the same for whoever consumed the same.

    Raises UserError where steps are not recorded.
    """
    from llmtrain.data.trace import hash_digests

    config = decode(DigestConfig, mapping)
    path = config.run / METRICS
    digests = _recorded(config.run)
    if not digests:
        raise CheckpointError(Problem(str(path), "no step with a data_digest", "a run of llmtrain train"))
    last = config.steps if config.steps is not None else max(digests)
    missing = [step for step in range(1, last + 1) if step not in digests]
    if missing:
        got = f"no data_digest of {_spans(missing)}"
        raise CheckpointError(Problem(str(path), got, f"one of each step from 1 to {last}"))
    together = hash_digests((step, digests[step]) for step in range(1, last + 1))
    print(f"{together}  steps 1 to {last}", flush=True)


def _spans(steps: Sequence[int]) -> str:
    """Ascending numbers, neighbours together: step 3, 5 to 8."""
    spans: list[list[int]] = []
    for step in steps:
        if spans and step == spans[-1][1] + 1:
            spans[-1][1] = step
        else:
            spans.append([step, step])
    told = [str(first) if first == last else f"{first} to {last}" for first, last in spans]
    return ("step " if len(steps) == 1 else "steps ") + ", ".join(told)


# a run's folder


@dataclass(frozen=True)
class Opened:
    """A stream with what it reads."""

    stream: Stream
    sources: Mapping[str, Dataset]
    corpora: Corpora | None
    data: TokenDataConfig | ImageDataConfig
    model: ModelConfig

    def skipped(self, step: int) -> Skipped:
        """The shards that `step` leaves out, as they are now."""
        # Nothing else needs more of a corpus than the step's own rows.
        is_asked = getattr(self.data, "on_bad_shard", "error") == "skip"
        return self.stream.enter(step - 1) if is_asked else frozenset()


class Run:
    """What a run's folder tells of its data."""

    def __init__(self, path: Path, moved: MovedConfig) -> None:
        """moved: where corpora are now. Raises CheckpointError for a folder that tells too little."""
        self.path = path
        self._moved = moved
        self._config = _read(path, "config.yaml", yaml.safe_load, yaml.YAMLError)
        self._data = _read(path, "data.json", json.loads, ValueError)
        self._folder = _read(path, "environment.json", json.loads, ValueError)["folder"]
        if "timeline" not in self._data:
            got = "a run of before streams were recorded"
            raise CheckpointError(Problem(str(path / "data.json"), got, "a timeline"))
        self._timeline = Timeline.decode(self._data["timeline"])
        self.digests = _recorded(path)
        self._opened: tuple[Segment, Opened] | None = None

    def check_reached(self, steps: range) -> None:
        """Raise ConfigError unless all of these steps were made."""
        is_recorded = (self.path / METRICS).exists()
        last = max(self.digests, default=0) if is_recorded else self._config["train"]["steps"]
        if steps[-1] > last:
            allowed = f"1 to {last:,}, the steps that {self.path} has made" if last else "none was made yet"
            raise ConfigError(Problem("step", f"{steps[-1]:,}", allowed))

    def open(self, step: int) -> Opened:
        """The stream that `step` came from; what was opened for the step before is used again.

        Raises UserError for corpora that cannot be had, or that are others than then.
        """
        from llmtrain.data.trace import until

        timeline = until(self._timeline, step)
        segment = timeline.segments[-1]
        if self._opened is None or self._opened[0] != segment:
            data = self._data_config(segment)
            model: ModelConfig = decode(model_config_type(self._config["model"]), self._config["model"])
            corpora = open_data(data)
            sources = open_sources(model, data, corpora, "train", segment.settings.get("sequence_length", 1))
            self._check_same(data, segment, sources)
            seed = segment.settings["seed"]
            stream = open_stream(data, sources, timeline, seed=seed)
            self._opened = segment, Opened(stream, sources, corpora, data, model)
        return self._opened[1]

    def _data_config(self, segment: Segment) -> TokenDataConfig | ImageDataConfig:
        """The run's own, as it was in `segment`."""
        section = dict(self._config["data"])
        kind = data_config_type(section)
        if kind is ImageDataConfig:
            return decode(ImageDataConfig, {**section, "path": self._moved.path or self._data["paths"][""]})
        names = list(segment.shares)
        if unknown := sorted(set(self._moved.sources) - set(names)):
            raise ConfigError(
                Problem(
                    f"data.sources.{unknown[0]}", "no corpus of this step", ", ".join(filter(None, names))
                )
            )
        ordering = ("packing", "overlap", "shuffle_shards", "drop_last")
        section |= {name: segment.settings[name] for name in ordering}
        section["curriculum"] = ()
        if names == [""]:
            section |= {"path": self._place(""), "mixture": None, "sources": {}}
        else:
            places = {name: self._place(name) for name in names}
            section |= {"path": None, "mixture": dict.fromkeys(names, 1.0), "sources": places}
        return decode(TokenDataConfig, section)

    def _place(self, name: str) -> str:
        """Where a corpus is now."""
        moved = self._moved
        if name in moved.sources:
            return moved.sources[name]
        if moved.path:
            return moved.path if name == "" else f"{moved.path.rstrip('/')}/{name}"
        path = self._data["paths"].get(name)
        if path is None:
            remedy = f"give data.sources.{name}=…"
            raise ConfigError(
                Problem(f"data.sources.{name}", "nothing", "the place of a corpus that left the run", remedy)
            )
        if is_remote(path) or Path(path).expanduser().exists():
            return path
        return str(Path(self._folder) / path)

    def _check_same(
        self, data: TokenDataConfig | ImageDataConfig, segment: Segment, sources: Mapping[str, Dataset]
    ) -> None:
        recorded = segment.settings["fingerprints"]
        places = {"": data.path} if isinstance(data, ImageDataConfig) else data.paths
        problems = [
            Problem(
                str(places[name]),
                "other data than those of the step (another fingerprint)",
                "the corpus that the run read, unchanged",
                f"give its place: {f'data.sources.{name}' if name else 'data.path'}=…",
            )
            for name, dataset in sources.items()
            if dataset.fingerprint != recorded[name]
        ]
        if problems:
            raise DataError(problems)


def _open_fresh(
    data: TokenDataConfig | ImageDataConfig, sequence_length: int, seed: int, num_samples: int
) -> Opened:
    """A stream's beginning, of one step, without a run."""
    model = GPTConfig(vocab_size=None)
    corpora = open_data(data)
    sources = open_sources(model, data, corpora, "train", sequence_length)
    timeline = begin(num_samples, source_shares(data, sources, 0), {})
    if isinstance(data, TokenDataConfig):
        # What an epoch's end leaves out depends on the samples of a step, of which there are none here.
        data = dataclasses.replace(data, drop_last=False)
    stream = open_stream(data, sources, timeline, seed=seed)
    return Opened(stream, sources, corpora, data, model)


def _recorded(run: Path) -> dict[int, int]:
    """Step → data_digest, as the run's metrics tell last."""
    if not run.is_dir():
        raise CheckpointError(Problem(str(run), "no such folder", "the folder of a run"))
    records = read_metrics(run / METRICS)
    return {record["step"]: record["data_digest"] for record in records if "data_digest" in record}


def _read(run: Path, name: str, parse: Any, failure: type[Exception]) -> dict[str, Any]:
    """A file of a run's folder. Raises CheckpointError where there is none."""
    path = run / name
    if not run.is_dir():
        raise CheckpointError(Problem(str(run), "no such folder", "the folder of a run"))
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        got = f"a folder without {name}"
        raise CheckpointError(Problem(str(run), got, "the folder of a run of llmtrain train")) from None
    except (OSError, failure) as error:
        raise CheckpointError(Problem(str(path), f"an unreadable file ({error})")) from error
    if not isinstance(content, dict):
        raise CheckpointError(Problem(str(path), "no section of keys", "what llmtrain train wrote"))
    return content


def _steps(text: str) -> range:
    """N or FIRST:LAST. Raises ConfigError for anything else."""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    first = int(match[1]) if match else 0
    last = int(match[2] or first) if match else 0
    if not 1 <= first <= last:
        raise ConfigError(Problem("step", repr(text), "N, or FIRST:LAST, from 1 on"))
    return range(first, last + 1)
