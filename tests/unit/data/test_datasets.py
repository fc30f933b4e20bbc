from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.corpus.corpus import Corpus
from llmtrain.corpus.token_split import TokenSplit
from llmtrain.data.datasets.base import (
    EMPTY,
    PADDING_DOCUMENT,
    Concatenation,
    TokenSequences,
    WithoutBadTars,
)
from llmtrain.errors import DataError
from tests.support.corpora import EOS, random_documents, stream_of, write_corpus

TRAIN = random_documents(30, seed=3)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpora") / "corpus"
    return Corpus.open(write_corpus(folder, {"train": TRAIN, "validation": TRAIN[:3], "test": [[]]}))


@settings(max_examples=60)
@given(sequence_length=st.integers(1, 900))
def test_windows_cover_every_target_once(corpus: Corpus, sequence_length: int):
    """Each token whose predecessor is in its own document is a target in exactly one sample."""
    dataset = TokenSequences(corpus.split("train"), sequence_length)
    sample = dataset.get(np.arange(len(dataset)))
    tokens_MW, documents_MW = sample["tokens"], sample["documents"]
    assert tokens_MW.dtype == np.int64
    assert documents_MW.dtype == np.int32
    assert tokens_MW.shape == documents_MW.shape == (len(dataset), sequence_length + 1)

    is_target = (documents_MW[:, 1:] == documents_MW[:, :-1]) & (documents_MW[:, 1:] >= 0)
    pairs = np.stack([tokens_MW[:, :-1][is_target], tokens_MW[:, 1:][is_target]], axis=1)
    stream = stream_of(TRAIN)
    inside = stream[:-1] != EOS
    np.testing.assert_array_equal(pairs, np.stack([stream[:-1][inside], stream[1:][inside]], axis=1))


@settings(max_examples=60, deadline=None)
@given(sequence_length=st.integers(2, 60), overlap=st.integers(0, 20), seed=st.integers(0, 7))
def test_best_fit_rows_hold_every_target_once(corpus: Corpus, sequence_length: int, overlap: int, seed: int):
    """Whatever parts of long documents share; and no row sees two documents as one."""
    overlap = min(overlap, sequence_length - 1)
    dataset = TokenSequences(corpus.split("train"), sequence_length, packing="best_fit", overlap=overlap)
    sample = dataset.get(np.random.default_rng(seed).permutation(len(dataset)))
    tokens_MW, documents_MW = sample["tokens"], sample["documents"]
    is_target = (documents_MW[:, 1:] == documents_MW[:, :-1]) & (documents_MW[:, 1:] >= 0)
    assert ("contexts" in sample) == (overlap > 0)
    if overlap:
        is_target &= ~sample["contexts"][:, 1:]
    pairs = np.stack([tokens_MW[:, :-1][is_target], tokens_MW[:, 1:][is_target]], axis=1).tolist()
    stream = stream_of(TRAIN)
    inside = stream[:-1] != EOS
    assert sorted(pairs) == sorted(np.stack([stream[:-1][inside], stream[1:][inside]], axis=1).tolist())


def test_best_fit_keeps_short_documents_whole(corpus: Corpus):
    dataset = TokenSequences(corpus.split("train"), 80, packing="best_fit")
    sample = dataset.get(np.arange(len(dataset)))
    found = []
    for tokens, documents in zip(sample["tokens"], sample["documents"], strict=True):
        found += [tuple(tokens[documents == d]) for d in range(documents.max() + 1)]
    assert sorted(found) == sorted((*document, EOS) for document in TRAIN)
    concat = TokenSequences(corpus.split("train"), 80)
    assert len(dataset) <= len(concat) * 1.3
    assert dataset.fingerprint != concat.fingerprint


