"""The opened tables of several tasks. They answer what a run asks of its corpora."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import xxhash

from llmtrain.corpus.corpora import Corpora, open_corpora
from llmtrain.errors import DataError, Problem
from llmtrain.tables.several_config import TasksDataConfig
from llmtrain.tables.table import Table, open_table
from llmtrain.tokenizers.base import Tokenizer


class Tables:
    """A table or a corpus for each task, all with one tokenizer."""

    paired = False

    def __init__(self, by_name: Mapping[str, Table | Corpora]) -> None:
        """by_name: task → its table or corpus; one or more."""
        self.by_name = by_name
        self._first = next(iter(by_name.values()))
        self.where = ", ".join(table.where for table in by_name.values())

    @property
    def tokenizer_path(self) -> Path:
        return self._first.tokenizer_path

    def load_tokenizer(self) -> Tokenizer:
        return self._first.load_tokenizer()

    @property
    def tokenizer_sha256(self) -> str:
        return self._first.tokenizer_sha256

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Role → id, as in the tokenizer."""
        return self._first.special_ids

    @property
    def sentinel_ids(self) -> tuple[int, ...]:
        return self._first.sentinel_ids

    @property
    def eos_id(self) -> int:
        return self._first.eos_id

    @property
    def vocab_size(self) -> int:
        return self._first.vocab_size

    @property
    def fingerprint(self) -> str:
        """Hex; changes with any token and label of any table."""
        said = "/".join(f"{name}={table.fingerprint}" for name, table in self.by_name.items())
        return xxhash.xxh3_128_hexdigest(said.encode())

    def without(self, split: str) -> list[str]:
        """Return the tasks that have no rows in the split."""
        return [name for name, table in self.by_name.items() if table.without(split)]

    def counters(self) -> dict[str, float]:
        """Return metrics of this process, summed over all tasks."""
        total: dict[str, float] = {}
        for source in self.by_name.values():
            for name, value in source.counters().items():
                total[name] = total.get(name, 0.0) + value
        return total

    def close(self) -> None:
        """End work in the background."""
        for source in self.by_name.values():
            source.close()


def _of_task(problem: Problem, name: str, data: TasksDataConfig) -> Problem:
    """Return the problem with a key of the section `data` as one of the task's own data."""
    section, _, key = problem.where.partition(".")
    if section != "data" or key == "tokenizer":
        return problem
    return replace(problem, where=f"data.{'corpora' if name in data.corpora else 'tasks'}.{name}.{key}")


def open_tables(data: TasksDataConfig, tasks: Mapping[str, Any], tokenizer: Path | None) -> Tables:
    """Open the data of each task; tokenize what was not tokenized before.

    tasks: TaskReader of each table; others have a corpus. tokenizer: the model's, where `data.tokenizer` is
    null.
    Raise DataError for files, rows or labels that cannot be used, and for a corpus of another tokenizer.
    """
    found: dict[str, Table | Corpora] = {}
    problems: list[Problem] = []
    for name, task in tasks.items():
        try:
            if name in data.corpora:
                found[name] = open_corpora(data.corpora[name])
            else:
                found[name] = open_table(data.of_task(name), task, tokenizer)  # type: ignore[arg-type]
        except DataError as error:
            problems += [_of_task(problem, name, data) for problem in error.problems]
    if problems:
        raise DataError(problems)
    table = next(found[name] for name in tasks if name not in data.corpora)
    for name in data.corpora:
        if found[name].tokenizer_sha256 != table.tokenizer_sha256:
            allowed = f"the tokenizer of {table.tokenizer_path}"
            got = f"a corpus of another tokenizer, {found[name].where}"
            remedy = f"prepare it with tokenizer.model={table.tokenizer_path}"
            raise DataError(Problem(f"data.corpora.{name}", got, allowed, remedy))
    return Tables(found)
