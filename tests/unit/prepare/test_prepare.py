"""`prepare` from files to corpus, in one process: what is kept, and where it goes."""

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from llmtrain.corpus.corpus import Corpus
from llmtrain.errors import DataError
from llmtrain.files import checksum
from llmtrain.prepare import document_blocks, source_file
from llmtrain.prepare.config import SplitConfig
from llmtrain.prepare.job import prepare
from llmtrain.tokenizers.config import TokenizerConfig
from llmtrain.tokenizers.folder import load_tokenizer
from llmtrain.tokenizers.sentencepiece import train
from tests.support.preparing import SPLITS, config, documents_of, texts, tree, write


def lengths_of(output: Path, name: str) -> Iterator[int]:
    """Lengths of a split's documents as the shards' members give them."""
    manifest = json.loads((output / "manifest.json").read_text())
    for shard in manifest["splits"][name]["shards"]:
        with tarfile.open(output / shard["file"]) as tar:
            for member in tar.getmembers():
                if member.name.endswith(".ends.npy"):
                    file = tar.extractfile(member)
                    assert file is not None
                    yield from np.diff(np.load(io.BytesIO(file.read())), prepend=np.uint32(0)).tolist()


def test_every_document_comes_back_once_in_source_order(tmp_path: Path, source: Path):
    report = prepare(config(tmp_path / "corpus", source))
    found = documents_of(tmp_path / "corpus")
    order = {text: i for i, text in enumerate(texts(200))}
    for documents in found.values():
        places = [order[text] for text in documents]
        assert places == sorted(places)
    assert sorted(text for documents in found.values() for text in documents) == sorted(texts(200))
    assert {name: split.documents for name, split in report.splits.items()} == {
        name: len(documents) for name, documents in found.items()
    }
    assert not (tmp_path / "corpus" / ".prepare").exists()


def test_the_manifest_counts_what_the_report_counts(tmp_path: Path, source: Path):
    report = prepare(config(tmp_path / "corpus", source))
    manifest = json.loads((tmp_path / "corpus" / "manifest.json").read_text())
    assert manifest["format"] == "llmtrain-corpus"
    assert manifest["report"] == report.recorded()
    for name, split in manifest["splits"].items():
        index = np.load(tmp_path / "corpus" / split["index"])
        assert len(index) == split["num_samples"] == sum(s["num_samples"] for s in split["shards"])
        assert index["num_tokens"].sum() == split["num_tokens"] == report.splits[name].tokens
        assert index["num_documents"].sum() == split["num_documents"] == report.splits[name].documents
        lengths = np.load(tmp_path / "corpus" / split["lengths"])
        assert lengths.dtype == "<u4"
        assert lengths.tolist() == list(lengths_of(tmp_path / "corpus", name))
        assert checksum(tmp_path / "corpus" / split["lengths"]) == split["lengths_xxh3_128"]
        assert split["num_bytes"] == sum(
            len(text.encode()) for text in documents_of(tmp_path / "corpus")[name]
        )
        # A sample is as few whole documents as make sample_tokens together; a shard, of samples alike.
        assert (index["num_tokens"][:-1] >= 500).all()
        assert (index["num_tokens"] < 500 + 250).all()
        sizes = np.array([shard["bytes"] for shard in split["shards"]])
        assert (sizes[:-1] > 20_000).all()
        assert (sizes < 24_000).all()
    assert len(manifest["splits"]["train"]["shards"]) > 2


def test_duplicates_and_empty_documents_go_and_the_first_stays(tmp_path: Path):
    unique = texts(60)
    a = write(tmp_path / "a.jsonl", [*unique[:40], "", " \n", unique[5], unique[5]])
    b = write(tmp_path / "b.jsonl", [unique[7], *unique[40:], unique[39] + "\r\n", "\x00"])
    report = prepare(config(tmp_path / "corpus", a, b))
    assert report.cleaning.documents_read == 44 + 23
    assert report.cleaning.empty_dropped == 3
    assert report.duplicates_dropped == 4
    assert report.documents_kept == 60
    found = documents_of(tmp_path / "corpus")
    assert sorted(chain.from_iterable(found.values())) == sorted(unique)
    places = [unique.index(text) for text in found["train"]]
    assert places == sorted(places)


