"""A corpus that is damaged is refused in one line that names the file."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from llmtrain.corpus.corpus import Corpus
from llmtrain.corpus.tar_files import TarFileError
from llmtrain.data.datasets.base import TokenSequences
from llmtrain.errors import DataError
from tests.support.corpora import random_documents, write_corpus, write_manifest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    documents = random_documents(40)
    return write_corpus(tmp_path / "corpus", {"train": documents, "validation": documents[:5], "test": []})


def refusal(path: Path, verify: Any = "size", split: str = "train") -> str:
    with pytest.raises(DataError) as caught:
        _open_split(path, verify, split)
    return str(caught.value)


def _open_split(path: Path, verify: Any, split: str) -> None:
    Corpus.open(path, verify).split(split)


def change_manifest(path: Path, **changes: Any) -> None:
    write_manifest(path, json.loads((path / "manifest.json").read_text()) | changes)


def flip_byte(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_a_missing_folder(tmp_path: Path):
    message = refusal(tmp_path / "nothing")
    assert "nothing: got no such folder" in message
    assert "llmtrain prepare" in message


def test_a_file_in_place_of_a_folder(tmp_path: Path):
    (tmp_path / "text.txt").write_text("hello")
    assert "text.txt: got a file; allowed: the folder of a corpus" in refusal(tmp_path / "text.txt")


def test_a_folder_that_is_no_corpus_says_what_it_holds(tmp_path: Path):
    for name in "abcdef":
        (tmp_path / f"{name}.txt").touch()
    assert "holds a.txt, b.txt, c.txt, d.txt and 2 more" in refusal(tmp_path)


def test_a_corpus_that_prepare_has_not_finished(tmp_path: Path):
    (tmp_path / ".prepare").mkdir()
    assert "got an unfinished corpus; allowed: a whole one; run its llmtrain prepare again" in refusal(
        tmp_path
    )


@pytest.mark.parametrize("content", ["", "{", "\x00\x01"])
def test_a_manifest_that_is_no_json(path: Path, content: str):
    (path / "manifest.json").write_text(content)
    assert "manifest.json: got invalid JSON" in refusal(path)


@pytest.mark.parametrize("content", ["{}", '{"format": "parquet"}', '{"format": {}}'])
def test_a_manifest_of_something_else(path: Path, content: str):
    (path / "manifest.json").write_text(content)
    assert "allowed: llmtrain-corpus" in refusal(path)


def test_a_version_of_the_future(path: Path):
    change_manifest(path, version=9)
    assert "got version 9; allowed: version 1, 2, 3" in refusal(path)


@pytest.mark.parametrize(
    "change",
    [{"splits": {"train": {}}}, {"splits": 3}, {"dtype": "int8"}, {"eos_id": None}, {"tokenizer": {}}],
)
def test_a_manifest_without_its_parts(path: Path, change: dict[str, Any]):
    change_manifest(path, **change)
    message = refusal(path)
    assert re.search(r"manifest\.json: (splits|dtype|eos_id|tokenizer)[\w.]*: got ", message)
    assert len(message.splitlines()) <= 8


@pytest.mark.parametrize(
    "name",
    ["../a", "/dev/zero", "", "a/../../b", "http://a/b", "a\nb", "a;b", "-a b", "a::b", "%2e%2e/a", "a?b", 7],
)
@pytest.mark.parametrize("where", ["tokenizer", "index", "lengths", "shard"])
def test_a_manifest_names_files_of_its_own_folder_alone(path: Path, where: str, name: object):
    manifest = json.loads((path / "manifest.json").read_text())
    split = manifest["splits"]["train"]
    if where == "tokenizer":
        manifest["tokenizer"]["file"] = name
    elif where == "shard":
        split["shards"][0]["file"] = name
    else:
        split[where] = name
    write_manifest(path, manifest)
    said = refusal(path)
    if isinstance(name, str):
        assert f"got {name!r}; allowed: a file of the corpus' own folder" in said
    assert str(path / "manifest.json") in said
    assert len(said.splitlines()) == 1


def test_an_altered_tokenizer(path: Path):
    flip_byte(path / "tokenizer.model", 3)
    assert "tokenizer.model: got an altered tokenizer" in refusal(path)


def test_a_missing_tokenizer(path: Path):
    (path / "tokenizer.model").unlink()
    assert "tokenizer.model: got no such file" in refusal(path)


def test_a_missing_shard(path: Path):
    (path / "train" / "train-000001.tar").unlink()
    assert "train/train-000001.tar: got no such file" in refusal(path)


def test_a_truncated_shard(path: Path):
    shard = path / "train" / "train-000001.tar"
    os.truncate(shard, shard.stat().st_size - 512)
    message = refusal(path)
    assert "train-000001.tar: got a truncated tar file" in message
    assert len(message.splitlines()) == 1


def test_a_shard_that_has_grown(path: Path):
    with open(path / "train" / "train-000000.tar", "ab") as file:
        file.write(b"x")
    assert "train-000000.tar: got a tar file that is too long" in refusal(path)


@pytest.mark.parametrize("place", [0, 700, -1])
def test_an_altered_shard_is_named(path: Path, place: int):
    flip_byte(path / "train" / "train-000001.tar", place)
    message = refusal(path, verify="checksum")
    assert "train-000001.tar: got an altered tar file" in message
    assert len(message.splitlines()) == 1


def test_a_shard_altered_after_it_was_verified(path: Path):
    """Even when its modification time is set back."""
    shard = path / "train" / "train-000002.tar"
    Corpus.open(path, "checksum")
    before = shard.stat()
    flip_byte(shard, 900)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "train-000002.tar: got an altered tar file" in refusal(path, verify="checksum")
    # Refused again: what was found bad is not remembered as good.
    assert "train-000002.tar: got an altered tar file" in refusal(path, verify="checksum")


def test_an_altered_or_missing_index(path: Path):
    flip_byte(path / "train" / "index.npy", -1)
    assert "index.npy: got an altered file" in refusal(path)
    (path / "train" / "index.npy").unlink()
    assert "index.npy: got no such file" in refusal(path)


def test_many_missing_shards_take_few_lines(tmp_path: Path):
    path = write_corpus(tmp_path, {"train": random_documents(40)}, documents_per_sample=1, samples_per_tar=1)
    for shard in path.glob("train/*.tar"):
        shard.unlink()
    lines = refusal(path).splitlines()
    assert len(lines) == 6
    assert "got 35 more files like these" in lines[-1]


def test_an_unknown_split_names_the_nearest(path: Path):
    assert "got no split 'valid'; allowed: validation" in refusal(path, split="valid")


def test_an_empty_split(path: Path):
    assert "got an empty split 'test'" in refusal(path, split="test")


def test_a_shard_that_vanishes_or_shrinks_while_training(path: Path):
    train = Corpus.open(path).split("train")
    shard = path / "train" / "train-000000.tar"
    train.read(0, 5)
    os.truncate(shard, 600)
    with pytest.raises(DataError, match=r"train-000000\.tar: got a truncated tar file of 600 bytes"):
        train.read(0, 5)
    (path / "train" / "train-000002.tar").unlink()
    with pytest.raises(DataError, match=r"train-000002\.tar: got no such file"):
        train.read(train.num_tokens - 5, train.num_tokens)


def test_a_shard_changed_in_place_while_training(path: Path):
    train = Corpus.open(path).split("train")
    shard = path / "train" / "train-000000.tar"
    before, _ = train.read(0, 5)
    os.utime(shard)  # touched, not changed: looked at again, and read on
    assert train.read(0, 5)[0].tolist() == before.tolist()
    flip_byte(shard, 900)
    with pytest.raises(
        TarFileError, match=r"train-000000\.tar: got a tar file that changed while the job ran"
    ):
        train.read(0, 5)


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the train split's entry of the manifest."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest["splits"]["train"])
    write_manifest(path, manifest)


def replace_array(path: Path, name: str, array: np.ndarray) -> None:
    """Another index.npy or lengths.npy, with a manifest that vouches for it."""
    np.save(path / "train" / name, array)
    content = (path / "train" / name).read_bytes()
    key = f"{name.removesuffix('.npy')}_xxh3_128"
    rewrite(path, lambda entry: entry.update({key: xxhash.xxh3_128_hexdigest(content)}))


@pytest.mark.parametrize("field", ["num_tokens", "tokens_offset", "ends_offset", "num_documents"])
def test_an_index_that_disagrees_with_its_shards(path: Path, field: str):
    """Even where its checksum is that of the manifest."""
    index = np.load(path / "train" / "index.npy")
    if field == "num_documents":  # alike in all
        index[field][0] -= 1
    else:
        index[field][0], index[field][1] = index[field][1], index[field][0]
    replace_array(path, "index.npy", index)
    with pytest.raises(
        TarFileError, match=r"train-000000\.tar: got .*; allowed: what the split's index\.npy says"
    ):
        Corpus.open(path).split("train").read(0, 5)


def test_an_index_that_disagrees_with_the_manifest(path: Path):
    def move_a_token(entry: dict[str, Any]) -> None:
        entry["shards"][1]["num_tokens"] += 1
        entry["shards"][2]["num_tokens"] -= 1

    rewrite(path, move_a_token)
    assert "index.npy: got another number of tokens in train/train-000001.tar" in refusal(path)


def test_lengths_that_disagree_with_the_shards(path: Path):
    replace_array(path, "lengths.npy", np.load(path / "train" / "lengths.npy")[1:])
    split = Corpus.open(path).split("train")
    with pytest.raises(DataError, match=r"lengths\.npy: got an array of uint32 of the shape \(39,\)"):
        TokenSequences(split, 16, packing="best_fit")


def test_token_ids_outside_the_vocabulary(tmp_path: Path):
    path = write_corpus(tmp_path, {"train": [[5, 6], [7, 99, 8], [9]]}, vocab_size=50)
    train = Corpus.open(path).split("train")
    assert train.read(0, 3)[0].tolist() == [5, 6, 1]
    with pytest.raises(
        TarFileError, match=r"train-000000\.tar: got the token id 99 at token 4; allowed: 0 to 49"
    ):
        train.read(0, 7)


def test_bad_shards_may_be_left_to_the_reader(path: Path):
    (path / "train" / "train-000001.tar").unlink()
    flip_byte(path / "train" / "train-000002.tar", 700)
    corpus = Corpus.open(path, "checksum", on_bad_tar="skip")
    assert sorted(corpus.bad_tars) == ["train/train-000001.tar", "train/train-000002.tar"]
    assert corpus.split("train").find_bad([0, 1, 2]) == [1, 2]


def test_a_corpus_of_version_1_is_read_but_not_packed(path: Path):
    change_manifest(path, version=1)
    rewrite(path, lambda entry: [entry.pop(key) for key in ("lengths", "lengths_xxh3_128")])
    split = Corpus.open(path).split("train")
    assert len(TokenSequences(split, 16)) > 0
    with pytest.raises(DataError, match=r"version 1, without lengths\.npy; prepare the corpus again"):
        TokenSequences(split, 16, packing="best_fit")
