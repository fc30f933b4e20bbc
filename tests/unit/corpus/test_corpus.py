import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.corpus import location
from llmtrain.corpus.corpus import Corpus
from llmtrain.corpus.location import Folder
from llmtrain.corpus.manifest import STAMP_NAME
from llmtrain.corpus.token_split import TokenSplit
from tests.support.corpora import EOS, random_documents, stream_of, write_corpus

TRAIN, VALIDATION = random_documents(53, seed=1), random_documents(4, seed=2)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora") / "corpus"
    return write_corpus(folder, {"train": TRAIN, "validation": VALIDATION, "test": []})


def expected_ends(start: int, stop: int) -> list[int]:
    ends = np.flatnonzero(stream_of(TRAIN) == EOS) + 1
    return [int(end) - start for end in ends if start < end <= stop]


def test_manifest_and_totals(path: Path):
    corpus = Corpus.open(path)
    assert (corpus.manifest.vocab_size, corpus.manifest.eos_id, corpus.manifest.dtype) == (100, EOS, "uint16")
    assert corpus.tokenizer_path.read_bytes() == b"not a real model"
    train = corpus.split("train")
    assert train.num_documents == 53
    assert train.num_tokens == len(stream_of(TRAIN))
    assert train.num_bytes == 4 * sum(map(len, TRAIN))
    assert train.fingerprint == corpus.manifest.fingerprint


@settings(max_examples=200)
@given(data=st.data())
def test_any_window_is_the_stream_s(path: Path, data: st.DataObject):
    train = Corpus.open(path).split("train")
    start = data.draw(st.integers(0, train.num_tokens))
    stop = data.draw(st.integers(start, train.num_tokens))
    tokens, ends = train.read(start, stop)
    assert tokens.tolist() == stream_of(TRAIN)[start:stop].tolist()
    assert ends.tolist() == expected_ends(start, stop)


def test_a_window_outside_is_refused(path: Path):
    train = Corpus.open(path).split("train")
    for start, stop in ((-1, 3), (5, 4), (0, train.num_tokens + 1)):
        with pytest.raises(IndexError):
            train.read(start, stop)


def test_wide_token_ids(tmp_path: Path):
    documents = [[70_000, 2, 3_000_000_000]]
    path = write_corpus(tmp_path, {"train": documents}, vocab_size=2**32 - 1, dtype="uint32")
    tokens, _ = Corpus.open(path).split("train").read(0, 4)
    assert tokens.tolist() == [70_000, 2, 3_000_000_000, EOS]


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_open_files_are_bounded_and_closed(tmp_path: Path):
    documents = random_documents(40)
    path = write_corpus(tmp_path, {"train": documents}, documents_per_sample=1, samples_per_tar=1)
    split = TokenSplit(Folder(path), "train", Corpus.open(path).manifest, most_open=3)
    before = open_descriptors()
    tokens, _ = split.read(0, split.num_tokens)
    np.testing.assert_array_equal(tokens, stream_of(documents))
    assert open_descriptors() == before + 3
    del split
    assert open_descriptors() == before


def test_threads_read_the_same(tmp_path: Path):
    """With one file kept open, threads keep closing each other's."""
    documents = random_documents(40)
    path = write_corpus(tmp_path, {"train": documents}, documents_per_sample=2, samples_per_tar=1)
    split = TokenSplit(Folder(path), "train", Corpus.open(path).manifest, most_open=1)
    stream = stream_of(documents)
    wrong: list[int] = []

    def read(seed: int) -> None:
        for start in np.random.default_rng(seed).integers(0, len(stream) - 9, 300).tolist():
            if split.read(start, start + 9)[0].tolist() != stream[start : start + 9].tolist():
                wrong.append(start)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_checksums_are_taken_once(path: Path, monkeypatch: pytest.MonkeyPatch):
    (path / STAMP_NAME).unlink(missing_ok=True)
    read: list[str] = []
    real = location.checksum

    def recording(file: Path) -> str:
        read.append(file.name)
        return real(file)

    monkeypatch.setattr(location, "checksum", recording)
    Corpus.open(path, verify="checksum")
    shards = sorted(file.name for file in path.glob("*/*.tar"))
    assert len(shards) == 5
    assert sorted(read) == shards

    Corpus.open(path, verify="checksum")
    assert len(read) == len(shards)

    os.utime(path / "train" / shards[0])
    Corpus.open(path, verify="checksum")
    assert read[len(shards) :] == [shards[0]]


def test_of_many_that_start_together_one_takes_the_checksums(path: Path, monkeypatch: pytest.MonkeyPatch):
    (path / STAMP_NAME).unlink(missing_ok=True)
    read: list[str] = []
    real = location.checksum

    def slow(file: Path) -> str:
        read.append(file.name)
        time.sleep(0.02)
        return real(file)

    monkeypatch.setattr(location, "checksum", slow)
    threads = [threading.Thread(target=Corpus.open, args=(path, "checksum")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(read) == sorted(file.name for file in path.glob("*/*.tar"))


def test_a_stamp_that_is_not_ours_is_ignored(path: Path):
    for content in ("[1, 2]", "not json", '{"train/train-000000.tar": 3}'):
        (path / STAMP_NAME).write_text(content)
        Corpus.open(path, verify="checksum")
    assert (path / STAMP_NAME).read_text().startswith("{")