def test_many_hash_ranges_find_the_duplicates_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path
):
    again = write(tmp_path / "again.jsonl", texts(200)[::3])
    prepare(config(tmp_path / "one", source, again))
    monkeypatch.setattr(document_blocks, "RANGE_DOCUMENTS", 11)
    monkeypatch.setattr(document_blocks, "BLOCK_BYTES", 900)
    monkeypatch.setattr(source_file, "UNIT_BYTES", 2000)
    prepare(config(tmp_path / "many", source, again))
    assert tree(tmp_path / "one") == tree(tmp_path / "many")


def test_adding_files_moves_no_document(tmp_path: Path, source: Path):
    prepare(config(tmp_path / "small", source))
    folder = tmp_path / "more"
    write(folder / "a_new.jsonl", texts(100, seed=1))
    write(folder / "b.jsonl", texts(200))
    prepare(config(tmp_path / "large", folder))
    small, large = documents_of(tmp_path / "small"), documents_of(tmp_path / "large")
    for name in SPLITS:
        assert small[name] == [text for text in large[name] if text.startswith("0-")]


def test_the_seed_chooses_the_tokenizer_s_documents_alone(tmp_path: Path, source: Path):
    tokenizer = TokenizerConfig(vocab_size=300, train_bytes=4000)
    for seed in (0, 1):
        prepare(config(tmp_path / str(seed), source, seed=seed, tokenizer=tokenizer))
    models = {(tmp_path / str(seed) / "tokenizer.model").read_bytes() for seed in (0, 1)}
    assert len(models) == 2
    assert documents_of(tmp_path / "0") == documents_of(tmp_path / "1")


@pytest.mark.parametrize("seed", range(4))
def test_the_tokenizer_learns_from_at_most_train_bytes(
    tmp_path: Path, source: Path, seed: int, monkeypatch: pytest.MonkeyPatch
):
    learned: list[str] = []

    def recording(documents: list[str], settings: TokenizerConfig) -> bytes:
        learned.extend(documents)
        return train(documents, settings)

    monkeypatch.setattr("llmtrain.prepare.tasks.train", recording)
    tokenizer = TokenizerConfig(vocab_size=300, train_bytes=4000)
    prepare(config(tmp_path / "corpus", source, seed=seed, tokenizer=tokenizer))
    assert 2000 < sum(len(text.encode()) for text in learned) <= 4000
    assert set(learned) < set(documents_of(tmp_path / "corpus")["train"])


def test_a_document_longer_than_a_sample_and_than_one_encode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("llmtrain.tokenizers.sentencepiece.LONGEST_UNIGRAM_BYTES", 300)
    documents = [*texts(50), " ".join(texts(100, seed=2)), "x" * 2000, "ü漢" * 700]
    source = write(tmp_path / "long.jsonl", documents)
    prepare(config(tmp_path / "corpus", source))
    found = documents_of(tmp_path / "corpus")
    assert sorted(chain.from_iterable(found.values())) == sorted(documents)


def given_model(path: Path, **options: object) -> TokenizerConfig:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts(200)), model_writer=model, vocab_size=120, minloglevel=2, **options
    )
    path.write_bytes(model.getvalue())
    return TokenizerConfig(model=path)


