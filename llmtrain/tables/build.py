"""Read a table's files, divide their rows into splits, and tokenize them, once, into a cache.

The cache of a table is a folder named by a hash of all that determines it: the contents of the files, the
keys of the section `data`, the task and the tokenizer. It is written under another name and renamed, so that
it is whole or absent; processes that want the same one wait for the first.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import xxhash

from llmtrain.config import encode
from llmtrain.errors import DataError, Problem
from llmtrain.files import checksum, checksum_of_json, disk_problem, lock, write_json_atomically
from llmtrain.prepare.clean import CleanCounts, cleaned_texts, digests, split_of
from llmtrain.prepare.folder_scan import short_name
from llmtrain.prepare.source_file import SourceFile
from llmtrain.prepare.sources import contents_fingerprint, find_files
from llmtrain.standard_streams import print_note
from llmtrain.tables.columns_config import ColumnDataConfig
from llmtrain.tables.config import CONVERSATION_FIELDS, SPLITS, TableDataConfig
from llmtrain.tables.ragged import Column, join, save_columns, take
from llmtrain.tables.records import field_of, name_of, read_records
from llmtrain.tokenizers.base import Tokenizer

VERSION = 1
MANIFEST = "manifest.json"
EXTENSIONS = {
    "csv": "csv", "tsv": "tsv", "jsonl": "jsonl", "ndjson": "jsonl", "json": "json", "parquet": "parquet",
    "conll": "conll", "iob2": "conll", "iob": "conll", "bio": "conll",
}  # fmt: skip
"""Extension of a file → its form."""
_ROWS_AT_A_TIME = 4096


class Example(NamedTuple):
    """One row of a table as a task reads it."""

    texts: tuple[str, ...]
    """What is hashed for its split."""
    content: Any
    """What the task tokenizes."""
    label: Any
    """What the task predicts, as the file has it."""


class UnreadableRowError(Exception):
    """A row that cannot be tokenized: its number among those that were given, what was got, and what is
    allowed."""

    def __init__(self, row: int, got: str, allowed: str) -> None:
        super().__init__(row, got, allowed)
        self.row, self.got, self.allowed = row, got, allowed


class TaskReader(Protocol):
    """What a fine-tuning task makes of the rows of a table."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels that were given, in order; empty: those of the rows to train on."""

    @property
    def new_tokens(self) -> tuple[str, ...]:
        """Special tokens that the tokenizer needs besides its own."""

    @property
    def paired(self) -> str:
        """Return "needed" if rows are pairs of a source and a target."""

    def identity(self) -> Mapping[str, Any]:
        """Return what else determines the columns, as JSON."""

    def read(self, values: Mapping[str, Any], data: TableDataConfig) -> Example | None:
        """Return one row, or None to drop it for lack of text. Raise ValueError with what is wrong and what
        is allowed, two phrases."""

    def encode_texts(self, contents: Sequence[Any], tokenizer: Tokenizer) -> dict[str, Column]:
        """Return the columns of the texts of many rows. Raise UnreadableRowError for one that has none."""

    def label_names(self, labels: Sequence[Any]) -> tuple[str, ...]:
        """Return the names of the labels that the rows to train on have, in order; empty for numbers."""

    def encode_labels(self, labels: Sequence[Any], names: Sequence[str]) -> dict[str, Column]:
        """Return the columns of the labels of many rows. Raise ValueError with the first label that `names`
        lacks."""

    def count_labels(self, labels: Sequence[Any]) -> Mapping[str, int]:
        """Return label → rows, or tokens, that have it."""


@dataclass
class _Rows:
    """The rows of one split, before their labels have numbers."""

    columns: list[dict[str, Column]] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    where: list[str] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    """Hash of the text of each row."""
    dropped: int = 0

    def some(self, most: int) -> _Rows:
        """Return the rows with the `most` smallest hashes, in their order."""
        chosen = np.sort(np.argsort(np.array(self.keys, np.uint64), kind="stable")[:most])
        columns = {name: join([part[name] for part in self.columns]) for name in self.columns[0]}
        kept = chosen.tolist()
        return _Rows(
            [{name: take(column, chosen) for name, column in columns.items()}],
            [self.labels[row] for row in kept],
            [self.where[row] for row in kept],
            [self.keys[row] for row in kept],
            self.dropped,
        )


def phrases(error: ValueError) -> tuple[str, str]:
    """Return what a task says of a row that it cannot read: what was got, and what is allowed."""
    got, allowed = error.args if len(error.args) == 2 else (str(error), "")
    return got, allowed


