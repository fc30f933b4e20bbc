"""An opened table: the rows of a fine-tuning run by split, their tokens and labels. It answers what a run
asks of its corpora."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from llmtrain.errors import DataError, Problem, nearest
from llmtrain.files import disk_problem, expand_home
from llmtrain.tables.build import (
    MANIFEST,
    TaskReader,
    ensure_cache,
    files_fingerprint,
    find_table_files,
    is_whole,
    table_key,
)
from llmtrain.tables.config import SPLITS, TableDataConfig
from llmtrain.tables.ragged import Column, Ragged, load_columns, take
from llmtrain.tokenizers.base import Tokenizer
from llmtrain.tokenizers.folder import find_tokenizer, load_tokenizer


@dataclass(frozen=True)
class TableSplit:
    """The rows of one split."""

    name: str
    columns: Mapping[str, Column]
    fingerprint: str
    """Hex; changes with any token or label."""
    labels: Mapping[str, int] = field(default_factory=dict)
    """Label → rows, or words, that have it."""
    dropped: int = 0
    """Rows that were left out for lack of text."""

    def describe(self) -> str:
        """Return its rows and labels in a few words."""
        shown = ", ".join(f"{name} {count:,}" for name, count in list(self.labels.items())[:12])
        more = f" and {len(self.labels) - 12} more" if len(self.labels) > 12 else ""
        dropped = f", {self.dropped:,} without text left out" if self.dropped else ""
        return f"{self.name}: {len(self):,} rows" + (f" ({shown}{more})" if shown else "") + dropped

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def chosen(self, rows: np.ndarray) -> TableSplit:
        """Return the rows with these numbers, in their order."""
        columns = {name: take(column, rows) for name, column in self.columns.items()}
        said = f"{self.fingerprint}/{rows.tolist()}"
        return TableSplit(self.name, columns, xxhash.xxh3_128_hexdigest(said.encode()))

    def array(self, name: str) -> np.ndarray:
        """Return a column of numbers."""
        column = self.columns[name]
        assert isinstance(column, np.ndarray)
        return column

    def ragged(self, name: str) -> Ragged:
        """Return a column of pieces of different lengths."""
        column = self.columns[name]
        assert isinstance(column, Ragged)
        return column


class Table:
    """The splits of a table; `open_table` makes it."""

    def __init__(
        self,
        folder: Path,
        where: str,
        tokenizer_path: Path,
        tokenizer: Tokenizer,
        paired: bool = False,
        grown_from: str | None = None,
    ) -> None:
        """paired: whether its rows are pairs of a source and a target; grown_from: sha256 of the tokenizer
        before it had new tokens."""
        self.grown_from = grown_from
        self.paired = paired
        self._folder, self.where, self.tokenizer_path = folder, where, tokenizer_path
        self._tokenizer = tokenizer
        self._manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        self.by_name = {"": self}

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels, in the order of their numbers."""
        return tuple(self._manifest["labels"])

    @property
    def splits(self) -> Mapping[str, Any]:
        """Split → "rows", "dropped" and "labels", label → count."""
        splits: Mapping[str, Any] = self._manifest["splits"]
        return splits

    def split(self, name: str) -> TableSplit:
        """Return a split. Raise DataError if the table has none of this name."""
        if name not in self.splits:
            remedy = f"give data.{name}=…" if name in SPLITS else ""
            raise DataError(
                Problem(self.where, f"no split {name!r}", nearest(name, list(self.splits)), remedy)
            )
        prefix = f"{name}/"
        files = [file.removeprefix(prefix) for file in self._manifest["files"] if file.startswith(prefix)]
        digests = [self._manifest["files"][prefix + file] for file in sorted(files)]
        fingerprint = xxhash.xxh3_128_hexdigest("/".join(digests).encode())
        facts, columns = self.splits[name], load_columns(self._folder / name, files)
        return TableSplit(name, columns, fingerprint, facts["labels"], facts["dropped"])

    def without(self, split: str) -> list[str]:
        """Return "", the name of a single source, if it has no rows in the split."""
        return [] if split in self.splits else [""]

    def load_tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def tokenizer_sha256(self) -> str:
        return self._tokenizer.sha256

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Role → id, as in the tokenizer."""
        return self._tokenizer.special_ids

    @property
    def sentinel_ids(self) -> tuple[int, ...]:
        return self._tokenizer.sentinel_ids

    @property
    def eos_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.vocab_size

    @cached_property
    def fingerprint(self) -> str:
        """Hex; changes with any token and label and with the tokenizer."""
        said = json.dumps([self._manifest["files"], self.tokenizer_sha256], sort_keys=True)
        return xxhash.xxh3_128_hexdigest(said.encode())

    def counters(self) -> dict[str, float]:
        """Return no metrics: nothing is downloaded."""
        return {}

    def close(self) -> None:
        """Nothing is held open."""


def open_table(data: TableDataConfig, task: TaskReader, tokenizer: Path | None) -> Table:
    """Open the table of the section `data`; tokenize it if that was not done before.

    tokenizer: the model's, where `data.tokenizer` is null.
    Raise DataError for files, rows or labels that cannot be used.
    """
    given = data.tokenizer if data.tokenizer is not None else tokenizer
    if given is None:
        allowed = "a tokenizer, a corpus, a checkpoint or a Hugging Face folder"
        raise DataError(Problem("data.tokenizer", "null", allowed, "give data.tokenizer=…, or model.path=…"))
    path = find_tokenizer(given) or given if given.is_dir() else given
    loaded, grown_from = load_tokenizer(path), None
    if new_tokens := task.new_tokens:
        grown_from = loaded.sha256
        loaded = loaded.with_tokens(new_tokens)
    if path.read_bytes() != loaded.content:
        # Checkpoints copy this file, which must hold all of the tokenizer: tokenizer.json has neither the
        # roles of special tokens nor the chat template.
        path = _saved(loaded, expand_home(data.cache.dir))
    files = find_table_files(data)
    fingerprint = files_fingerprint(files)
    folder = expand_home(data.cache.dir) / table_key(data, task, loaded, fingerprint)
    # The labels that a run has recorded are those that its table had without any given.
    if task.labels and not (is_whole(folder) and Table(folder, "", path, loaded).labels == task.labels):
        folder = folder.with_name(table_key(data, task, loaded, fingerprint, task.labels))
    ensure_cache(folder, data, task, loaded, files)
    return Table(folder, data.paths[""], path, loaded, task.paired == "needed", grown_from)


def _saved(tokenizer: Tokenizer, cache: Path) -> Path:
    """Return the file of a tokenizer that was made here, from which checkpoints copy it."""
    folder = cache / f"tokenizer-{tokenizer.sha256[:32]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tokenizer.save(folder)
    except OSError as error:
        raise DataError(disk_problem(error, folder, key="data.cache.dir")) from error
