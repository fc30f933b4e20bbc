"""`llmtrain data show`: samples as text, of a run or of a corpus, as the model sees them.

What an objective hides stands in ⟦ ⟧ with what is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtrain.commands.data_runs import MovedConfig, Opened, Run, steps_of
from llmtrain.commands.vocabulary import resolve_vocabulary
from llmtrain.config import decode, encode, require
from llmtrain.corpus.config import ImageDataConfig, TokenDataConfig, data_config_type
from llmtrain.data.mixture import begin
from llmtrain.errors import ConfigError, Problem, UserError
from llmtrain.families import (
    corpora_problems,
    data_problems,
    family_of,
    model_config_type,
    objective_family,
    open_data,
    open_sources,
)
from llmtrain.models.bert.config import BertConfig
from llmtrain.models.configs import ModelConfig
from llmtrain.models.encoder_decoder.config import Seq2SeqConfig
from llmtrain.models.xlnet.config import XLNetConfig
from llmtrain.train.streaming import open_stream, source_shares

if TYPE_CHECKING:
    from llmtrain.data.trace import Sample

_CONTEXT = 8
"""So many tokens before others tell how these are written: with a space, or as the rest of a character."""

Shown = tuple[str, list[str]]
"""What the title says of a sample, and its lines."""


@dataclass(frozen=True)
class ShowConfig:
    run: Path | None
    data: TokenDataConfig | ImageDataConfig | MovedConfig
    step: str | None = None
    """N, or FIRST:LAST, of a run; null: 1."""
    sequence_length: int = 256
    seed: int = 0
    max_samples: int = 4

    def problems(self) -> Iterator[Problem]:
        yield from require(self.max_samples >= 1, "max_samples", self.max_samples, "1 or more")
        yield from require(self.sequence_length >= 1, "sequence_length", self.sequence_length, "1 or more")
        yield from require(self.seed >= 0, "seed", self.seed, "0 or more")


def show(mapping: Mapping[str, Any]) -> None:
    """Print samples as text. Raises UserError for whatever a user can mend."""
    from llmtrain.data.trace import samples_of

    given = dict(mapping)
    section = given.pop("model", None) or {}
    if given.get("run") is not None:
        config = decode(ShowConfig, _of_a_run(given, section), {"data": lambda _: MovedConfig})
        assert config.run is not None
        assert isinstance(config.data, MovedConfig)
        run = Run(config.run, config.data)
        steps = steps_of(config.step or "1")
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
    data = given.get("data", {})
    if not data.get("path") and not data.get("mixture"):
        remedy = "give run=… or data.path=…"
        raise ConfigError(Problem("run", "nothing", "a run folder, or a corpus in data.path", remedy))
    if given.get("step") is not None:
        raise ConfigError(Problem("step", str(given["step"]), "nothing without a run", "give run=…"))
    config = decode(ShowConfig, _without_nulls(given), {"data": data_config_type})
    opened = _open_fresh(config, section.get("objective") or {})
    printer = _Printer(opened)
    for sample in samples_of(opened.stream, 1, opened.skipped(1)):
        printer.print(f"sample {sample.sample}", sample)


def _without_nulls(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Keys left at null have the defaults of ShowConfig, but for `run`."""
    return {key: value for key, value in mapping.items() if value is not None or key == "run"}


