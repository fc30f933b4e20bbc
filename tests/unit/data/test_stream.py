import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from torch.distributed import HashStore

from llmtrain.corpus.corpus import Corpus
from llmtrain.data.datasets.base import EMPTY, TokenSequences
from llmtrain.data.loader import Loader
from llmtrain.data.mixture import begin, sample_shares
from llmtrain.data.stream import Agree, Stream, combine_digests, digest
from llmtrain.distributed.set_union import SetUnion
from llmtrain.errors import DataError
from tests.support.corpora import random_documents, write_corpus

G = 6


def open_source(path: Path, seed: int, num_documents: int = 60, on_bad_tar: str = "error") -> TokenSequences:
    if not path.exists():
        write_corpus(path, {"train": random_documents(num_documents, seed)}, samples_per_tar=2)
    corpus = Corpus.open(path, "checksum", on_bad_tar=on_bad_tar)  # type: ignore[arg-type]
    return TokenSequences(corpus.split("train"), 16)


def make_stream(sources: dict[str, TokenSequences], **options) -> Stream:
    shares = sample_shares(dict.fromkeys(sources, 1.0), dict.fromkeys(sources, 1.0))
    timeline = begin(options.pop("global_size", G), shares, {})
    return Stream(sources, timeline, seed=3, **{"shuffle_tars": 2, **options})


def read(stream: Stream, step: int, data_size: int = 1) -> tuple[int, list[tuple[int, int, int]]]:
    """The step's digest, and (source, epoch, index) of each sample, put together from all ranks' shares."""
    total, found = 0, []
    samples = stream.samples(step)
    share = len(samples) // data_size
    for rank in range(data_size):
        part = samples[rank * share : (rank + 1) * share]
        places = stream.origins(part, step, stream.enter(step))
        total += digest(stream.get(places), part)
        found += list(
            zip(*(a.tolist() for a in (places.sources, places.epochs, places.indices)), strict=True)
        )
    return combine_digests(total), found


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, TokenSequences]:
    return {name: open_source(tmp_path / name, seed) for seed, name in enumerate("ab")}


def test_a_step_is_one_whatever_the_ranks(sources: dict[str, TokenSequences]):
    for step in (0, 1, 7, 50, 10**7):
        alone = read(make_stream(sources), step)
        assert [read(make_stream(sources), step, data_size) for data_size in (2, 3, 6)] == [alone] * 3


def test_each_epoch_of_each_source_holds_everything_once(sources: dict[str, TokenSequences]):
    stream = make_stream(sources)
    found = [sample for step in range(60) for sample in read(stream, step)[1]]
    for source, dataset in enumerate(sources.values()):
        for epoch in range(2):
            indices = [index for s, e, index in found if (s, e) == (source, epoch)]
            assert sorted(indices) == list(range(len(dataset)))


def test_sources_of_one_size_are_not_read_in_one_order(tmp_path: Path):
    source = open_source(tmp_path / "a", 0)
    stream = make_stream({"a": source, "b": source})
    found = [sample for step in range(5) for sample in read(stream, step)[1]]
    a, b = ([index for s, _, index in found if s == source] for source in (0, 1))
    assert a[:10] != b[:10]


def test_digests_tell_content_and_place_apart():
    rows = np.arange(8).reshape(2, 4)
    whole = digest({"tokens": rows}, range(5, 7))
    assert (
        combine_digests(digest({"tokens": rows[:1]}, range(5, 6)) + digest({"tokens": rows[1:]}, range(6, 7)))
        == whole
    )
    assert digest({"tokens": rows[::-1]}, range(5, 7)) != whole
    assert digest({"tokens": rows}, range(6, 8)) != whole
    changed = rows.copy()
    changed[1, 3] += 1
    assert digest({"tokens": changed}, range(5, 7)) != whole
    assert digest({"numbers": np.arange(3)}, range(3)) > 0
    assert whole < 2**48


def test_progress_counts_epochs_by_source(sources: dict[str, TokenSequences]):
    assert make_stream({"": sources["a"]}).progress(0) == {"epoch": 0.0}
    progress = make_stream(sources).progress(30)
    assert set(progress) == {"epoch_a", "epoch_b"}
    assert progress["epoch_a"] == pytest.approx(90 / len(sources["a"]), abs=0.1)
    assert "a: train: " in make_stream(sources).describe()


def test_the_last_step_of_an_epoch_may_be_dropped(sources: dict[str, TokenSequences]):
    dataset = sources["a"]
    stream = make_stream({"": dataset}, drop_last=True, global_size=7)
    steps = len(dataset) // 7
    for epoch in range(2):
        found = [s for step in range(epoch * steps, (epoch + 1) * steps) for s in read(stream, step)[1]]
        assert {e for _, e, _ in found} == {epoch}
        assert len({index for _, _, index in found}) == steps * 7
    with pytest.raises(DataError, match=r"data\.drop_last: got true with .* samples and steps of 1,000"):
        make_stream({"": dataset}, drop_last=True, global_size=1000)


def damage(path: Path, tar: int) -> None:
    file = path / "train" / f"train-{tar:06d}.tar"
    content = bytearray(file.read_bytes())
    content[700] ^= 1
    file.write_bytes(content)


