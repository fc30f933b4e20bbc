"""The timeline by which a fresh or resumed run draws samples, and the stream over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llmtrain.config import require
from llmtrain.data.config import DataConfig
from llmtrain.data.datasets.base import Dataset
from llmtrain.data.mixture import Segment, Timeline, begin, sample_shares
from llmtrain.data.stream import Agree, Stream, samples_of_epoch
from llmtrain.distributed import processes
from llmtrain.errors import CheckpointError, Problem
from llmtrain.reading import decode_file
from llmtrain.standard_streams import Say


class _Batch(Protocol):
    @property
    def global_size(self) -> int: ...
    @property
    def sequence_length(self) -> int: ...


class _Run(Protocol):
    @property
    def dir(self) -> object: ...


class Draws(Protocol):
    """The part of a run's config that determines which samples it draws."""

    @property
    def seed(self) -> int: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def batch(self) -> _Batch: ...
    @property
    def run(self) -> _Run: ...


@dataclass(frozen=True)
class Order:
    """The recorded `order_settings`, as far as they are read again."""

    seed: int
    samples: Mapping[str, int]
    fingerprints: Mapping[str, str]
    sequence_length: int = 1
    packing: str = "concat"
    overlap: int = 0
    shuffle_tars: int = 1
    drop_last: bool = False
    group: int = 64
    continued: bool = False

    def problems(self) -> Iterator[Problem]:
        length = self.sequence_length
        yield from require(1 <= length < 1 << 31, "sequence_length", length, "1 or more")
        yield from require(self.seed >= 0, "seed", self.seed, "0 or more")
        for name, count in self.samples.items():
            yield from require(count >= 1, f"samples.{name}", count, "1 or more")

    @staticmethod
    def of(segment: Segment, where: str) -> Order:
        """Read the settings of a segment of the file `where`. Raise CheckpointError if they are invalid."""
        return decode_file(Order, segment.settings, f"{where}: settings", CheckpointError)


def plan_timeline(
    config: Draws,
    sources: Mapping[str, Dataset],
    before: Sequence[Mapping[str, Any]] | None,
    start_step: int,
    say: Say,
) -> Timeline:
    """Return the timeline `before`, continued from `start_step` on as `config` says; `say` gets each change.

    before: the encoded timeline of the checkpoint that the run resumes from; None for a fresh run.
    Raise CheckpointError where the rows of a table have changed since.
    """
    settings = order_settings(config, sources)
    size = config.batch.global_size
    if before is None:
        timeline = begin(size, source_shares(config.data, sources, 0), settings)
    else:
        timeline = Timeline.decode(before)
        last = timeline.at(start_step)
        order = Order.of(last, "the checkpoint's timeline")
        if config.data.is_table:
            _refuse_other_rows(config, last.settings, settings, start_step)
        for line in _changes(last, size, source_shares(config.data, sources, start_step), settings):
            say(f"note: {line}")
        # When the rows of an epoch change, each source keeps its relative position in the epoch.
        were = _epoch_lengths(order.samples, order.drop_last, last.global_size)
        now = _epoch_lengths(settings["samples"], settings.get("drop_last", False), size)
        factors = {n: now[n] / were[n] for n in now if were.get(n, now[n]) != now[n]}
        if factors:
            timeline = timeline.rescaled(start_step, factors)
        timeline = timeline.changed(
            start_step, size, source_shares(config.data, sources, start_step), settings
        )
    for entry in config.data.curriculum:
        if entry.step > start_step:
            shares = source_shares(config.data, sources, entry.step)
            timeline = timeline.changed(entry.step, size, shares, settings)
    return timeline


