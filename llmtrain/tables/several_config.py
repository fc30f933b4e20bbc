"""The section `data` of a run over several tasks: a table for each. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from llmtrain.config import encode, require
from llmtrain.corpus.config import CacheConfig, Locate, OneSource, TokenDataConfig
from llmtrain.errors import Problem, nearest
from llmtrain.tables.config import TableCacheConfig, TableDataConfig


@dataclass(frozen=True)
class TasksDataConfig(OneSource):
    """A table for each task of objective=multi_task."""

    has_text = True
    is_table = True

    tasks: Mapping[str, TableDataConfig]
    """Task → its table, with the keys of data=table."""
    corpora: Mapping[str, TokenDataConfig] = field(default_factory=dict)
    """Task over unlabelled text → its corpus, with the keys of data=tokens."""
    kind: Literal["tasks"] = "tasks"
    """Tables of several tasks."""
    temperature: float = 1.0
    """A task's share of the samples is proportional to its rows to train on, to the power of 1 / temperature.
    1: by size; large: evenly."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Task → its share of the samples; those that are not named divide the rest by `temperature`."""
    tokenizer: Path | None = None
    """A tokenizer, a corpus, a checkpoint or a Hugging Face folder; null: the one of `model.path`."""
    workers: int = 2
    """Threads that read ahead on each rank; 0 reads in the training thread. Never changes the order."""
    cache: TableCacheConfig = field(default_factory=TableCacheConfig)
    """The cache of tokens and labels."""

    def of_task(self, task: str) -> TableDataConfig | TokenDataConfig:
        """Return the data of a task, with what it has from all."""
        if task in self.corpora:
            return self.corpora[task]
        return replace(self.tasks[task], tokenizer=self.tokenizer, workers=self.workers, cache=self.cache)

    @property
    def paths(self) -> dict[str, str]:
        """Return task → where its rows are."""
        of_tables = {name: table.paths[""] for name, table in self.tasks.items()}
        return of_tables | {name: corpus.paths[""] for name, corpus in self.corpora.items()}

    @property
    def shuffle_tars(self) -> int:  # type: ignore[override]
        """Return the tar files among which sequences of text are shuffled."""
        return max((corpus.shuffle_tars for corpus in self.corpora.values()), default=1)

    def shares_of(self, sizes: Mapping[str, int]) -> dict[str, float]:
        """Return task → its share of the samples; the shares add up to 1. sizes: rows to train on."""
        rest = max(0.0, 1.0 - sum(self.shares.values()))
        weights = {
            name: (size / max(sizes.values())) ** (1 / self.temperature)
            for name, size in sizes.items()
            if name not in self.shares
        }
        total = sum(weights.values())
        return {
            name: self.shares[name] if name in self.shares else rest * weights[name] / total for name in sizes
        }

    def order_settings(self, sequence_length: int) -> dict[str, Any]:
        """Return the settings that determine the rows and their order."""
        return {"sequence_length": sequence_length, "shuffle_tars": self.shuffle_tars}

    @classmethod
    def reopened(
        cls, section: Mapping[str, Any], names: Sequence[str], order: Any, locate: Locate, cache: CacheConfig
    ) -> dict[str, Any]:
        """Return the section of a run with the present locations; the tokenizer is that of its checkpoints.
        See TokenDataConfig."""

        def of_task(name: str) -> Locate:
            return lambda split, recorded: locate(name if not split else f"{name}.{split}", recorded)

        tasks = {
            name: TableDataConfig.reopened(
                table, [""], replace(order, group=table.get("group", order.group)), of_task(name), cache
            )
            for name, table in section["tasks"].items()
        }
        corpora = {
            name: {**corpus, "path": locate(name, None), "cache": encode(cache)}
            for name, corpus in section.get("corpora", {}).items()
        }
        kept = {} if cache.dir == CacheConfig().dir else {"dir": str(cache.dir)}
        return {**section, "tasks": tasks, "corpora": corpora, "tokenizer": None, "cache": kept}

    def problems(self) -> Iterator[Problem]:
        yield from require(bool(self.tasks), "tasks", "{}", "a task or more", "give data.tasks.NAME.path=…")
        for name, table in self.tasks.items():
            if table.tokenizer is not None:
                allowed = "null: all tasks have data.tokenizer"
                yield Problem(f"tasks.{name}.tokenizer", str(table.tokenizer), allowed)
        for name, corpus in self.corpora.items():
            if name in self.tasks:
                yield Problem(f"corpora.{name}", "the name of a task of data.tasks", "another name")
            if corpus.mixture is not None:
                yield Problem(f"corpora.{name}.mixture", "a mixture", "null: one corpus for each task")
        names = [*self.tasks, *self.corpora]
        is_positive = 0.0 < self.temperature < float("inf")
        yield from require(is_positive, "temperature", self.temperature, "a positive number")
        yield from require(0 <= self.workers <= 256, "workers", self.workers, "0 to 256")
        for name, share in self.shares.items():
            if name not in names:
                yield Problem(f"shares.{name}", "no task", nearest(name, names))
            yield from require(0.0 < share <= 1.0, f"shares.{name}", share, "more than 0, up to 1")
        total = sum(self.shares.values())
        if set(names) <= set(self.shares):
            is_whole = not self.shares or abs(total - 1.0) < 1e-6
            yield from require(is_whole, "shares", dict(self.shares), "1 together, if all tasks have one")
        else:
            yield from require(total < 1.0, "shares", dict(self.shares), "less than 1 together")
