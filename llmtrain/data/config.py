"""The section `data` of a configuration, in each of its forms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtrain.config import show
from llmtrain.corpus.config import ImageDataConfig, TokenDataConfig
from llmtrain.errors import ConfigError, Problem, nearest
from llmtrain.tables.columns_config import ColumnDataConfig
from llmtrain.tables.config import TableDataConfig
from llmtrain.tables.several_config import TasksDataConfig

DataConfig = TokenDataConfig | ImageDataConfig | ColumnDataConfig | TableDataConfig | TasksDataConfig
DataConfigType = (
    type[TokenDataConfig]
    | type[ImageDataConfig]
    | type[ColumnDataConfig]
    | type[TableDataConfig]
    | type[TasksDataConfig]
)

DATA_CONFIGS: dict[str, DataConfigType] = {
    "tokens": TokenDataConfig,
    "images": ImageDataConfig,
    "columns": ColumnDataConfig,
    "table": TableDataConfig,
    "tasks": TasksDataConfig,
}


def data_config_type(section: Mapping[str, Any]) -> DataConfigType:
    """Return the dataclass of a `data` section, by its `kind`. Raise ConfigError for an unknown kind."""
    kind = section.get("kind", "tokens")
    if not isinstance(kind, str) or kind not in DATA_CONFIGS:
        raise ConfigError(Problem("data.kind", show(kind), nearest(str(kind), list(DATA_CONFIGS))))
    return DATA_CONFIGS[kind]