def _of_a_run(mapping: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
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
    if model:
        problems.append(Problem("objective", "one of its own", allowed, remedy))
    for key, value in section.items():
        if key not in moved and key != "kind" and value != defaults.get(key):
            problems.append(Problem(f"data.{key}", str(value), allowed, remedy))
    if problems:
        raise ConfigError(problems)
    kept = {key: value for key, value in section.items() if key in moved}
    return {**_without_nulls(mapping), "data": kept}


def _open_fresh(config: ShowConfig, objective: Mapping[str, Any]) -> Opened:
    """A stream's beginning, of one step, without a run. Raises UserError for an objective that the corpora
    do not fit."""
    data = config.data
    assert not isinstance(data, MovedConfig)
    family = objective_family(objective) if objective else "gpt"
    if family is None:
        got = f"keys that no objective has together: {', '.join(sorted(objective))}"
        raise ConfigError(Problem("objective", got, remedy="give objective=…, one of conf/objective/"))
    section = {"family": family} | ({"objective": objective} if objective else {})
    try:
        model: ModelConfig = decode(model_config_type(section), section)
    except UserError as error:
        raise ConfigError(problem.within("model") for problem in error.problems) from error
    problems = [] if isinstance(data, ImageDataConfig) else data_problems(model, data)
    if isinstance(model, Seq2SeqConfig):
        for problem in model.objective.length_problems(config.sequence_length):
            problems.append(dataclasses.replace(problem, where=problem.where.removeprefix("batch.")))
    corpora = open_data(data)
    problems += corpora_problems(model, corpora)
    if problems:
        raise ConfigError(problems)
    model = resolve_vocabulary(model, corpora)
    sources = open_sources(model, data, corpora, "train", config.sequence_length)
    timeline = begin(config.max_samples, source_shares(data, sources, 0), {})
    if isinstance(data, TokenDataConfig):
        # What an epoch's end leaves out depends on the samples of a step, of which there are none here.
        data = dataclasses.replace(data, drop_last=False)
    stream = open_stream(data, sources, timeline, seed=config.seed)
    return Opened(stream, sources, corpora, data, model)


class _Printer:
    """Prints samples as text."""

    def __init__(self, opened: Opened) -> None:

        if opened.corpora is None:
            raise ConfigError(Problem("data.kind", "images, which have no text", "tokens", "see data trace"))
        self._opened = opened
        self._tokenizer = opened.corpora.load_tokenizer()
        self._objective = family_of(opened.model).objective(opened.model, opened.data)
        self._names = self._special_names()

    def print(self, title: str, sample: Sample) -> None:
        from llmtrain.data.datasets.base import EMPTY
        from llmtrain.data.loader import KEYS
        from llmtrain.data.stream import Origins

        corpus = f"{sample.corpus}, " if sample.corpus else ""
        if sample.row == EMPTY:
            print(f"{title}: {corpus}epoch {sample.epoch}, left empty, since its shard cannot be read\n")
            return
        raw = self._opened.sources[sample.corpus].get(np.array([sample.row]))
        stream = self._opened.stream
        source = stream.names.index(sample.corpus)
        places = Origins(*(np.array([number]) for number in (source, sample.epoch, sample.row)))
        batch = self._objective.collate({**raw, KEYS: stream.keys(places)})
        row = {name: tensor[0].numpy() for name, tensor in batch.items()}
        model = self._opened.model
        if isinstance(model, BertConfig):
            facts, lines = self._masked(row)
        elif isinstance(model, Seq2SeqConfig):
            facts, lines = self._pairs(row)
        elif isinstance(model, XLNetConfig):
            facts, lines = self._permuted(row)
        else:
            facts, lines = self._documents(sample, row["labels"], raw["tokens"][0])
        print(f"{title}: {corpus}epoch {sample.epoch}, row {sample.row}, {facts}")
        for line in lines:
            print(line.rstrip())
        print(flush=True)

    def _documents(self, sample: Sample, labels_T: np.ndarray, tokens_W: np.ndarray) -> Shown:
        """Each document by itself, with marks around what bears no loss."""
        from llmtrain.data.trace import parts_of
        from llmtrain.nn.head import IGNORE_INDEX

        # The first token of a row has nothing before it in the row.
        bears_loss_W = np.concatenate([[False], labels_T != IGNORE_INDEX])
        lines, place = [], 0
        for part in parts_of(self._opened.sources, sample):
            here = slice(place, place + part.tokens)
            place += part.tokens
            shard = PurePosixPath(part.shard).name
            lines.append(f"  document {part.document} of {shard}, {part.tokens} tokens")
            lines += _indented(self._with_marks(tokens_W[here], bears_loss_W[here]))
        if place < len(tokens_W):
            lines.append(f"  padding, {len(tokens_W) - place} tokens without loss")
        return f"{int(bears_loss_W.sum())} tokens with loss", lines

    def _with_marks(self, tokens: np.ndarray, bears_loss: np.ndarray) -> str:
        borders = np.flatnonzero(np.diff(bears_loss)) + 1
        text = ""
        for run in np.split(np.arange(len(tokens)), borders):
            decoded = self._tokenizer.decode(tokens[run].tolist())
            text += decoded if bears_loss[run[0]] else f"⟦{decoded}⟧"
        return text

    def _masked(self, row: Mapping[str, np.ndarray]) -> Shown:
        """The row with what is asked for where tokens are hidden; documents, and texts of a pair, apart."""
        from llmtrain.nn.head import IGNORE_INDEX

        model = self._opened.model
        assert isinstance(model, BertConfig)
        tokens, labels = row["tokens"], row["labels"]
        documents = row.get("documents", np.zeros(len(tokens), np.int32))
        asked = labels != IGNORE_INDEX
        marked = {
            place: f"⟦{self._name(tokens[place])}→{self._name(labels[place])}⟧"
            for place in np.flatnonzero(asked).tolist()
        }
        facts = f"{int((documents >= 0).sum())} tokens, {int(asked.sum())} of them asked for"
        lines = []
        if "pair_labels" in row:
            label = int(row["pair_labels"])
            meanings = {
                "next_sentence": ("the second follows the first", "the second is of another document"),
                "sentence_order": ("in their order", "the second came first"),
            }[model.objective.pairs]
            facts += f", pair {label}: {meanings[label]}"
            documents = np.where(documents >= 0, row["segments"], documents)
        for number in range(int(documents.max(initial=-1)) + 1):
            places = np.flatnonzero(documents == number)
            within = {i: marked[place] for i, place in enumerate(places.tolist()) if place in marked}
            lines += _indented(self._spell(tokens[places], within))
        return facts, lines

    def _permuted(self, row: Mapping[str, np.ndarray]) -> Shown:
        """The row, each predicted token with its place in the order in which they are predicted."""
        tokens, order = row["tokens"], row["order"]
        documents = row.get("documents", np.zeros(len(tokens), np.int32))
        asked = order > 0
        ranks = {place: rank for rank, place in enumerate(np.argsort(order[asked], kind="stable"), 1)}
        ordered = {place: ranks[i] for i, place in enumerate(np.flatnonzero(asked).tolist())}
        facts = f"{int((documents >= 0).sum())} tokens, {len(ordered)} of them predicted"
        lines = []
        for number in range(int(documents.max(initial=-1)) + 1):
            places = np.flatnonzero(documents == number)
            marked = {
                i: f"⟦{ordered[place]}: {self._name(tokens[place])}⟧"
                for i, place in enumerate(places.tolist())
                if place in ordered
            }
            lines += _indented(self._spell(tokens[places], marked))
        return facts, lines

    def _pairs(self, row: Mapping[str, np.ndarray]) -> Shown:
        """Each pair's source and target."""
        sources, targets = row["sources"], row["labels"]
        source_documents = row.get("source_documents", np.zeros(len(sources), np.int32))
        documents = row.get("documents", np.zeros(len(targets), np.int32))
        pairs = int(source_documents.max(initial=-1)) + 1
        lines = []
        for pair in range(pairs):
            if pairs > 1:
                lines.append(f"  pair {pair}")
            for side, tokens, numbers in (
                ("source", sources, source_documents),
                ("target", targets, documents),
            ):
                text = self._spell(tokens[numbers == pair], {})
                lines += _indented(text, f"{side}  ")
        counts = int((source_documents >= 0).sum()), int((documents >= 0).sum())
        named = f", {pairs} pairs" if pairs > 1 else ""
        return f"{counts[0]} tokens of source, {counts[1]} of target{named}", lines

    def _spell(self, tokens: np.ndarray, marked: Mapping[int, str]) -> str:
        """Tokens as text, special ones by their names, those at the `marked` places as these say."""
        ids = tokens.tolist()
        shown = dict(marked)
        shown |= {i: self._names[t] for i, t in enumerate(ids) if t in self._names and i not in marked}
        text, start = "", 0
        for place in [*sorted(shown), len(ids)]:
            before = [ids[i] for i in range(max(0, start - _CONTEXT), start) if i not in shown]
            text += self._tokenizer.decode_after(before, ids[start:place])
            text += shown.get(place, "")
            start = place + 1
        return text

    def _name(self, token: int) -> str:
        return self._names.get(int(token)) or self._tokenizer.decode([int(token)])

    def _special_names(self) -> dict[int, str]:
        model, corpora = self._opened.model, self._opened.corpora
        assert corpora is not None
        if isinstance(model, BertConfig):
            return dict(zip(model.special_ids, ("[MASK]", "[CLS]", "[SEP]"), strict=True))
        if not isinstance(model, Seq2SeqConfig):
            return {}
        names = {corpora.eos_id: self._tokenizer.pieces()[corpora.eos_id]}
        if model.mask_id is not None:
            names[model.mask_id] = "[MASK]"
        if model.sentinel_id is not None:
            names |= {model.sentinel_id - i: f"<extra_{i}>" for i in range(model.objective.num_sentinels)}
        return names


def _indented(text: str, head: str = "") -> list[str]:
    """The text's lines, the first behind `head`."""
    first, *others = text.split("\n")
    return [f"    {head}{first}", *(f"    {' ' * len(head)}{line}" for line in others)]
