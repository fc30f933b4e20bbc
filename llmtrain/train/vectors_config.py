"""The configuration of a run that trains word vectors, without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from llmtrain.checkpoint.config import CheckpointConfig
from llmtrain.config import decode, require
from llmtrain.distributed import launcher
from llmtrain.errors import ConfigError, Problem
from llmtrain.parallel.config import ParallelConfig
from llmtrain.track.config import TrackConfig
from llmtrain.train.config import RunConfig, TrainConfig
from llmtrain.train.time_limit import ALLOWED as TIME_ALLOWED
from llmtrain.train.time_limit import seconds_of
from llmtrain.vectors.config import TextsConfig, VectorsConfig, vectors_config_type


@dataclass(frozen=True)
class VectorOptimizerConfig:
    """Plain gradient descent, one word after the other; GloVe has AdaGrad (Duchi et al. 2011)."""

    name: Literal["sgd", "adagrad"] = "sgd"
    """That of the family; it cannot be chosen."""
    lr: float = 0.025
    """Learning rate at the beginning; that of sgd falls evenly over the run."""
    min_lr: float = 1e-4
    """Least learning rate of sgd, that at the end."""

    def problems(self) -> Iterator[Problem]:
        yield from require(0 < self.lr <= 10, "lr", self.lr, "more than 0, up to 10")
        yield from require(0 <= self.min_lr <= self.lr, "min_lr", self.min_lr, f"0 to lr={self.lr:g}")


@dataclass(frozen=True)
class VectorStepsConfig:
    """Length of the run, its threads, and how often progress is printed."""

    steps: int | None = None
    """Steps of the whole run, in place of `epochs`; null: those of the epochs."""
    epochs: int = 5
    """Times that the run goes over its text, or over its pairs of words."""
    threads: int | None = None
    """Threads that train at once on the same vectors; null: one for each core. With one thread two runs of a
    seed are equal bit by bit."""
    words_per_step: int = 1_000_000
    """Words of the text, or pairs, of a step. Metrics are recorded after each one, and a run stops and
    resumes between them."""
    log_every: int = 10
    """Steps between progress lines when the output is not a terminal; metrics are recorded every step."""
    time_limit: str | None = None
    """Time from the start of the job, HH:MM:SS or seconds, before whose end the run saves and stops with exit
    code 75; null: the job's own under Slurm, else none."""

    def problems(self) -> Iterator[Problem]:
        yield from require(self.steps is None or self.steps >= 1, "steps", self.steps, "1 or more, or null")
        yield from require(1 <= self.epochs < 1_000_000, "epochs", self.epochs, "1 or more")
        threads = self.threads
        yield from require(threads is None or 1 <= threads <= 1024, "threads", threads, "1 to 1024, or null")
        size = self.words_per_step
        yield from require(100 <= size <= 1 << 31, "words_per_step", size, f"100 to {1 << 31:,}")
        yield from require(self.log_every >= 1, "log_every", self.log_every, "1 or more")
        limit = self.time_limit
        yield from require(limit is None or (seconds_of(limit) or 0) > 0, "time_limit", limit, TIME_ALLOWED)