def test_rows_are_counted_once_a_host(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = TokenSequences(corpus.split("train"), 33, packing="best_fit", cache=tmp_path)
    (kept,) = (tmp_path / "rows").glob("*.counts")
    monkeypatch.setattr(TokenSplit, "document_lengths", lambda split: pytest.fail("counted again"))
    again = TokenSequences(corpus.split("train"), 33, packing="best_fit", cache=tmp_path)
    assert again.tar_sizes.tolist() == first.tar_sizes.tolist()
    assert again.padding == first.padding
    kept.unlink()


def test_where_names_the_documents_of_a_sample(corpus: Corpus):
    split = corpus.split("train")
    for packing in ("concat", "best_fit"):
        dataset = TokenSequences(split, 32, packing=packing)
        for index in range(len(dataset)):
            row = dataset.get(np.array([index]))
            documents = dataset.where(index)
            sizes = np.bincount(row["documents"][0][row["documents"][0] >= 0])
            assert [tokens for _, _, tokens in documents] == sizes.tolist()
            first = 0
            for tar, number, tokens in documents:
                place = split.tar_names.index(tar)
                lengths = split.lengths_of(place)
                begin = int(split.tar_starts[place] + lengths[:number].sum())
                document = split.read(begin, begin + int(lengths[number]))[0].tolist()
                found = row["tokens"][0][first : first + tokens].tolist()
                assert any(document[i : i + tokens] == found for i in range(len(document) - tokens + 1))
                first += tokens


def test_datasets_one_behind_the_other(corpus: Corpus):
    parts = [TokenSequences(corpus.split(name), 16) for name in ("validation", "train")]
    both = Concatenation(dict(zip("ab", parts, strict=True)))
    assert len(both) == sum(map(len, parts))
    assert int(both.tar_sizes.sum()) == len(both)
    order = np.random.default_rng(0).permutation(len(both))
    found = both.get(np.append(order, EMPTY))
    expected = np.concatenate([part.get(np.arange(len(part)))["tokens"] for part in parts])
    np.testing.assert_array_equal(found["tokens"], np.concatenate([expected[order], np.zeros((1, 17), int)]))
    assert (found["documents"][-1] == PADDING_DOCUMENT).all()
    assert both.fingerprint not in [part.fingerprint for part in parts]
    sources = both.sources(np.arange(len(both)))
    assert np.bincount(sources).tolist() == [len(part) for part in parts]


def test_documents_count_from_zero_in_each_row(tmp_path: Path):
    documents = [[5, 6], [7], [8, 9, 10]]
    split = Corpus.open(write_corpus(tmp_path, {"train": documents})).split("train")
    sample = TokenSequences(split, 3).get(np.array([0, 1, 2, EMPTY]))
    e, p = EOS, PADDING_DOCUMENT
    assert sample["tokens"].tolist() == [[5, 6, e, 7], [7, e, 8, 9], [9, 10, e, 0], [0, 0, 0, 0]]
    assert sample["documents"].tolist() == [[0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, p], [p, p, p, p]]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_token_ids_alone_are_those_of_whole_samples(tmp_path: Path, packing: str):
    split = Corpus.open(write_corpus(tmp_path, {"train": TRAIN})).split("train")
    dataset = TokenSequences(split, 7, packing=packing)
    order = np.append(np.random.default_rng(0).permutation(len(dataset)), EMPTY)
    ids = dataset.tokens(order)
    assert ids.dtype == split.dtype
    np.testing.assert_array_equal(ids, dataset.get(order)["tokens"])


def test_a_split_without_any_target_is_refused(corpus: Corpus):
    with pytest.raises(DataError, match="a split 'test' of 1 documents without any token"):
        TokenSequences(corpus.split("test"), 8)


def test_fingerprints_of_sequences_tell_them_apart(corpus: Corpus):
    fingerprints = {
        TokenSequences(corpus.split(split), length).fingerprint
        for split in ("train", "validation")
        for length in (8, 16)
    }
    assert len(fingerprints) == 4
    assert TokenSequences(corpus.split("train"), 8).fingerprint in fingerprints


def test_sequences_describe_themselves(corpus: Corpus):
    text = TokenSequences(corpus.split("validation"), 16).describe()
    num_tokens = len(stream_of(TRAIN[:3]))
    assert text == (
        f"validation: {num_tokens} tokens of 3 documents in {-(-(num_tokens - 1) // 16)} sequences of 16"
    )


def test_an_evaluation_may_leave_out_what_is_bad(tmp_path: Path):
    documents = random_documents(60, seed=3)
    folder = write_corpus(tmp_path / "corpus", {"validation": documents}, samples_per_tar=2)
    whole = TokenSequences(Corpus.open(folder).split("validation"), 16)
    altered, missing = (folder / "validation" / f"validation-{tar:06d}.tar" for tar in (1, 3))
    content = bytearray(altered.read_bytes())
    content[700] ^= 1
    altered.write_bytes(content)
    everything = whole.get(np.arange(len(whole)))
    missing.unlink()

    told: list[tuple[str, int]] = []
    split = Corpus.open(folder, "checksum", on_bad_tar="skip").split("validation")
    left = WithoutBadTars(TokenSequences(split, 16), lambda *facts: told.append(facts))
    found = left.get(np.array([*range(len(left)), EMPTY]))
    tars = np.repeat(np.arange(len(left.tar_sizes)), left.tar_sizes)
    is_bad = np.isin(tars, [1, 3])
    assert (found["documents"][:-1][is_bad] == PADDING_DOCUMENT).all()
    for key, values in everything.items():
        np.testing.assert_array_equal(found[key][:-1][~is_bad], values[~is_bad])
    assert told == [(str(path), int(left.tar_sizes[tar])) for tar, path in [(1, altered), (3, missing)]]


def test_an_evaluation_of_nothing_that_can_be_read(tmp_path: Path):
    folder = write_corpus(tmp_path / "corpus", {"validation": TRAIN[:3]})
    (folder / "validation" / "validation-000000.tar").unlink()
    split = Corpus.open(folder, on_bad_tar="skip").split("validation")
    with pytest.raises(DataError, match="no readable one of 1 tar files"):
        WithoutBadTars(TokenSequences(split, 16), lambda tar, samples: None).get(np.arange(1))


def test_an_overlap_of_a_whole_row(corpus: Corpus):
    with pytest.raises(DataError, match=r"data\.overlap: got 16 with sequences of 16; allowed: 0 to 15"):
        TokenSequences(corpus.split("train"), 16, packing="best_fit", overlap=16)


@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_damaged_counts_of_rows_are_made_anew(corpus: Corpus, tmp_path: Path, content: bytes):
    def sizes() -> list[int]:
        dataset = TokenSequences(corpus.split("train"), 16, packing="best_fit", cache=tmp_path)
        return dataset.tar_sizes.tolist()

    expected = sizes()
    (remembered,) = (tmp_path / "rows").glob("*.counts")
    whole = remembered.read_bytes()
    remembered.write_bytes(content)
    assert sizes() == expected
    assert remembered.read_bytes() == whole
    for place in (0, len(whole) - 8):
        remembered.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert sizes() == expected