def table_key(
    data: TableDataConfig, task: TaskReader, tokenizer: Tokenizer, files: str, labels: Sequence[str] = ()
) -> str:
    """Return the name of a table's cache. files: hash of the contents of its files; labels: names that were
    given."""
    of_rows = ("text_field", "text_pair_field", "label_field", "split_field")
    keys = ("format", "header", "quoting", *of_rows, "split", "max_train_rows")
    said: dict[str, Any] = {
        "version": VERSION,
        "files": files,
        "data": {key: encode(getattr(data, key)) for key in keys},
        "task": task.identity(),
        "labels": list(labels),
        "tokenizer": tokenizer.sha256,
    }
    usual = {each.name: each.default for each in fields(TableDataConfig)}
    given = {key: getattr(data, key) for key in CONVERSATION_FIELDS}
    said["data"] |= {key: value for key, value in given.items() if value != usual[key]}
    return xxhash.xxh3_128_hexdigest(json.dumps(said, sort_keys=True).encode())


def find_table_files(data: TableDataConfig | ColumnDataConfig) -> dict[str, list[SourceFile]]:
    """Return the files of each split, or those under "" whose rows are divided. Raise DataError."""
    kinds = EXTENSIONS if data.format == "auto" else {**EXTENSIONS, "": data.format}
    if data.format != "auto":
        kinds = dict.fromkeys(kinds, data.format)
    problems: list[Problem] = []
    found: dict[str, list[SourceFile]] = {}
    for split, where in data.files.items():
        try:
            found[split], _ = find_files([where], kinds=kinds)
        except DataError as error:
            key = f"data.{split or 'path'}"
            problems += [
                Problem(f"{key} ({problem.where})", problem.got, problem.allowed, problem.remedy)
                for problem in error.problems
            ]
    if problems:
        raise DataError(problems)
    return found


def files_fingerprint(files: Mapping[str, Sequence[SourceFile]]) -> str:
    """Return a hash of the contents of all files and of the splits that they are for."""
    parts = [f"{split}={contents_fingerprint(list(of_split))}" for split, of_split in files.items()]
    return xxhash.xxh3_128_hexdigest("/".join(parts).encode())