@dataclass(frozen=True)
class VectorRunConfig:
    """The keys of `llmtrain train` with model=word2vec, fasttext, glove or one_hot, in place of those
    above."""

    run: RunConfig
    model: VectorsConfig
    data: TextsConfig
    optimizer: VectorOptimizerConfig
    train: VectorStepsConfig
    checkpoint: CheckpointConfig
    track: TrackConfig
    parallel: ParallelConfig
    precision: Literal["fp32"] = "fp32"
    """Number format of the vectors."""
    engine: Literal["auto"] = "auto"
    """The kernel of word vectors."""
    seed: int = 0
    """Seed of the first vectors and of all that is drawn."""
    device: Literal["auto", "cpu"] = "auto"
    """Word vectors train on the CPU."""

    def problems(self) -> Iterator[Problem]:
        yield from require(0 <= self.seed < 1 << 63, "seed", self.seed, "0 or more")
        remote = self.checkpoint.remote
        yield from require(remote is None, "checkpoint.remote", remote, "null with word vectors")
        every = self.checkpoint.memory.every
        yield from require(every is None, "checkpoint.memory.every", every, "null with word vectors")
        given, usual = self.parallel, ParallelConfig()
        for field in fields(given):
            value, alone = getattr(given, field.name), getattr(usual, field.name)
            if value not in (alone, 1 if field.name == "data" else alone):
                allowed = f"{'null' if alone is None else alone} with model.family={self.model.family}"
                remedy = "one process trains word vectors, on train.threads threads"
                yield Problem(f"parallel.{field.name}", str(value), allowed, remedy)
        name = self.model.optimizer
        yield from require(
            self.optimizer.name == name,
            "optimizer.name",
            self.optimizer.name,
            f"{name} with model.family={self.model.family}",
        )


_OPTIMIZER = frozenset(field.name for field in fields(VectorOptimizerConfig))


def is_word_vectors(mapping: Mapping[str, Any]) -> bool:
    """Return whether a composed configuration is one of word vectors."""
    section = mapping.get("model")
    return isinstance(section, Mapping) and vectors_config_type(section) is not None


def refuse_word_vectors(mapping: Mapping[str, Any], verb: str) -> None:
    """Raise ConfigError for word vectors with a verb that is not for them."""
    if is_word_vectors(mapping):
        got = f"{mapping['model']['family']}, word vectors"
        remedy = "llmtrain train trains them, llmtrain vectors asks them"
        raise ConfigError(Problem("model.family", got, f"a model that llmtrain {verb} is for", remedy))


def decode_run(mapping: Mapping[str, Any]) -> VectorRunConfig:
    """Return the configuration of a run that trains word vectors.

    Raise ConfigError for a section or a layout that it cannot have, and as `decode` does."""
    section = dict(mapping.get("train") or {})
    steps = {field.name for field in fields(VectorStepsConfig)}
    section = {key: value for key, value in section.items() if value is not None or key in steps}
    family = mapping["model"]["family"]
    own = {field.name for field in fields(VectorRunConfig)}
    others = {field.name for field in fields(TrainConfig)} - own
    problems = [
        Problem(key, "a section or key that is given", f"none with model.family={family}", f"leave out {key}")
        for key, value in mapping.items()
        if key in others and value is not None
    ]
    if (size := launcher.world_size()) > 1:
        remedy = "start one process, which trains on train.threads threads"
        problems.append(Problem("launcher", f"{size} processes", f"1 with model.family={family}", remedy))
    known = {key: value for key, value in mapping.items() if key not in others}
    optimizer = known.get("optimizer")
    if isinstance(optimizer, Mapping) and len(foreign := set(optimizer) - _OPTIMIZER) > 1:
        # One line in place of one for each key of a preset such as optimizer=adam.
        got = f"an optimizer with {', '.join(sorted(foreign)[:3])}, …"
        allowed = f"{', '.join(sorted(_OPTIMIZER))} with model.family={family}"
        problems.append(Problem("optimizer", got, allowed, "leave out optimizer=…, and give optimizer.lr=…"))
        known["optimizer"] = {key: value for key, value in optimizer.items() if key in _OPTIMIZER}
    try:
        config = decode(VectorRunConfig, {**known, "train": section}, {"model": _type_of})
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(problems)
    return config


def _type_of(section: Mapping[str, Any]) -> type:
    found = vectors_config_type(section)
    assert found is not None, "is_word_vectors was asked"
    return found


def with_steps(config: VectorRunConfig, steps_per_epoch: int) -> VectorRunConfig:
    """Return the configuration with the steps of its epochs, where it names no steps."""
    steps = config.train.steps or config.train.epochs * steps_per_epoch
    return replace(config, train=replace(config.train, steps=steps))
