"""Classification by a prompt: the model's own head says which word answers it.

A template turns a row into a text with a place for the answer, a verbalizer turns labels into words (PET,
Schick and Schütze, arXiv:2001.07676; LM-BFF, Gao et al., arXiv:2012.15723). An encoder fills its mask token,
a decoder goes on with the text.

Dim names: B samples, C answers, R rows of a sample (1 or C), A tokens of the longest answer, T tokens of the
longest row, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from llmtrain.config import require
from llmtrain.errors import ConfigError, Problem
from llmtrain.labels import IGNORE_INDEX
from llmtrain.models.registry import family_of
from llmtrain.nn.model_config import Row
from llmtrain.nn.task_config import TaskHeadConfig
from llmtrain.objectives.base import DROPOUT_KEYS, Batch, ObjectiveConfig, Shown, SpecialIds, Terms, tensors
from llmtrain.objectives.classification import Classification
from llmtrain.objectives.fields import in_order, label_of, texts_of
from llmtrain.objectives.prompt_template import Piece, Template, parse
from llmtrain.objectives.shots import chosen_rows
from llmtrain.objectives.task import frame_of, trunk_ids, trunk_names
from llmtrain.tables.records import field_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from llmtrain.data.datasets.base import Dataset
    from llmtrain.data.datasets.prompts import Prompt, Prompts
    from llmtrain.data.trace import Part
    from llmtrain.objectives.text import Spelling
    from llmtrain.tables.build import Example
    from llmtrain.tables.config import TableDataConfig
    from llmtrain.tables.ragged import Column
    from llmtrain.tables.table import TableSplit
    from llmtrain.tokenizers.base import Tokenizer

SHOTS_SHARE = 0.75
"""The largest share of a sequence that shots take."""


@dataclass(frozen=True)
class PromptedConfig(ObjectiveConfig):
    """Predict a label by the word that the language model itself puts into a template."""

    teaches: ClassVar = ("encoder", "decoder")
    data: ClassVar = "table"
    labels_rows: ClassVar = True
    divides_sequences: ClassVar = False
    has_stages: ClassVar = False

    kind: Literal["prompted"] = "prompted"
    template: str = "{text} It was {answer}."
    """The prompt: fields of the row in braces, and the place of the answer. A decoder reads what precedes the
    answer."""
    verbalizer: Mapping[str, str] = field(default_factory=dict)
    """Label → the word that stands for it; of an encoder, one that is a single token."""
    shots: int = 0
    """Rows to train on that precede each prompt with their answers, the same for all; evaluation of decoders
    only."""
    shots_seed: int = 0
    """Seed of the choice of these rows, and of those of `calibration`, which takes the labels in turn."""
    calibration: int = 0
    """Rows to train on, others than the shots, that calibrate the scores: from each answer's score its mean
    over them is subtracted, so that all texts together favour none (arXiv:2102.09690, 2309.17249). Evaluation
    only."""
    separator: str = "\n\n"
    """Text between two prompts."""

    def problems(self) -> Iterator[Problem]:
        try:
            parse(self.template)
        except ValueError as error:
            allowed = "text with fields of the row in braces and one {answer}"
            yield Problem("template", f"{self.template!r}, {error}", allowed)
        got, remedy = dict(self.verbalizer), "give objective.verbalizer={negative: terrible, positive: great}"
        yield from require(len(got) >= 2, "verbalizer", got, "a word for each of two labels or more", remedy)
        words = [word.strip() for word in self.verbalizer.values()]
        yield from require(all(words), "verbalizer", got, "words that are not empty")
        yield from require(len(set(words)) == len(words), "verbalizer", got, "another word for each label")
        for name in ("shots", "shots_seed", "calibration"):
            yield from require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the labels in the order of the verbalizer."""
        return tuple(self.verbalizer)

    @property
    def parsed(self) -> Template:
        """Return the template."""
        return parse(self.template)

    def measures(self) -> tuple[str, ...]:
        from llmtrain.scoring.classification import CLASS_FIGURES

        return CLASS_FIGURES

    def row(self, sequence_length: int) -> Row:
        return Row(sequence_length, predicted=1)

    def length_problems(self, sequence_length: int, model: Any) -> Iterator[Problem]:
        if self.shots and family_of(model).kind != "decoder":
            got = f"{self.shots} with model.family={model.family}"
            yield Problem("objective.shots", got, "0 with a model that fills masks")

    def special_ids(self, model: Any, corpora: Any) -> SpecialIds:
        """Resolve the special tokens of the model. Raise ConfigError for a verbalizer that does not fit."""
        found = trunk_ids(model, corpora)
        self._answers(found.model, corpora.load_tokenizer())
        return found

    def special_names(self, model: Any, tokenizer: Tokenizer) -> dict[int, str]:
        return trunk_names(model, tokenizer)

    def open(
        self, model: Any, data: Any, corpora: Any, split: str, sequence_length: int
    ) -> dict[str, Dataset]:
        """Return the rows of the split as prompts, with the shots before each. Raise ConfigError for shots in
        training: a row would stand in its own prompt."""
        if split == "train":
            self._refuse_examples("rows to train on")
        return {"": self._after_shots(model, corpora, corpora.split(split), sequence_length, data.group)}

    def calibration_rows(self, model: Any, corpora: Any, sequence_length: int) -> Dataset | None:
        """Return the rows over which the mean of the scores becomes 0, with the shots before each."""
        if not self.calibration:
            return None
        train = corpora.split("train")
        rows = chosen_rows(train.array("label"), self.calibration, self.shots_seed, skip=self.shots)
        if len(rows) < self.calibration:
            got = f"{self.calibration} of {len(train):,} rows to train on, beside {self.shots} shots"
            raise ConfigError(Problem("objective.calibration", got, f"0 to {len(rows)}"))
        return self._after_shots(model, corpora, train.chosen(rows), sequence_length)

    def examples_of_split(
        self, model: Any, split: TableSplit, tokenizer: Tokenizer, sequence_length: int, group: int = 1
    ) -> Prompts:
        """Return rows as the model reads them. group: see OrdersByLength."""
        self._refuse_examples("rows without a table")
        return self._prompts(model, split, tokenizer, sequence_length, group=group)

    def build(self, model: Any, data: Any, corpora: Any = None) -> Prompted:
        return Prompted(model, self.labels)

    # How rows of a table are read (see TaskReader).

    def identity(self) -> Mapping[str, Any]:
        return {"kind": self.kind, "template": self.template}

    def content(self, values: Mapping[str, Any], data: TableDataConfig) -> Any:
        """Return the fields that the template shows. Raise ValueError as `read` does."""
        return self.parsed.content(values)

    def read(self, values: Mapping[str, Any], data: TableDataConfig) -> Example | None:
        from llmtrain.tables.build import Example

        content = self.content(values, data)
        label = label_of(field_of(values, data.label_field), data.label_field)
        # By the fields of classification, so that the same rows are held out.
        hashed = texts_of(values, data) if data.text_field in values else content
        return Example(hashed, content, label) if any(text.strip() for text in content) else None

    def encode_texts(self, contents: Sequence[Any], tokenizer: Tokenizer) -> dict[str, Column]:
        from llmtrain.tables.ragged import Ragged

        template = self.parsed
        spaces = {piece.field: piece.space for piece in (*template.before, *template.after)}
        columns: dict[str, Column] = {}
        for name, texts in zip(template.fields, zip(*contents, strict=True), strict=True):
            spaced = [f"{spaces[name]}{text}" for text in texts]
            columns[_column(name)] = Ragged.of(tokenizer.encode_arrays(spaced), np.int32)
        return columns

    def label_names(self, labels: Sequence[Any]) -> tuple[str, ...]:
        unknown = [label for label in in_order(labels) if label not in self.verbalizer]
        if unknown:
            allowed = f"those of objective.verbalizer: {', '.join(self.labels)}"
            raise ValueError(f"the labels {', '.join(unknown[:6])}", allowed)
        return self.labels

    def encode_labels(self, labels: Sequence[Any], names: Sequence[str]) -> dict[str, Column]:
        numbers = {name: number for number, name in enumerate(names)}
        return {"label": np.array([numbers[label] for label in labels], np.int64)}

    def count_labels(self, labels: Sequence[Any]) -> Mapping[str, int]:
        counts = Counter(labels)
        return {name: counts[name] for name in in_order(counts)}

    def blank_labels(self, contents: Sequence[Any]) -> dict[str, Column]:
        return {"label": np.full(len(contents), IGNORE_INDEX, np.int64)}

    def _refuse_examples(self, rows: str) -> None:
        given = {name: getattr(self, name) for name in ("shots", "calibration") if getattr(self, name)}
        problems = [Problem(f"objective.{name}", str(got), f"0 for {rows}") for name, got in given.items()]
        if problems:
            raise ConfigError(problems)

    # The template in tokens.

    def _after_shots(
        self, model: Any, corpora: Any, split: TableSplit, sequence_length: int, group: int = 64
    ) -> Prompts:
        """Return rows as prompts, each after the shots."""
        tokenizer = corpora.load_tokenizer()
        before = np.zeros(0, np.int64)
        if self.shots:
            rows = self._prompts(model, corpora.split("train"), tokenizer, sequence_length)
            before = self._shots(rows, tokenizer)
        return self._prompts(model, split, tokenizer, sequence_length, before, group)

    def _prompts(
        self,
        model: Any,
        split: TableSplit,
        tokenizer: Tokenizer,
        sequence_length: int,
        shots: np.ndarray | None = None,
        group: int = 64,
    ) -> Prompts:
        from llmtrain.data.datasets.prompts import Prompts

        prompt = self._prompt(model, tokenizer)
        if shots is not None:
            prompt = prompt._replace(first=np.concatenate([prompt.first, shots]))
        if (room := sequence_length - prompt.num_fixed) < 1:
            got = f"{sequence_length}, of which the template takes {sequence_length - room}"
            raise ConfigError(Problem("sequence_length", got, f"{sequence_length - room + 1} or more"))
        return Prompts(split, sequence_length, prompt, group)

    def _prompt(self, model: Any, tokenizer: Tokenizer) -> Prompt:
        from llmtrain.data.datasets.prompts import Prompt

        template, frame = self.parsed, frame_of(model, tokenizer).one
        fills = family_of(model).kind == "encoder"

        def part(piece: Piece) -> str | np.ndarray:
            return _column(piece.field) if piece.field else _ids(tokenizer, piece.space + piece.text)

        return Prompt(
            [part(piece) for piece in template.before],
            [part(piece) for piece in template.after],
            self._answers(model, tokenizer),
            model.special_ids[0] if fills else None,
            np.array(frame.first, np.int64),
            np.array(frame.last, np.int64),
            tokenizer.special_ids.get("pad", tokenizer.eos_id),
        )

    def _answers(self, model: Any, tokenizer: Tokenizer) -> list[np.ndarray]:
        """Return the tokens of each answer. Raise ConfigError for several where the model has one mask, and
        for answers that are the same tokens."""
        problems: list[Problem] = []
        found: dict[bytes, str] = {}
        for label, word in self.verbalizer.items():
            ids = _ids(tokenizer, self.parsed.space + word.strip())
            where, got = f"objective.verbalizer.{label}", f"{word!r}, {len(ids)} tokens"
            if not len(ids) or tokenizer.unk_id in ids:
                problems.append(Problem(where, f"{word!r}", "a word that the tokenizer has"))
            elif family_of(model).kind == "encoder" and len(ids) > 1:
                problems.append(Problem(where, got, "a word of one token, as the mask is one"))
            elif (before := found.setdefault(ids.tobytes(), label)) != label:
                problems.append(Problem(where, f"{word!r}, the tokens of {before}", "other tokens for each"))
        if problems:
            raise ConfigError(problems)
        return [np.frombuffer(key, np.int64) for key in found]

    def _shots(self, rows: Prompts, tokenizer: Tokenizer) -> np.ndarray:
        """Return the tokens of the shots, each cut to its share of the sequence."""
        between = _ids(tokenizer, self.separator)
        chosen = chosen_rows(rows.split.array("label"), self.shots, self.shots_seed)
        if len(chosen) < self.shots:
            got, allowed = f"{self.shots} of {len(chosen)} rows to train on", f"0 to {len(chosen)}"
            raise ConfigError(Problem("objective.shots", got, allowed))
        prompt = rows.prompt
        parts = [len(part) for part in (*prompt.before, *prompt.after) if not isinstance(part, str)]
        fixed = sum(parts) + max(map(len, prompt.answers)) + len(between)
        share = int(SHOTS_SHARE * rows.sequence_length) // self.shots
        if share <= fixed:
            most = int(SHOTS_SHARE * rows.sequence_length) // (fixed + 1)
            got = f"{self.shots} in sequences of {rows.sequence_length} tokens"
            remedy = "give fewer, or a longer sequence_length"
            raise ConfigError(Problem("objective.shots", got, f"0 to {most}", remedy))
        examples = [rows.example(row, share - fixed) for row in chosen.tolist()]
        return np.concatenate([ids for example in examples for ids in (example, between)])


