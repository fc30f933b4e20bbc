"""Check that data fits an objective, and open its datasets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llmtrain.corpus.config import TokenDataConfig
from llmtrain.corpus.corpora import open_corpora
from llmtrain.corpus.text_source import TextSource
from llmtrain.data.config import DataConfig
from llmtrain.errors import Problem
from llmtrain.objectives.base import ObjectiveConfig
from llmtrain.tables.config import TableDataConfig

if TYPE_CHECKING:
    from llmtrain.data.datasets.base import Dataset
    from llmtrain.tables.build import TaskReader

_REMEDIES = {
    "tokens": "add data=tokens data.path=…",
    "images": "add data=mnist",
    "table": "add data=table data.path=…",
}


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


def open_data(
    objective: ObjectiveConfig, data: DataConfig, tokenizer: Path | None = None
) -> TextSource | None:
    """Return the corpora of the `data` section, or its table; None for images.

    tokenizer: the model's, where a table's section names none.
    Raise DataError if they cannot be read.
    """
    if isinstance(data, TableDataConfig):
        from llmtrain.tables.table import open_table

        return open_table(data, cast("TaskReader", objective), tokenizer)
    return open_corpora(data) if isinstance(data, TokenDataConfig) else None


def data_section(
    section: Mapping[str, Any], objective: ObjectiveConfig, recorded: Mapping[str, Any] | None
) -> Mapping[str, Any]:
    """Return the section `data` for a trained model: of a fine-tuned one, that of its run, with the files
    that are given."""
    if section.get("kind") == "table" or recorded is None or recorded.get("kind") != "table":
        return section
    path = section.get("path")
    given = {} if path is None else {"path": path, "train": None, "validation": None, "test": None}
    return {**recorded, **given}


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

    on_skip: called with (file, samples) for each damaged tar file that data.on_bad_shard=skip leaves out.
    Raise DataError if they cannot be read.
    """
    from llmtrain.data.datasets.base import Concatenation, WithoutBadTars

    sources = list(objective.open(model, data, corpora, split, sequence_length).values())
    if data.on_bad_shard == "skip":
        sources = [WithoutBadTars(dataset, on_skip) for dataset in sources]
    return sources[0] if len(sources) == 1 else Concatenation(sources)
