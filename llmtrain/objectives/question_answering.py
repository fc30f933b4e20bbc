"""Question answering: the span of a context that answers a question, or none (arXiv:1606.05250,
1806.03822)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np

from llmtrain.config import require
from llmtrain.errors import Problem
from llmtrain.nn.task_config import Pooling
from llmtrain.objectives.fields import text_of
from llmtrain.objectives.task import Task, TaskConfig, Trunk, frame_of
from llmtrain.tables.records import field_of

if TYPE_CHECKING:
    from torch import Tensor

    from llmtrain.data.datasets.answer_windows import AnswerWindows
    from llmtrain.objectives.base import Batch, ObjectiveConfig
    from llmtrain.scoring.figure import Figure
    from llmtrain.tables.build import Example
    from llmtrain.tables.config import TableDataConfig
    from llmtrain.tables.ragged import Column
    from llmtrain.tables.table import Table, TableSplit
    from llmtrain.tokenizers.base import Tokenizer

CANDIDATES = 8
"""Spans of each window that compete with those of the other windows of its question."""


class Answer(NamedTuple):
    """An answer as a row has it."""

    text: str
    start: int
    """Its first character in the context."""


@dataclass(frozen=True)
class QuestionAnsweringConfig(TaskConfig):
    """Predict the span of a context that answers a question."""

    head_kind: ClassVar = "span"

    kind: Literal["question_answering"] = "question_answering"
    overlap: int = 128
    """Tokens of a long context that consecutive windows share."""
    longest_answer: int = 30
    """Most tokens of an answer that is predicted."""
    no_answer: float = 0.0
    """How much higher than the best span "no answer" must score to be predicted."""
    labels: tuple[str, ...] = ()
    """Not used: answers have no labels."""
    trunk: Trunk | None = None
    """What of an encoder-decoder the head reads. both: the decoder's states, which reads the text that the
    encoder reads; encoder: those of the encoder, without a decoder; null: both."""
    pooling: Pooling | None = None
    """Not used: each token is a possible begin and end."""
    head_dropout: float = 0.0
    """Dropout probability before the outputs."""
    new_head: bool = False
    """Start with a new head where the model has one for this task already."""

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from require(self.overlap >= 0, "overlap", self.overlap, "0 or more")
        yield from require(self.longest_answer >= 1, "longest_answer", self.longest_answer, "1 or more")

    def measures(self) -> tuple[str, ...]:
        from llmtrain.scoring.answers import FIGURES

        return FIGURES

    def num_outputs(self, table: Any) -> int:
        return 2

    def with_labels(self, table: Table) -> ObjectiveConfig:
        return self

    def build(self, model: Any, data: Any, corpora: Any = None) -> QuestionAnswering:
        return QuestionAnswering(model, self)

    def examples_of_split(  # type: ignore[override]
        self, model: Any, split: TableSplit, tokenizer: Tokenizer, sequence_length: int, group: int = 1
    ) -> AnswerWindows:
        from llmtrain.data.datasets.answer_windows import AnswerWindows

        pad_id = tokenizer.special_ids.get("pad", tokenizer.eos_id)
        frame = frame_of(model, tokenizer)
        spans = token_spans(split)
        return AnswerWindows(split, spans, sequence_length, frame, pad_id, group=group, overlap=self.overlap)

    def content(self, values: Mapping[str, Any], data: TableDataConfig) -> tuple[str, str]:
        question = data.text_field if data.text_field in values else "question"
        return text_of(values, question), text_of(values, data.text_pair_field or "context")

    def read(self, values: Mapping[str, Any], data: TableDataConfig) -> Example | None:
        from llmtrain.tables.build import Example

        question, context = self.content(values, data)
        if not question.strip() or not context.strip():
            return None
        field = data.label_field if data.label_field in values else "answers"
        answers = [] if values.get("is_impossible") else _answers(field_of(values, field), context)
        # All questions of a context are in one split.
        return Example((context,), (question, context), tuple(answers))

    def blank_labels(self, contents: Sequence[Any]) -> dict[str, Column]:
        return self.encode_labels([()] * len(contents), ())

    def encode_texts(self, contents: Sequence[Any], tokenizer: Tokenizer) -> dict[str, Column]:
        from llmtrain.tables.ragged import Ragged

        questions = tokenizer.encode_arrays([question for question, _ in contents])
        ids, offsets = zip(*(tokenizer.encode_with_offsets(context) for _, context in contents), strict=True)
        return {
            "first": Ragged.of(questions, np.int32),
            "second": Ragged.of([np.array(each) for each in ids], np.int32),
            "offsets": Ragged.of([np.array(each).reshape(-1) for each in offsets], np.int32),
            "context": Ragged.of_texts([context for _, context in contents]),
        }

    def label_names(self, labels: Sequence[Any]) -> tuple[str, ...]:
        if labels and not any(labels):
            raise ValueError(f"no answer in any of {len(labels):,} rows", "rows with answers")
        return ()

    def encode_labels(self, labels: Sequence[Any], names: Sequence[str]) -> dict[str, Column]:
        from llmtrain.tables.ragged import Ragged

        return {"answers": Ragged.of_texts([json.dumps(answers) for answers in labels])}

    def count_labels(self, labels: Sequence[Any]) -> Mapping[str, int]:
        answered = sum(1 for answers in labels if answers)
        return {"answered": answered, "without an answer": len(labels) - answered}


def _answers(value: Any, context: str) -> list[Answer]:
    """Return the answers of a row: a list of objects with text and answer_start, one such object with lists,
    a list of texts, or a text. Raise ValueError for one that is not in the context."""
    if isinstance(value, Mapping):
        texts, starts = value.get("text", []), value.get("answer_start", [])
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise ValueError("answers whose text and answer_start are no lists of one length", "such lists")
        value = [{"text": t, "answer_start": s} for t, s in zip(texts, starts, strict=True)]
    items = [] if value in (None, "") else value if isinstance(value, list) else [value]
    found = []
    for item in items:
        text = item.get("text") if isinstance(item, Mapping) else item
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"an answer that is {str(text)[:40]!r}", "a text of the context")
        start = item.get("answer_start") if isinstance(item, Mapping) else None
        if type(start) not in (int, type(None)):
            raise ValueError(f"answer_start={str(start)[:40]!r}", "the number of a character, or null")
        if start is None or start < 0 or context[start : start + len(text)] != text:
            near = context.find(text)
            if near < 0:
                got = f"the answer {text[:40]!r}, which is not in its context"
                raise ValueError(got, "a text of the context")
            start = near
        found.append(Answer(text, int(start)))
    return found


def token_spans(split: TableSplit) -> np.ndarray:
    """Return the first and last token, in its context, of the first answer of each row, int64 (N, 2); −1 for
    rows without one."""
    answers, offsets = split.columns["answers"], split.columns["offsets"]
    spans = np.full((len(split), 2), -1, np.int64)
    for row in range(len(split)):
        given = json.loads(answers.text(row))  # type: ignore[union-attr]
        if given:
            text, start = given[0]
            begins, ends = offsets[row].reshape(-1, 2).T
            first = int(np.searchsorted(ends, start, side="right"))
            last = int(np.searchsorted(begins, start + len(text), side="left")) - 1
            if first <= last < len(begins):
                spans[row] = first, last
    return spans


class QuestionAnswering(Task):
    """Mean of the cross-entropies of the answer's first and last token."""

    def __init__(self, model: Any, config: QuestionAnsweringConfig) -> None:
        super().__init__(model)
        self._config = config

    def collate(self, raw: dict[str, np.ndarray]) -> Batch:
        """Add "context" int64 (B, 2), the positions of the context."""
        import torch

        return {**super().collate(raw), "context": torch.from_numpy(raw["context"])}

    def labels_of(self, raw: Mapping[str, np.ndarray], width: int) -> np.ndarray:
        return raw["span"]

    def count(self, labels: Tensor) -> Tensor:
        return super().count(labels[:, 0])

    def predictions(self, logits: Tensor, batch: Batch) -> list[np.ndarray]:
        """Return the best spans of each window, fp32 (CANDIDATES + 1, 3): position in the context of the
        first token and of the last, and the sum of their logits; the last row is "no answer"."""
        scores = logits.cpu().numpy().astype(np.float64)
        found = []
        for of_window, (first, end) in zip(scores, batch["context"].tolist(), strict=True):
            best = np.full((CANDIDATES + 1, 3), -np.inf)
            begins, ends = of_window[first:end, 0], of_window[first:end, 1]
            if len(begins):
                pairs = begins[:, None] + ends[None, :]
                distance = np.arange(len(ends))[None, :] - np.arange(len(begins))[:, None]
                pairs[(distance < 0) | (distance >= self._config.longest_answer)] = -np.inf
                count = min(CANDIDATES, pairs.size)
                top = np.argpartition(-pairs.reshape(-1), count - 1)[:count]
                best[:count, 0], best[:count, 1] = np.divmod(top, len(ends))
                best[:count, 2] = pairs.reshape(-1)[top]
            best[-1] = -1, -1, of_window[0].sum()
            found.append(best)
        return found

    def scores(
        self, dataset: Any, rows: Mapping[int, np.ndarray], intervals: bool = True
    ) -> dict[str, Figure]:
        from llmtrain.scoring.answers import answer_figures

        said = self.answers(dataset, rows)
        given = [
            [answer[0] for answer in json.loads(dataset.split.columns["answers"].text(row))] for row in said
        ]
        return answer_figures([text for text, _ in said.values()], given, intervals)

    def answers(
        self, dataset: AnswerWindows, windows: Mapping[int, np.ndarray]
    ) -> dict[int, tuple[str, float]]:
        """Return the answer of each row, "" for none, and its probability among the candidates."""
        by_row: dict[int, list[tuple[int, np.ndarray]]] = {}
        for window, found in windows.items():
            by_row.setdefault(int(dataset.rows[window]), []).append((window, found))
        return {row: self._answer(dataset, row, found) for row, found in by_row.items()}

    def _answer(
        self, dataset: AnswerWindows, row: int, windows: Sequence[tuple[int, np.ndarray]]
    ) -> tuple[str, float]:
        spans = np.concatenate(
            [found[:-1] + np.array([dataset.begins[n], dataset.begins[n], 0]) for n, found in windows]
        )
        none = min(float(found[-1, 2]) for _, found in windows)
        best = spans[spans[:, 2].argmax()]
        scores = np.append(spans[np.isfinite(spans[:, 2]), 2], none + self._config.no_answer)
        probabilities = np.exp(scores - scores.max())
        probabilities /= probabilities.sum()
        if not np.isfinite(best[2]) or none - best[2] > self._config.no_answer:
            return "", float(probabilities[-1])
        offsets = dataset.split.columns["offsets"][row].reshape(-1, 2)
        context = dataset.split.columns["context"].text(row)  # type: ignore[union-attr]
        start, end = int(offsets[int(best[0]), 0]), int(offsets[int(best[1]), 1])
        return context[start:end].strip(), float(probabilities[:-1].max())

    def said_of(self, examples: Any, rows: Mapping[int, np.ndarray]) -> dict[int, dict[str, Any]]:
        found = self.answers(examples, rows)
        return {row: {"prediction": text, "probability": p} for row, (text, p) in found.items()}

    def label_text(self, row: Mapping[str, np.ndarray]) -> str:
        first, last = row["labels"].tolist()
        return f"tokens {first} to {last}" if last > 0 else "no answer"
