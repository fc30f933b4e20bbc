"""`prepare` from files to corpus, in one process: what is kept, where it goes, what is refused."""

import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from llmtrain.config import decode
from llmtrain.corpus.corpus import Corpus
from llmtrain.errors import ConfigError, DataError
from llmtrain.files import checksum
from llmtrain.prepare import decompress, document_blocks, source_file
from llmtrain.prepare.config import PrepareConfig, SplitConfig
from llmtrain.prepare.job import prepare
from llmtrain.tokenizers.config import TokenizerConfig
from llmtrain.tokenizers.folder import load_tokenizer
from llmtrain.tokenizers.sentencepiece import train

SPLITS = ("train", "validation", "test")


def texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice([*"aeioubcdfglmnrstü"], rng.integers(2, 9))) for _ in range(300)]
    return [f"{seed}-{i} " + " ".join(rng.choice(words, rng.integers(3, 40))) for i in range(count)]


def write(path: Path, documents: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def config(output: Path, *source: Path | str, **changes: Any) -> PrepareConfig:
    base = PrepareConfig(
        source=tuple(map(str, source)),
        output=output,
        tokenizer=TokenizerConfig(vocab_size=340),
        split=SplitConfig(validation=0.2, test=0.1),
        sample_tokens=500,
        shard_bytes=20_000,
        workers=1,
    )
    return replace(base, **changes)


def documents_of(output: Path) -> dict[str, list[str]]:
    """Text of each split's documents, read back by the corpus' reader."""
    corpus = Corpus.open(output, verify="checksum")
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    found: dict[str, list[str]] = {}
    for name in SPLITS:
        split = corpus.split(name)
        if not split.num_documents:
            found[name] = []
            continue
        tokens, ends = split.read(0, split.num_tokens)
        starts = [0, *ends[:-1]]
        found[name] = [
            tokenizer.decode(tokens[a : b - 1].tolist()) for a, b in zip(starts, ends, strict=True)
        ]
    return found


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


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "texts.jsonl", texts(200))


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


# ---------------------------------------------------------------------------------- output folders


def test_the_same_command_again_leaves_the_corpus(tmp_path: Path, source: Path):
    prepare(config(tmp_path / "corpus", source))
    before = tree(tmp_path / "corpus")
    (tmp_path / "corpus" / ".prepare").mkdir()  # as after a kill in the last moment
    os.utime(source)  # as a fresh installation of the same data has it
    report = prepare(config(tmp_path / "corpus", source, workers=2))
    assert report.reused
    assert tree(tmp_path / "corpus") == before
    assert not (tmp_path / "corpus" / ".prepare").exists()


def test_another_corpus_is_refused_with_what_differs(tmp_path: Path, source: Path):
    prepare(config(tmp_path / "corpus", source))
    before = tree(tmp_path / "corpus")
    with pytest.raises(DataError) as caught:
        prepare(config(tmp_path / "corpus", source, tokenizer=TokenizerConfig(vocab_size=330), seed=3))
    message = str(caught.value)
    assert "tokenizer.vocab_size is 340 there and 330 here" in message
    assert "seed is 0 there and 3 here" in message
    assert "overwrite=true" in message
    with open(source, "a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(DataError, match=r"sources\.bytes is \d+ there and \d+ here"):
        prepare(config(tmp_path / "corpus", source))
    assert tree(tmp_path / "corpus") == before


def test_overwrite_replaces_it(tmp_path: Path, source: Path):
    other = write(tmp_path / "other.jsonl", texts(150, seed=5))
    prepare(config(tmp_path / "corpus", source))
    prepare(config(tmp_path / "corpus", other, overwrite=True))
    prepare(config(tmp_path / "fresh", other))
    assert tree(tmp_path / "corpus") == tree(tmp_path / "fresh")


def test_a_truncated_shard_is_told_and_overwrite_mends_it(tmp_path: Path, source: Path):
    prepare(config(tmp_path / "corpus", source))
    before = tree(tmp_path / "corpus")
    shard = tmp_path / "corpus" / "train" / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(DataError, match=r"train-000000\.tar: got a missing or truncated tar file"):
        prepare(config(tmp_path / "corpus", source))
    prepare(config(tmp_path / "corpus", source, overwrite=True))
    assert tree(tmp_path / "corpus") == before


def test_folders_with_other_things_are_left_alone(tmp_path: Path, source: Path):
    output = tmp_path / "mine"
    (output / "train").mkdir(parents=True)
    (output / "train" / "precious.txt").write_text("x")
    with pytest.raises(DataError, match="holds train but no corpus"):
        prepare(config(output, source, overwrite=True))
    (output / "manifest.json").write_text('{"format": "something else"}')
    with pytest.raises(DataError, match="not the manifest of a corpus"):
        prepare(config(output, source, overwrite=True))
    assert (output / "train" / "precious.txt").read_text() == "x"


def test_an_output_that_cannot_be_a_folder(tmp_path: Path, source: Path):
    for output in (source, source / "below"):
        with pytest.raises(DataError, match=r"texts\.jsonl.*: got a folder that cannot be created"):
            prepare(config(output, source))


# ------------------------------------------------------------------------------------------- refuse


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "no text in"), ('{"text": " "}\n', "no text in"), ('{"body": "x"}\n', "no field text")],
)
def test_sources_without_text(tmp_path: Path, content: str, message: str):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        prepare(config(tmp_path / "corpus", tmp_path / "a.jsonl"))
    assert not (tmp_path / "corpus").exists()


