"""Rows of numbers and categories: read them, measure the training split, and make them numbers.

Dim names: N rows; I numbers of a row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from llmtrain.errors import DataError, Problem, nearest
from llmtrain.prepare.clean import split_of
from llmtrain.prepare.folder_scan import short_name
from llmtrain.tables.build import find_table_files, phrases
from llmtrain.tables.columns_config import Column, ColumnDataConfig
from llmtrain.tables.records import field_of, name_of, read_records

MOST_CATEGORIES = 10_000
"""Values of a column of categories, each of which is an input of the model."""
MOST_CLASSES = 10_000


@dataclass(frozen=True)
class ColumnRows:
    """The rows of one split as the files have them."""

    columns: Mapping[str, Sequence[str]]
    """Name → value of each row, "" where there is none."""
    labels: Sequence[str]
    row_names: Sequence[str]
    """File and line of each row, for messages."""


def read_columns(data: ColumnDataConfig, split: str) -> ColumnRows:
    """Return the rows of a split. Raise DataError for files that cannot be read, and for a split without a
    row."""
    found = find_table_files(data)
    wanted = split if split in found else "train" if split == "validation" and "train" in found else ""
    rows: list[dict[str, Any]] = []
    row_names: list[str] = []
    for file in found.get(wanted, ()):
        for record in read_records(file, quoting=data.quoting, header=data.header):
            rows.append(record.values)
            row_names.append(name_of(file, record.line))
    divided = wanted == "" or (wanted == "train" and "validation" not in found)
    if divided and rows:
        test = 0.0 if wanted else data.split.test
        hashes = np.array(
            [xxhash.xxh3_64_intdigest(json.dumps(row, default=str).encode()) for row in rows], np.uint64
        )
        numbers = split_of(hashes, data.split.validation, test)
        chosen = np.flatnonzero(numbers == ("train", "validation", "test").index(split))
        rows, row_names = [rows[i] for i in chosen], [row_names[i] for i in chosen]
    if not rows:
        where = ", ".join(data.files.values())
        raise DataError(Problem(where, f"an empty split {split!r}", "1 row or more", f"give data.{split}=…"))
    return _of_rows(rows, row_names, data)


def _of_rows(
    rows: Sequence[Mapping[str, Any]], row_names: Sequence[str], data: ColumnDataConfig
) -> ColumnRows:
    names = [name for name in rows[0] if name not in (data.label_field, *data.ignored)]
    if data.numeric and data.categorical:
        names = [*data.numeric, *data.categorical]
    for name in (*data.numeric, *data.categorical, *data.ignored):
        if name not in rows[0]:
            raise DataError(Problem("data", f"no column {name}", nearest(name, list(rows[0]))))
    columns: dict[str, list[str]] = {name: [] for name in names}
    labels = []
    for row, where in zip(rows, row_names, strict=True):
        try:
            label = _plain(field_of(row, data.label_field))
            for name in names:
                columns[name].append(_plain(field_of(row, name)))
        except ValueError as error:
            raise DataError(Problem(where, *phrases(error))) from error
        if not label:
            raise DataError(Problem(where, f"no value in {data.label_field}", "the row's class"))
        labels.append(label)
    return ColumnRows(columns, labels, row_names)


def _plain(value: Any) -> str:
    if isinstance(value, (dict, list)):
        raise ValueError(f"a {type(value).__name__}", "a number or a text")
    return "" if value is None else str(value).strip()


def measure(rows: ColumnRows, data: ColumnDataConfig) -> tuple[tuple[Column, ...], tuple[str, ...]]:
    """Return the columns of the training split, and its classes. Raise DataError for a column without a
    value, or one of numbers with a value that is none."""
    columns = tuple(_column(name, values, rows, data) for name, values in rows.columns.items())
    if not columns:
        raise DataError(Problem("data", f"no column besides {data.label_field}", "one or more to learn from"))
    labels = sorted(set(rows.labels), key=_in_order(rows.labels))
    if not 2 <= len(labels) <= MOST_CLASSES:
        got = f"{len(labels):,} different values in {data.label_field}"
        raise DataError(Problem("data.label_field", got, f"2 to {MOST_CLASSES:,} classes"))
    return columns, tuple(labels)


def _column(name: str, values: Sequence[str], rows: ColumnRows, data: ColumnDataConfig) -> Column:
    given = [value for value in values if value]
    if not given:
        got, remedy = f"column {short_name(name)} without a value", f"give data.ignored=[{short_name(name)}]"
        raise DataError(Problem(", ".join(data.files.values()), got, "values in each column", remedy))
    is_numeric = _are_numbers(given)
    if name in data.numeric:
        for value, where in zip(values, rows.row_names, strict=True):
            if value and _number(value) is None:
                raise DataError(Problem(where, f"{short_name(value)} in {name}", "a number"))
    elif data.numeric or name in data.categorical or not is_numeric:
        categories = sorted(set(given), key=_in_order(given))
        if len(categories) > MOST_CATEGORIES:
            got = f"{len(categories):,} different values in {short_name(name)}"
            remedy = f"give data.ignored=[{short_name(name)}]"
            raise DataError(Problem("data", got, f"up to {MOST_CATEGORIES:,} categories", remedy))
        return Column(name, categories=tuple(categories))
    numbers = np.array([float(value) for value in given])
    return Column(name, float(numbers.mean()), float(numbers.std()) or 1.0)


def _number(value: str) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _are_numbers(values: Sequence[str]) -> bool:
    return all(_number(value) is not None for value in values)


def _in_order(values: Sequence[str]) -> Callable[[str], Any]:
    """Return a key that sorts values by size if all are numbers, else as texts."""
    return (lambda value: (float(value), value)) if _are_numbers(values) else str


def encode_rows(rows: ColumnRows, columns: Sequence[Column]) -> np.ndarray:
    """Return the rows as float32 (N, I): numbers standardized, categories one-hot; a category that the
    training split lacked has no number of its own. Raise DataError for a column that is not there, and for a
    value in place of a number."""
    parts = []
    for column in columns:
        if column.name not in rows.columns:
            got = f"no column {short_name(column.name)}"
            raise DataError(Problem("data", got, nearest(column.name, list(rows.columns))))
        values = rows.columns[column.name]
        if column.categories:
            number_of = {category: number for number, category in enumerate(column.categories)}
            part = np.zeros((len(values), len(column.categories)), np.float32)
            known = [(row, number_of[value]) for row, value in enumerate(values) if value in number_of]
            part[tuple(np.array(known, np.int64).reshape(-1, 2).T)] = 1.0
        else:
            numbers = [column.mean if not value else _number(value) for value in values]
            if None in numbers:
                row = numbers.index(None)
                got = f"{short_name(values[row])} in {short_name(column.name)}"
                raise DataError(Problem(rows.row_names[row], got, "a number"))
            part = ((np.array(numbers, np.float64) - column.mean) / column.std).astype(np.float32)[:, None]
        parts.append(part)
    return np.concatenate(parts, axis=1)


def number_labels(rows: ColumnRows, classes: Sequence[str]) -> np.ndarray:
    """Return the number of each row's class, int64 (N,). Raise DataError for a class that the training split
    lacked."""
    numbers = {name: number for number, name in enumerate(classes)}
    for label, where in zip(rows.labels, rows.row_names, strict=True):
        if label not in numbers:
            got = f"the label {short_name(label)}"
            raise DataError(
                Problem(where, got, nearest(label, list(classes)), "the training split has no such")
            )
    return np.array([numbers[label] for label in rows.labels], np.int64)