def _refuse_other_rows(config: Draws, were: Mapping[str, Any], are: Mapping[str, Any], step: int) -> None:
    """Raise CheckpointError if the rows to train on are others under the same settings: a run of several
    epochs would be of neither file. Corpora may grow, since few runs read them twice."""
    if were["fingerprints"] == are["fingerprints"]:
        return
    if any(were.get(key) != are[key] for key in are if key not in ("samples", "fingerprints")):
        return  # the fingerprints change with the sequence length
    where = ", ".join(config.data.paths.values())
    got = f"{where}, whose rows to train on have changed since step {step:,} of {config.run.dir}"
    remedy = f"restore them, or begin another run.dir with model.path={config.run.dir}"
    raise processes.everywhere(
        CheckpointError(Problem("data.path", got, "the rows that the run began with", remedy))
    )


def open_stream(
    data: DataConfig,
    sources: Mapping[str, Dataset],
    timeline: Timeline,
    *,
    seed: int,
    agree: Agree | None = None,
    on_skip: Callable[[str, int], None] = lambda tar, samples: None,
    drop_last: bool | None = None,
) -> Stream:
    """Return the stream of a run's training samples. drop_last: None for that of the data."""
    return Stream(
        sources,
        timeline,
        seed=seed,
        shuffle_tars=data.shuffle_tars,
        drop_last=data.drop_last if drop_last is None else drop_last,
        continued=data.continued,
        on_bad_tar=data.on_bad_tar,
        agree=agree,
        on_skip=on_skip,
    )


def order_settings(config: Draws, sources: Mapping[str, Dataset]) -> dict[str, Any]:
    """Return the settings that determine the samples and their order, besides shares and steps."""
    data = config.data
    settings: dict[str, Any] = {
        "seed": config.seed,
        "samples": {name: len(dataset) for name, dataset in sources.items()},
        "fingerprints": {name: dataset.fingerprint for name, dataset in sources.items()},
    }
    return settings | data.order_settings(config.batch.sequence_length)


def _epoch_lengths(samples: Mapping[str, int], drop_last: bool, global_size: int) -> dict[str, int]:
    return {name: samples_of_epoch(count, global_size, drop_last) for name, count in samples.items()}


def source_shares(data: DataConfig, sources: Mapping[str, Dataset], step: int) -> dict[str, float]:
    """Return source → its share of the samples from `step` on; the shares add up to 1."""
    by_rows = data.shares_of({name: len(dataset) for name, dataset in sources.items()})
    if by_rows is not None:
        return by_rows
    tokens = {name: getattr(dataset, "tokens_per_sample", 1.0) for name, dataset in sources.items()}
    return sample_shares(data.weights(step), tokens)


def _changes(
    last: Segment, global_size: int, shares: Mapping[str, float], settings: Mapping[str, Any]
) -> list[str]:
    """Return a line for each change that a user should know about."""
    lines = []
    if last.global_size != global_size:
        change = f"batch.global_size was {last.global_size}, is {global_size}"
        epochs = "epochs end elsewhere, with data.drop_last"
        lines.append(f"{change}; {epochs if settings.get('drop_last') else 'no sample is lost by that'}")
    were, now = last.settings["fingerprints"], settings["fingerprints"]
    if added := sorted(set(now) - set(were)):
        if new := [name for name in added if not last.positions.get(name)]:
            lines.append(f"{', '.join(new)} joins the mixture at its beginning; the others continue")
        if back := [name for name in added if last.positions.get(name)]:
            lines.append(f"{', '.join(back)} joins the mixture again, from where it was; the others continue")
    if removed := sorted(set(were) - set(now)):
        lines.append(f"{', '.join(removed)} leaves the mixture")
    kept = set(now) & set(were)
    if not added and not removed and dict(last.shares) != dict(shares):
        lines.append("the mixture's weights have changed; each corpus continues where it was")
    keys = [key for key in settings if key not in ("samples", "fingerprints")]
    if other := [key for key in keys if settings[key] != last.settings.get(key)]:
        which = ", ".join(f"{key} (was {last.settings.get(key)}, is {settings[key]})" for key in other)
        lines.append(f"{which}; samples come in a new order from the same share of each epoch on")
    elif changed := sorted(name for name in kept if now[name] != were[name]):
        named = ", ".join(changed).strip() or "the corpus"
        lines.append(f"{named} has changed; its samples come in a new order")
    return lines
