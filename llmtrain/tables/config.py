"""The section `data` of a fine-tuning run: tables of labelled texts. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llmtrain.config import require
from llmtrain.corpus.config import CacheConfig, Locate, OneSource
from llmtrain.errors import Problem
from llmtrain.prepare.config import SplitConfig

SPLITS = ("train", "validation", "test")
CONVERSATION_FIELDS = (
    "messages_field", "prompt_field", "completion_field", "instruction_field", "input_field", "output_field",
    "chosen_field", "rejected_field",
)  # fmt: skip
"""Keys of the fields of conversations."""


@dataclass(frozen=True)
class TableCacheConfig:
    """The local cache of tables: their tokens and labels, made once for each file, tokenizer and settings."""

    dir: Path = field(default_factory=lambda: Path("~/.cache/llmtrain/tables").expanduser())
    """A folder on a disk of this machine; all runs and ranks of a user there may share it."""


@dataclass(frozen=True)
class FilesOfSplits(OneSource):
    """Base of `data` sections with rows from files, which a hash divides into splits unless each has its
    own."""

    path: str | None = None
    """A file, a folder, a glob pattern or `package:NAME/path`, whose rows are divided into splits by a
    hash."""
    train: str | None = None
    """Files of the training split, in place of `path`."""
    validation: str | None = None
    """Files of the validation split; null, beside `train`: held out from `train` by the hash."""
    test: str | None = None
    """Files of the test split; null, beside `train`: none."""

    @property
    def files(self) -> dict[str, str]:
        """Return the files of each split that has its own, or "" → `path`, whose rows are divided."""
        if self.path is not None:
            return {"": self.path}
        return {split: where for split in SPLITS if (where := getattr(self, split)) is not None}

    @property
    def paths(self) -> dict[str, str]:
        """Return "", the name of the single source, → where its rows are."""
        return {"": ", ".join(self.files.values())}

    @property
    def held_out_key(self) -> str:  # type: ignore[override]
        return "path" if self.validation is None else "validation"

    @staticmethod
    def relocated(section: Mapping[str, Any], locate: Locate) -> dict[str, Any]:
        """Return the present locations of the files that the section of a run names."""
        given = {key: section[key] for key in ("path", *SPLITS) if section.get(key) is not None}
        return {key: locate("" if key in ("path", "train") else key, given[key]) for key in given}

    def file_problems(self) -> Iterator[Problem]:
        """Yield a problem for files that are named twice or not at all."""
        given = [split for split in SPLITS if getattr(self, split) is not None]
        if self.path is not None and given:
            yield Problem("path", self.path, f"null beside data.{given[0]}", "give one of the two")
        if not self.path and not given:
            allowed = "a file, folder or glob pattern"
            yield Problem("path", str(self.path), allowed, "give data.path=…, or data.train=…")


@dataclass(frozen=True)
class TableDataConfig(FilesOfSplits):
    """Labelled texts straight from files: .csv, .tsv, .jsonl, .parquet, CoNLL columns, SQuAD's .json."""

    has_text = True
    is_table = True

    path: str | None = None
    """A file, a folder, a glob pattern or `package:NAME/path`, whose rows are divided into splits by a hash
    of their text, as `llmtrain prepare` divides documents."""
    kind: Literal["table"] = "table"
    """Tables of labelled texts."""
    format: Literal["auto", "csv", "tsv", "jsonl", "parquet", "conll", "json"] = "auto"
    """Form of the files; auto: by their extension, where .conll, .iob2, .iob and .bio are CoNLL columns."""
    header: bool = True
    """The first line of a csv or tsv names its columns; false: columns are named 0, 1, …"""
    quoting: Literal["auto", "double", "none"] = "auto"
    """Quotes in csv and tsv, as in `llmtrain prepare`."""
    text_field: str = "text"
    """Field of the text; for tagging, of the list of words; for question answering, of the question."""
    text_pair_field: str | None = None
    """Field of the second text of a pair; for question answering, of the context."""
    label_field: str = "label"
    """Field of the label, of the list of labels or tags, or of the answers."""
    messages_field: str = "messages"
    """Field of a conversation: a list of {role, content}. A row without it may have prompt and completion, or
    instruction and output."""
    prompt_field: str | None = None
    """Field of what comes before a completion, in place of a conversation; null: prompt."""
    completion_field: str | None = None
    """Field of the completion; null: completion."""
    instruction_field: str | None = None
    """Field of an instruction, in place of a conversation; null: instruction."""
    input_field: str | None = None
    """Field of what an instruction is about, which may be empty; null: input, where a row has it."""
    output_field: str | None = None
    """Field of the answer to an instruction; null: output."""
    chosen_field: str = "chosen"
    """Of preferences: field of the answer, or the conversation, that is preferred."""
    rejected_field: str = "rejected"
    """Field of the one that it is preferred to."""
    split: SplitConfig = field(default_factory=SplitConfig)
    """Shares of the rows of `path` that are held out."""
    split_field: str | None = None
    """Field whose value is hashed for the split in place of the text, so that rows that share it, such as the
    title of an article, stay together; null: the text."""
    max_train_rows: int | None = None
    """Most rows of the training split, chosen by the hash of their text; null: all."""
    tokenizer: Path | None = None
    """A tokenizer, a corpus, a checkpoint or a Hugging Face folder; null: the one of `model.path`."""
    group: int = 64
    """Rows of like length that follow each other in the order of training, which keeps padding small; 1: no
    grouping by length."""
    workers: int = 2
    """Threads that read ahead on each rank; 0 reads in the training thread. Never changes the order."""
    cache: TableCacheConfig = field(default_factory=TableCacheConfig)
    """The cache of tokens and labels."""

    @classmethod
    def keys_of(cls, section: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the keys of a section that a run recorded; none of a section of another kind."""
        if section is None or section.get("kind") != cls.kind:
            return {}
        return {key: value for key, value in section.items() if key in cls.__dataclass_fields__}

    def order_settings(self, sequence_length: int) -> dict[str, Any]:
        """Return the settings that determine the rows and their order."""
        return {"sequence_length": sequence_length, "group": self.group}

    @classmethod
    def reopened(
        cls, section: Mapping[str, Any], names: Sequence[str], order: Any, locate: Locate, cache: CacheConfig
    ) -> dict[str, Any]:
        """Return the section of a run with the present locations; the tokenizer is that of its checkpoints.
        See TokenDataConfig."""
        kept = {} if cache.dir == CacheConfig().dir else {"dir": str(cache.dir)}
        return {
            **section,
            **cls.relocated(section, locate),
            "tokenizer": None,
            "group": order.group,
            "cache": kept,
        }

    def problems(self) -> Iterator[Problem]:
        yield from self.file_problems()
        prompts = self.prompt_field or self.completion_field
        instructions = self.instruction_field or self.input_field or self.output_field
        if prompts and instructions:
            allowed = f"null beside {instructions}, a field of instructions"
            yield Problem("prompt_field", prompts, allowed, "give fields of one form")
        most = self.max_train_rows
        yield from require(most is None or most >= 1, "max_train_rows", most, "1 or more, or null")
        yield from require(0 <= self.workers <= 256, "workers", self.workers, "0 to 256")
        yield from require(1 <= self.group <= 1 << 20, "group", self.group, f"1 to {1 << 20}")