def test_undecodable_bytes_name_the_file_and_the_byte(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"good\n" * 100 + b"\xfcber")
    with pytest.raises(DataError, match=r"a\.txt: got bytes that are not UTF-8: 0xfc at byte 500"):
        prepare(config(tmp_path / "corpus", tmp_path / "a.txt"))


def test_a_mistake_mended_needs_no_cleaning_up(tmp_path: Path, source: Path):
    with pytest.raises(DataError, match=r"tokenizer\.vocab_size: got 8192.*at most \d+"):
        prepare(config(tmp_path / "corpus", source, tokenizer=TokenizerConfig()))
    prepare(config(tmp_path / "corpus", source))
    prepare(config(tmp_path / "fresh", source))
    assert tree(tmp_path / "corpus") == tree(tmp_path / "fresh")


def test_a_tokenizer_model_that_is_missing(tmp_path: Path, source: Path):
    with pytest.raises(DataError, match=r"nowhere\.model: got No such file"):
        prepare(config(tmp_path / "corpus", source, tokenizer=TokenizerConfig(model=Path("nowhere.model"))))


def test_the_config_reads_a_single_source_and_names_wrong_values():
    mapping = {"source": "a.txt", "output": "corpus", "tokenizer": {"vocab_size": 300}}
    assert decode(PrepareConfig, mapping).source == ("a.txt",)
    with pytest.raises(ConfigError) as caught:
        decode(PrepareConfig, {**mapping, "workers": 0, "split": {"validation": 0.6, "test": 0.4}})
    assert [problem.where for problem in caught.value.problems] == ["split.validation"]
    with pytest.raises(ConfigError, match=r"peer_timeout: got 0\.0; allowed: more than 0 seconds"):
        decode(PrepareConfig, {**mapping, "tokenizer": {}, "peer_timeout": 0.0})


def test_training_documents_leave_out_duplicates_and_held_out_ones(tmp_path: Path, source: Path):
    again = write(tmp_path / "again.jsonl", texts(200))
    prepare(config(tmp_path / "corpus", source, again))
    trained = train(documents_of(tmp_path / "corpus")["train"], TokenizerConfig(vocab_size=340))
    assert (tmp_path / "corpus" / "tokenizer.model").read_bytes() == trained


def test_a_source_that_cannot_be_read_is_not_called_unwritable(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(path: str, flags: int) -> None:
        raise PermissionError(13, "Permission denied", path)

    # Root may read everything.
    monkeypatch.setattr(decompress, "open_regular", refuse)
    with pytest.raises(DataError, match=r"texts\.jsonl: got Permission denied; allowed: a readable file$"):
        prepare(config(tmp_path / "corpus", source))
