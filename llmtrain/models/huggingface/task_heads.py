"""Heads of fine-tuning tasks in Hugging Face folders: names of tensors, and keys of config.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmtrain.models.huggingface.form import Entry, Settings, same_all
from llmtrain.nn.task_config import Pooling, TaskHeadConfig

_SUFFIXES = {
    "classes": "ForSequenceClassification",
    "labels": "ForSequenceClassification",
    "values": "ForSequenceClassification",
    "tags": "ForTokenClassification",
    "span": "ForQuestionAnswering",
}
_PROBLEMS = {
    "classes": "single_label_classification",
    "labels": "multi_label_classification",
    "values": "regression",
}


@dataclass(frozen=True)
class TaskHeads:
    """How an architecture names the heads of tasks."""

    stem: str
    """Of its classes: BertForSequenceClassification has "Bert"."""
    text: str
    """Module of the outputs for a whole text."""
    tags: str = "classifier"
    """Module of the outputs for each token."""
    span: str = "qa_outputs"
    """Module of the outputs for first and last token of an answer."""
    dense: str | None = None
    """Module before the outputs for a whole text, if it has one."""
    bias: bool = True
    """Whether the outputs for a whole text have biases."""
    pooling: Pooling = "last"
    """The hidden state that stands for a text."""
    span_class: str | None = "ForQuestionAnswering"
    """Suffix of the class for answers; None: it has none that fits."""
    has_tags: bool = True
    """Whether it has a class for tags."""
    encoder_only: tuple[str, ...] = ()
    """Of an encoder-decoder: the kinds of head that read an encoder without its decoder."""

    def misfits(self, head: TaskHeadConfig) -> dict[str, str]:
        """Return what of a head this architecture does not have, with what it has."""
        if (head.kind == "span" and self.span_class is None) or (head.kind == "tags" and not self.has_tags):
            return {"task.kind": f"classes, labels{', tags' if self.has_tags else ', span'} or values"}
        if head.encoder_only != (head.kind in self.encoder_only):
            return {"task.encoder_only": str(head.kind in self.encoder_only).lower()}
        if head.kind in ("tags", "span"):
            return {}
        own = {"pooling": self.pooling, "dense": self.dense is not None, "bias": self.bias}
        return {f"task.{key}": str(has) for key, has in own.items() if getattr(head, key) != has}

    def entries(self, head: TaskHeadConfig) -> list[Entry]:
        found: list[Entry] = []
        if head.dense and self.dense is not None:
            found += same_all({"head.dense": self.dense})
        return found + same_all({"head.out": self._out(head)}, ("weight", "bias")[: 2 if head.bias else 1])

    def write(self, head: TaskHeadConfig) -> dict[str, Any]:
        """Return the keys of config.json."""
        names = head.labels or tuple(f"LABEL_{i}" for i in range(head.num_outputs))
        keys: dict[str, Any] = {
            "architectures": [f"{self.stem}{self._suffix(head.kind)}"],
            "id2label": {str(number): name for number, name in enumerate(names)},
            "label2id": {name: number for number, name in enumerate(names)},
            "classifier_dropout": head.dropout,
        }
        return keys | ({"problem_type": _PROBLEMS[head.kind]} if head.kind in _PROBLEMS else {})

    def read(self, theirs: Settings) -> dict[str, Any]:
        """Return our key `task`, as a section of the config; nothing for a folder without the head of a
        task."""
        named = theirs.content.get("architectures")
        name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
        kinds = [kind for kind in _SUFFIXES if name == f"{self.stem}{self._suffix(kind)}"]
        if not kinds:
            return {}
        problem = theirs.content.get("problem_type")
        kind = next((kind for kind in kinds if _PROBLEMS.get(kind) == problem), kinds[0])
        labels = self._labels(theirs)
        if problem is None and kind == "classes" and len(labels) == 1:
            kind = "values"  # as transformers takes one label
        is_text = kind in _PROBLEMS
        head = {
            "kind": kind,
            "outputs": len(labels),
            "pooling": self.pooling,
            "dense": is_text and self.dense is not None,
            "bias": self.bias if is_text else True,
            "dropout": theirs.number("classifier_dropout", 0.1),
            "encoder_only": kind in self.encoder_only,
            "labels": [] if kind in ("values", "span") else labels,
        }
        return {"task": head}

    def _suffix(self, kind: str) -> str | None:
        return self.span_class if kind == "span" else _SUFFIXES[kind]

    def _out(self, head: TaskHeadConfig) -> str:
        return {"tags": self.tags, "span": self.span}.get(head.kind, self.text)

    def _labels(self, theirs: Settings) -> list[str]:
        """Return the names of the outputs in order."""
        names = theirs.content.get("id2label")
        if names is None:
            return [f"LABEL_{i}" for i in range(theirs.whole("num_labels", 2))]
        allowed = "a name for each number from 0"
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise theirs.refusal("id2label", allowed)
        if not names or {str(key) for key in names} != {str(i) for i in range(len(names))}:
            raise theirs.refusal("id2label", allowed)
        return [names[str(i)] for i in range(len(names))]