@pytest.mark.parametrize("special", [{}, {"eos_id": -1}])
def test_a_given_model_is_taken_as_it_is(tmp_path: Path, source: Path, special: dict[str, int]):
    tokenizer = given_model(tmp_path / "given.model", **special)
    path = tokenizer.model
    assert path is not None
    write(source, [*texts(199), "漢"])
    report = prepare(config(tmp_path / "corpus", source, tokenizer=tokenizer))
    assert (tmp_path / "corpus" / "tokenizer.model").read_bytes() == path.read_bytes()
    manifest = json.loads((tmp_path / "corpus" / "manifest.json").read_text())
    assert manifest["vocab_size"] == 120
    assert manifest["eos_id"] == load_tokenizer(path).eos_id
    assert any("tokenizer is not lossless" in warning for warning in report.warnings)
    assert report.unknown_tokens == 1
    assert "1 tokens are unknown to the given tokenizer" in report.warnings


def test_documents_without_a_token_are_dropped_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tokenizer = given_model(tmp_path / "given.model")  # takes zero-width spaces for white space
    source = write(tmp_path / "a.jsonl", [*texts(20), "\u200b", "\u200b\u200b"])
    report = prepare(config(tmp_path / "corpus", source, tokenizer=tokenizer))
    assert (report.documents_kept, report.tokenless_dropped) == (20, 2)
    assert sum(split.documents for split in report.splits.values()) == 20
    assert "dropped    2 documents without a token" in capsys.readouterr().out
    write(source, ["\u200b", "\u200b\u200b"])
    with pytest.raises(DataError, match="source: got 2 documents for which the tokenizer gives no token"):
        prepare(config(tmp_path / "none", source, tokenizer=tokenizer))


@pytest.mark.parametrize("taken_for", ["text", "special"])
def test_special_tokens_spelled_out_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], taken_for: Any
):
    tokenizer = given_model(tmp_path / "given.model", user_defined_symbols=["<mask>"])
    source = write(tmp_path / "a.jsonl", [*texts(5), "one <mask> two <mask>", "<mask>"])
    tokenizer = replace(tokenizer, typed_specials=taken_for)
    report = prepare(config(tmp_path / "corpus", source, tokenizer=tokenizer, split=SplitConfig(0.0, 0.0)))
    assert report.specials == {"<mask>": 3}
    assert tokenizer.model is not None
    mask = load_tokenizer(tokenizer.model).special_ids["mask"]
    train = Corpus.open(tmp_path / "corpus").split("train")
    tokens, _ = train.read(0, train.num_tokens)
    assert np.count_nonzero(tokens == mask) == (3 if taken_for == "special" else 0)
    said = {"text": "encoded as text: <mask> 3", "special": "encoded as special tokens: <mask> 3"}
    assert said[taken_for] in capsys.readouterr().out


def test_large_vocabularies_take_four_bytes(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch):
    prepare(config(tmp_path / "two", source))
    for module in ("job", "phases", "encode"):
        monkeypatch.setattr(f"llmtrain.prepare.{module}.token_dtype", lambda vocab_size: np.dtype("<u4"))
    prepare(config(tmp_path / "four", source))
    assert json.loads((tmp_path / "four" / "manifest.json").read_text())["dtype"] == "uint32"
    assert documents_of(tmp_path / "four") == documents_of(tmp_path / "two")


def test_splits_without_documents_are_warned_of(tmp_path: Path):
    source = write(tmp_path / "a.jsonl", texts(30))
    report = prepare(config(tmp_path / "corpus", source, split=SplitConfig(validation=0.0, test=0.0)))
    assert [w.split()[2] for w in report.warnings] == ["validation", "test"]
    assert report.splits["validation"].documents == 0
    assert len(np.load(tmp_path / "corpus" / "validation" / "index.npy")) == 0


def test_the_report_says_what_a_txt_document_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "a.txt").write_text("\n\n".join(texts(300)))
    (tmp_path / "notes.md").touch()
    prepare(config(tmp_path / "corpus", tmp_path))
    printed = capsys.readouterr().out
    assert "a document in .txt is consecutive paragraphs of about 4 KiB" in printed
    assert "1 files of other extensions left out: .md" in printed
    assert "dropped    0 empty and 0 duplicate documents" in printed
