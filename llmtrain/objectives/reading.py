"""Check that data fits an objective, and open its datasets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llmtrain.corpus.config import CacheConfig, TokenDataConfig
from llmtrain.corpus.corpora import open_corpora
from llmtrain.corpus.text_source import TextSource
from llmtrain.data.config import DataConfig
from llmtrain.errors import Problem
from llmtrain.files import expand_home
from llmtrain.objectives.base import ObjectiveConfig
from llmtrain.tables.config import SPLITS, TableDataConfig
from llmtrain.tables.several_config import TasksDataConfig

if TYPE_CHECKING:
    from llmtrain.data.datasets.base import Dataset
    from llmtrain.objectives.multi_task import MultiTaskConfig
    from llmtrain.tables.build import TaskReader

_REMEDIES = {
    "tokens": "add data=tokens data.path=…",
    "images": "add data=mnist",
    "columns": "add data=columns data.path=…",
    "table": "add data=table data.path=…",
    "tasks": "add data=tasks data.tasks.NAME.path=…",
}


OVER = ("table", "tasks", "columns", "images")
"""Kinds of data of a run whose section an evaluation starts from."""


def data_problems(objective: ObjectiveConfig, data: DataConfig) -> list[Problem]:
    """Return a problem if the objective cannot learn from this kind of data."""
    if objective.reads(data.kind):
        return list(objective.data_problems(data))
    got = f"{data.kind!r} with objective.kind={objective.kind}"
    return [Problem("data.kind", got, objective.data, _REMEDIES[objective.data])]


def corpora_problems(objective: ObjectiveConfig, corpora: TextSource | None) -> list[Problem]:
    """Return a problem if the corpora hold pairs and the objective needs single texts, or the reverse."""
    if corpora is None or objective.paired == "taken" or corpora.paired == (objective.paired == "needed"):
        return []
    if objective.paired == "needed":
        got, allowed = f"{corpora.where}, a corpus of single texts", f"pairs with objective={objective.kind}"
        remedy = "prepare it with target_field=… or target_source=…, or give another objective=…"
    else:
        got, allowed = f"{corpora.where}, a corpus of pairs", "single texts with this objective"
        remedy = "give an encoder-decoder with objective=seq2seq, or prepare the texts without target_field"
    return [Problem("data.path", got, allowed, remedy)]


def other_tokenizer(
    data: DataConfig | None, ours: str, theirs: str, where: str, path: Path | None
) -> Problem:
    """Return the problem of data with another tokenizer than a model's.

    ours, theirs: sha256 of the data's and of the model's; where: what holds the model; path: its tokenizer.
    """
    got, allowed = f"another tokenizer ({ours[:12]}…)", f"the tokenizer of {where} ({theirs[:12]}…)"
    if data is not None and data.is_table:
        return Problem("data.tokenizer", got, allowed, "leave it out: the model brings its own")
    remedy = f"prepare it with tokenizer.model={path}"
    return Problem("data.path", f"data prepared with {got}", allowed, remedy)


def open_data(
    objective: ObjectiveConfig, data: DataConfig, tokenizer: Path | None = None
) -> TextSource | None:
    """Return the corpora of the `data` section, or its table; None for images and columns.

    tokenizer: the model's, where a table's section names none.
    Raise DataError if they cannot be read.
    """
    if isinstance(data, TableDataConfig):
        from llmtrain.tables.table import open_table

        return open_table(data, cast("TaskReader", objective), tokenizer)
    if isinstance(data, TasksDataConfig):
        from llmtrain.tables.several import open_tables

        return open_tables(data, cast("MultiTaskConfig", objective).tasks, tokenizer)
    return open_corpora(data) if isinstance(data, TokenDataConfig) else None


def data_of_plan(
    section: Mapping[str, Any], objective: Mapping[str, Any] | None, path: str
) -> tuple[Mapping[str, Any], bool]:
    """Return the section `data` of a plan, with `path` in place of data that it does not name, and whether it
    names none. objective: the section of the objective."""
    is_of_tasks = section.get("kind") == "tasks"
    if is_of_tasks:  # the plan's own default is a path
        section = {key: value for key, value in section.items() if key != "path"}
    if any(section.get(key) for key in ("path", "mixture", "tasks", "train")):
        return section, False
    if not is_of_tasks:
        return {**section, "path": path}, True
    of_tasks: dict[str, dict[str, Any]] = {"tasks": {}, "corpora": {}}
    for name, task in ((objective or {}).get("tasks") or {}).items():
        of_tasks["corpora" if task.get("kind") == "mlm" else "tasks"][name] = {"path": path}
    return {**section, **of_tasks}, True


def data_section(
    section: Mapping[str, Any], objective: ObjectiveConfig, recorded: Mapping[str, Any] | None
) -> Mapping[str, Any]:
    """Return the section `data` for a trained model: of a fine-tuned one, that of its run, with the files and
    the keys of tables that are given in `section`, which has the defaults of token data."""
    kind = None if recorded is None else recorded.get("kind")
    if recorded is None or kind not in OVER or section.get("kind") == kind:
        return section
    cache = (section.get("cache") or {}).get("dir")
    has_cache = cache is not None and expand_home(cache) != expand_home(CacheConfig().dir)
    if kind == "tasks":
        tables = {name: _with_files(table, SPLITS) for name, table in (section.get("tasks") or {}).items()}
        return _over(recorded, {"tasks": tables, **({"cache": {"dir": cache}} if has_cache else {})})
    usual = {field.name for field in fields(TokenDataConfig)}
    given = {key: value for key, value in section.items() if key not in usual}
    if section.get("path") is not None:
        given["path"] = section["path"]
    given = _with_files(given, [key for key in SPLITS if key in recorded])
    if has_cache:
        given["cache"] = {"dir": cache}
    return {**recorded, **{key: _within(recorded.get(key), value) for key, value in given.items()}}


def _with_files(given: dict[str, Any], splits: Sequence[str]) -> dict[str, Any]:
    """Return the keys of a table that are given; where files are, they are the only ones.

    splits: the keys of files of one split that the table has."""
    if any(given.get(key) is not None for key in ("path", *splits)):
        return {**dict.fromkeys(("path", *splits)), **given}
    return given


def _over(before: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return sections with the keys that are given over those before, at every depth."""
    both = {
        key: _over(before[key], value)
        for key, value in given.items()
        if isinstance(value, Mapping) and isinstance(before.get(key), Mapping)
    }
    return {**before, **given, **both}


def _within(before: Any, given: Any) -> Any:
    """Return a value that is given; of a section, the keys that are given over those before."""
    if isinstance(before, Mapping) and isinstance(given, Mapping):
        return {**before, **given}
    return given


def open_dataset(
    objective: ObjectiveConfig,
    model: Any,
    data: DataConfig,
    corpora: TextSource | None,
    split: str,
    sequence_length: int,
    on_skip: Callable[[str, int], None] = lambda file, samples: None,
) -> Dataset:
    """Return the samples of one split of all corpora, for evaluation.

    on_skip: called with (file, samples) for each damaged tar file that data.on_bad_tar=skip leaves out.
    Raise DataError if they cannot be read.
    """
    from llmtrain.data.datasets.base import Concatenation, WithoutBadTars

    sources = objective.open(model, data, corpora, split, sequence_length)
    if data.on_bad_tar == "skip":
        sources = {name: WithoutBadTars(dataset, on_skip) for name, dataset in sources.items()}
    return next(iter(sources.values())) if len(sources) == 1 else Concatenation(sources)