def test_a_bad_tar_is_an_error_that_names_it(tmp_path: Path):
    source = open_source(tmp_path / "a", 0)
    (tmp_path / "a" / "train" / "train-000002.tar").unlink()
    stream = make_stream({"": source})
    with pytest.raises(DataError, match=r"train-000002\.tar: got no such file"):
        _ = [read(stream, step) for step in range(50)]


def test_a_bad_tar_may_be_skipped_without_moving_the_others(tmp_path: Path):
    path = tmp_path / "a"
    whole = make_stream({"": open_source(path, 0)})
    damage(path, 2)
    told: list[tuple[str, int]] = []
    source = open_source(path, 0, on_bad_tar="skip")
    stream = make_stream({"": source}, on_bad_tar="skip", on_skip=lambda *facts: told.append(facts))
    first = int(source.tar_sizes[:2].sum())
    bad = range(first, first + int(source.tar_sizes[2]))
    met = 0
    for step in range(len(source) // G):
        _, expected = read(whole, step)
        _, found = read(stream, step)
        for (_, _, index), (_, _, instead) in zip(expected, found, strict=True):
            assert instead == (EMPTY if index in bad else index)
            met += index in bad
    assert met == len(bad)
    assert told == [(source.tar_names[2], len(bad))]


def test_no_tar_that_can_be_read(tmp_path: Path):
    path = tmp_path / "a"
    open_source(path, 0, num_documents=8)
    damage(path, 0)
    stream = make_stream({"": open_source(path, 0, on_bad_tar="skip")}, on_bad_tar="skip")
    with pytest.raises(DataError, match="no readable one of 1 tar files"):
        stream.enter(0)


def test_an_epoch_of_bad_tars_alone_is_refused(tmp_path: Path):
    """Even where a block has one tar file."""
    path = tmp_path / "a"
    source = open_source(path, 0, num_documents=40)
    for tar in range(len(source.tar_sizes)):
        damage(path, tar)
    source = open_source(path, 0, on_bad_tar="skip")
    stream = make_stream({"": source}, on_bad_tar="skip", shuffle_tars=1)
    with pytest.raises(DataError, match=f"no readable one of {len(source.tar_sizes)} tar files"):
        _ = [stream.enter(step) for step in range(len(source))]


def test_a_source_read_fast_does_not_make_another_forget_its_blocks(tmp_path: Path):
    """A tiny source enters block after block; what was said of the large one is not said again."""
    large, tiny = open_source(tmp_path / "a", 0), open_source(tmp_path / "b", 1, num_documents=2)
    damage(tmp_path / "a", 0)
    told: list[str] = []
    source = open_source(tmp_path / "a", 0, on_bad_tar="skip")
    timeline = begin(100, {"a": 0.01, "b": 0.99}, {})
    stream = Stream(
        {"a": source, "b": tiny},
        timeline,
        seed=3,
        shuffle_tars=len(large.tar_sizes),
        on_bad_tar="skip",
        on_skip=lambda tar, _: told.append(tar),
    )
    for step in range(4):
        stream.enter(step)
    assert told == [source.tar_names[0]]


@pytest.mark.parametrize("workers", [1, 3])
def test_ranks_skip_alike_what_one_cannot_read(tmp_path: Path, workers: int):
    """Each rank reads a copy of its own, with several threads that come to blocks in any order."""
    store = HashStore()
    agreement: Agree = SetUnion(store, 2)
    streams = []
    for rank in range(2):
        path = tmp_path / f"{rank}" / "a"
        open_source(path, 0)
        damage(path, 1 + 3 * rank)
        source = open_source(path, 0, on_bad_tar="skip")
        streams.append(make_stream({"": source}, on_bad_tar="skip", agree=agreement))
    found: dict[tuple[int, int], tuple[int, list[tuple[int, int, int]]]] = {}

    def work(rank: int, steps: Sequence[int]) -> None:
        for step in steps:
            found[rank, step] = read(streams[rank], step)

    num_steps = 40
    threads = [
        threading.Thread(target=work, args=(rank, range(worker, num_steps, workers)))
        for rank in range(2)
        for worker in range(workers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[0, step] for step in range(num_steps)] == [found[1, step] for step in range(num_steps)]
    skipped = sum(index == EMPTY for step in range(num_steps) for _, _, index in found[0, step][1])
    assert skipped > 0


def test_a_thread_that_waits_for_other_ranks_ends_with_its_loader(tmp_path: Path):
    """Read-ahead comes to a block that the other rank, which has ended, will never ask for."""
    path = tmp_path / "a"
    source = open_source(path, 0, on_bad_tar="skip")
    store = HashStore()
    streams = [
        make_stream({"": source}, on_bad_tar="skip", shuffle_tars=1, agree=SetUnion(store, 2))
        for _ in range(2)
    ]
    loaders = [Loader(stream, lambda raw: {}, micro_size=G, workers=2) for stream in streams]
    first_block = int(source.tar_sizes[0]) // G
    other = threading.Thread(target=lambda: [streams[1].enter(step) for step in range(max(1, first_block))])
    other.start()
    steps = loaders[0].steps()
    next(steps)
    other.join(30)
    steps.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]