def ensure_cache(
    folder: Path,
    data: TableDataConfig,
    task: TaskReader,
    tokenizer: Tokenizer,
    files: Mapping[str, Sequence[SourceFile]],
) -> None:
    """Make the cache `folder` if it is not there or not whole."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _held(folder.with_name(f".{folder.name}.lock")):
            if not is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)
                _build(folder, data, task, tokenizer, files)
    except OSError as error:
        raise DataError(disk_problem(error, folder.parent, key="data.cache.dir")) from error


def is_whole(folder: Path) -> bool:
    """Return whether the folder holds a table whose files are as they were written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return (
            manifest["checksum"] == checksum_of_json(manifest)
            and manifest["version"] == VERSION
            and all(checksum(folder / name) == digest for name, digest in manifest["files"].items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Hold a lock of this machine's processes, waiting for it."""
    with open(path, "a") as file:
        while True:
            try:
                lock(file, path)
                break
            except BlockingIOError:
                time.sleep(0.1)
        yield


def _build(
    folder: Path,
    data: TableDataConfig,
    task: TaskReader,
    tokenizer: Tokenizer,
    files: Mapping[str, Sequence[SourceFile]],
) -> None:
    scratch = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    scratch.mkdir()
    try:
        splits = _read(data, task, tokenizer, files, scratch)
        names = _names(splits, task, data)
        written: dict[str, str] = {}
        facts: dict[str, Any] = {}
        for split, rows in splits.items():
            columns = {name: join([part[name] for part in rows.columns]) for name in rows.columns[0]}
            columns |= _labels(split, rows, task, names, data)
            (scratch / split).mkdir()
            for name in save_columns(scratch / split, columns):
                written[f"{split}/{name}"] = checksum(scratch / split / name)
            facts[split] = {
                "rows": len(rows.labels),
                "dropped": rows.dropped,
                "labels": dict(task.count_labels(rows.labels)),
            }
        manifest = {"version": VERSION, "labels": list(names), "splits": facts, "files": written}
        write_json_atomically(scratch / MANIFEST, {**manifest, "checksum": checksum_of_json(manifest)})
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _read(
    data: TableDataConfig,
    task: TaskReader,
    tokenizer: Tokenizer,
    files: Mapping[str, Sequence[SourceFile]],
    scratch: Path,
) -> dict[str, _Rows]:
    """Return the tokenized rows of each split that has any."""
    splits = {split: _Rows() for split in SPLITS}
    for given, of_split in files.items():
        for file in of_split:
            count = 0
            for batch in _batches(file, task, data, scratch, splits[given or "train"]):
                hashes = text_hashes(["\n".join(example.texts) for _, example in batch])
                chosen = _splits_of(hashes, given, data)
                try:
                    columns = task.encode_texts([example.content for _, example in batch], tokenizer)
                except UnreadableRowError as error:
                    raise DataError(Problem(batch[error.row][0], error.got, error.allowed)) from error
                for number, split in enumerate(SPLITS):
                    rows = np.flatnonzero(chosen == number)
                    if len(rows):
                        into = splits[split]
                        into.columns.append({name: take(column, rows) for name, column in columns.items()})
                        into.labels += [batch[row][1].label for row in rows.tolist()]
                        into.where += [batch[row][0] for row in rows.tolist()]
                        into.keys += hashes[rows, 0].tolist()
                count += len(batch)
            _refuse_changed(file)
            if not count:
                got = "no row with text" if file.size else "an empty file"
                raise DataError(Problem(file.name, got, f"rows with text in the field {data.text_field}"))
            print_note(f"tokenized {count:,} rows of {file.name}")
    if data.max_train_rows is not None and splits["train"].labels:
        splits["train"] = splits["train"].some(data.max_train_rows)
    return {split: rows for split, rows in splits.items() if rows.labels}


def _refuse_changed(file: SourceFile) -> None:
    """Raise DataError for a file that is no longer the one whose contents name the cache."""
    if file.url:
        return
    now = file.path.stat()
    if (now.st_size, now.st_mtime_ns) != (file.size, file.mtime_ns):
        got = "a file that changed while it was read"
        raise DataError(Problem(file.name, got, "a file at rest", "run the same command again"))


def _batches(
    file: SourceFile, task: TaskReader, data: TableDataConfig, scratch: Path, rows: _Rows
) -> Iterator[list[tuple[str, Example]]]:
    """Yield (where it is, row) of many rows at a time; count those that are dropped in `rows`."""
    batch: list[tuple[str, Example]] = []
    for record in read_records(file, quoting=data.quoting, header=data.header, scratch=scratch):
        where = name_of(file, record.line)
        try:
            example = task.read(record.values, data)
            if example is not None and data.split_field is not None:
                example = example._replace(texts=(str(field_of(record.values, data.split_field)),))
        except ValueError as error:
            raise DataError(Problem(where, *phrases(error))) from error
        if example is None:
            rows.dropped += 1
            continue
        batch.append((where, example))
        if len(batch) == _ROWS_AT_A_TIME:
            yield batch
            batch = []
    if batch:
        yield batch


def text_hashes(texts: Sequence[str]) -> np.ndarray:
    """Return the two hashes of each text as `llmtrain prepare` makes them, uint64 (N, 2): the first chooses
    among the rows to train on, the second the split."""
    return digests(cleaned_texts(texts, "NFC", CleanCounts()))


def _splits_of(hashes: np.ndarray, given: str, data: TableDataConfig) -> np.ndarray:
    """Return the number of each row's split in SPLITS."""
    holds_out = given == "train" and data.validation is None
    if given and not holds_out:
        return np.full(len(hashes), SPLITS.index(given))
    # As `llmtrain prepare` does, so that a text that is held out there is held out here.
    return split_of(hashes[:, 1], data.split.validation, 0.0 if given else data.split.test)


def _names(splits: Mapping[str, _Rows], task: TaskReader, data: TableDataConfig) -> tuple[str, ...]:
    rows = splits.get("train")
    try:
        return task.label_names([] if rows is None else rows.labels)
    except ValueError as error:
        raise DataError(Problem(f"data.label_field ({data.label_field})", *phrases(error))) from error


def _labels(
    split: str, rows: _Rows, task: TaskReader, names: Sequence[str], data: TableDataConfig
) -> dict[str, Column]:
    try:
        return task.encode_labels(rows.labels, names)
    except KeyError as error:
        label = error.args[0]
        is_wrong = [label in task.count_labels([known]) for known in rows.labels]
        where = rows.where[is_wrong.index(True)] if any(is_wrong) else split
        got = f"the label {short_name(str(label))} in the {split} split"
        allowed = ", ".join(short_name(name) for name in names[:12])
        if task.labels:
            allowed += ", as objective.labels or the model's head has them"
            raise DataError(Problem(where, got, allowed, "correct it")) from error
        got += ", which no row to train on has"
        raise DataError(
            Problem(where, got, allowed, "correct it, or add rows with it to train on")
        ) from error