def _column(name: str) -> str:
    """Return the name of the column of a field, for a file."""
    return "field_" + "".join(c if c.isalnum() else f"_{ord(c):x}_" for c in name)


def _ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return np.array(tokenizer.encode(text), np.int64)


class Prompted(Classification):
    """Cross-entropy of the right answer among all, each by the sum of the log-probabilities of its tokens."""

    def __init__(self, model: Any, labels: Sequence[str]) -> None:
        self.head = TaskHeadConfig("classes", outputs=len(labels), labels=tuple(labels))
        self._fills = family_of(model).kind == "encoder"
        self._favoured: Tensor | None = None
        """Mean score of each answer, fp32 (C), once it is calibrated."""

    def calibrate(self, rows: Mapping[int, np.ndarray]) -> None:
        """Subtract the mean of these predictions from those that follow."""
        import torch

        self._favoured = torch.from_numpy(np.mean(list(rows.values()), axis=0, dtype=np.float64)).float()

    def collate(self, raw: dict[str, np.ndarray]) -> Batch:
        """Return "tokens" int64 (B, R, T), "asked" int64 (B, R, A), "answers" int64 (B, C, A), "labels" int64
        (B), and of an encoder "documents" int32 (B, R, T), 1 at padding."""
        from llmtrain.data.datasets.examples import padded_width

        lengths = raw["lengths"]
        width = min(raw["tokens"].shape[-1], padded_width(int(lengths.max())))
        arrays = {"tokens": raw["tokens"][..., :width], "labels": raw["label"]}
        arrays |= {key: raw[key] for key in ("asked", "answers", "lengths")}
        if self._fills:
            arrays["documents"] = (np.arange(width) >= lengths[..., None]).astype(np.int32)
        return tensors(arrays)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Return the arguments of the model's forward that give the logits of the asked positions, (B · R, A,
        V)."""
        rows = batch["tokens"].shape[1]
        names = {"tokens": "tokens_BT", "documents": "documents_BT", "asked": "asked_BM"}
        found = {name: batch[key].flatten(0, 1) for key, name in names.items() if key in batch}
        if DROPOUT_KEYS in batch:
            found["dropout_keys_B"] = batch[DROPOUT_KEYS].repeat_interleave(rows)
        return found

    def __call__(self, model: nn.Module, batch: Batch) -> Terms:
        return self._terms(model(**self.inputs(batch)), batch)

    def evaluate(self, model: nn.Module, batch: Batch) -> Terms:
        """Add the predictions of each row, from which figures are computed."""
        logits = model(**self.inputs(batch)).float()
        terms = self._terms(logits, batch)
        return Terms(terms.loss_sum, terms.num_targets, rows=self.predictions(logits, batch))

    def _terms(self, logits: Tensor, batch: Batch) -> Terms:
        import torch.nn.functional as F

        labels, scores_BC = batch["labels"], self._scores(logits, batch)
        loss = F.cross_entropy(scores_BC, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        return Terms(loss, self.count(labels))

    def predictions(self, logits: Tensor, batch: Batch) -> list[np.ndarray]:
        return list(self._scores(logits, batch).detach().cpu().numpy())

    def _scores(self, logits: Tensor, batch: Batch) -> Tensor:
        scores_BC = answer_scores(logits, batch["answers"])
        return scores_BC if self._favoured is None else scores_BC - self._favoured.to(scores_BC.device)

    def show(
        self,
        row: Mapping[str, np.ndarray],
        raw: Mapping[str, np.ndarray],
        text: Spelling,
        parts: Callable[[], Iterable[Part]],
    ) -> Shown:
        """Return the prompt with its special tokens, and its label."""
        return super().show(
            {**row, "tokens": row["tokens"][0], "lengths": row["lengths"][0]}, raw, text, parts
        )

    def label_text(self, row: Mapping[str, np.ndarray]) -> str:
        label = int(row["labels"])
        return self.head.labels[label] if label != IGNORE_INDEX else "none"


def answer_scores(logits: Tensor, answers_BCA: Tensor) -> Tensor:
    """Return the log-probability of each answer, (B, C) fp32, but for a term that all answers of a row share.

    logits: (B · R, A, V), of one row for all answers if each has one token, else of a row for each.
    answers_BCA: their tokens, negative beyond them.
    """
    B, C, A = answers_BCA.shape
    logits = logits.float()
    if A == 1:
        return logits[:, 0].gather(1, answers_BCA[..., 0])
    log_probabilities = logits.log_softmax(-1).view(B, C, A, -1)
    of_tokens = log_probabilities.gather(-1, answers_BCA.clamp(min=0)[..., None])[..., 0]
    return (of_tokens * (answers_BCA >= 0)).sum(-1)
