"""Shards: plain webdataset tars of fixed bytes, arrays where the index says."""

from pathlib import Path

import numpy as np
import pytest
import webdataset
import xxhash

from llmtrain.corpus.tar_files import INDEX_DTYPE, Sample, token_dtype, write_index, write_tar_file


def samples(dtype: str = "<u2") -> list[Sample]:
    rng = np.random.default_rng(0)
    made = []
    for number, num_documents in enumerate([1, 3, 700, 2]):
        ends = np.cumsum(rng.integers(1, 50, num_documents))
        made.append(Sample(f"train-{number:09d}", rng.integers(0, 300, ends[-1]).astype(dtype), ends))
    return made


def test_plain_webdataset_reads_them(tmp_path: Path):
    write_tar_file(tmp_path / "train" / "train-000000.tar", samples(), 0)
    dataset = webdataset.WebDataset(str(tmp_path / "train" / "train-000000.tar"), shardshuffle=False).decode()
    read = list(dataset)
    assert [item["__key__"] for item in read] == [sample.key for sample in samples()]
    for item, sample in zip(read, samples(), strict=True):
        np.testing.assert_array_equal(item["tokens.npy"], sample.tokens)
        np.testing.assert_array_equal(item["ends.npy"], sample.ends)
        assert item["tokens.npy"].dtype == np.uint16
        assert item["ends.npy"].dtype == np.uint32


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_the_index_points_at_the_arrays(tmp_path: Path, dtype: str):
    path = tmp_path / "train" / "train-000007.tar"
    entry, index = write_tar_file(path, samples(dtype), 7)
    data = path.read_bytes()
    assert index.dtype == INDEX_DTYPE
    for row, sample in zip(index, samples(dtype), strict=True):
        tokens = np.frombuffer(data, dtype, row["num_tokens"], row["tokens_offset"])
        ends = np.frombuffer(data, "<u4", row["num_documents"], row["ends_offset"])
        np.testing.assert_array_equal(tokens, sample.tokens)
        np.testing.assert_array_equal(ends, sample.ends)
        assert row["shard"] == 7
    assert entry == {
        "file": "train/train-000007.tar",
        "bytes": len(data),
        "xxh3_128": xxhash.xxh3_128_hexdigest(data),
        "num_samples": 4,
        "num_tokens": sum(len(sample.tokens) for sample in samples()),
        "num_documents": 706,
    }


def test_the_bytes_depend_on_the_samples_alone(tmp_path: Path):
    for folder in ("a", "b"):
        write_tar_file(tmp_path / folder / "train-000000.tar", samples(), 0)
    assert (tmp_path / "a" / "train-000000.tar").read_bytes() == (
        tmp_path / "b" / "train-000000.tar"
    ).read_bytes()


def test_index_of_a_split_without_documents(tmp_path: Path):
    checksum = write_index(tmp_path / "test" / "index.npy", np.zeros(0, INDEX_DTYPE))
    assert len(np.load(tmp_path / "test" / "index.npy")) == 0
    assert checksum == xxhash.xxh3_128_hexdigest((tmp_path / "test" / "index.npy").read_bytes())


def test_a_failed_write_leaves_nothing(tmp_path: Path):
    def failing():
        yield samples()[0]
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_tar_file(tmp_path / "train" / "train-000000.tar", failing(), 0)
    assert not list((tmp_path / "train").iterdir())


def test_the_smallest_dtype_that_holds_every_id():
    assert token_dtype(65536) == np.uint16
    assert token_dtype(65537) == np.uint32
