"""`prepare` in one process: which output folders it takes or leaves, and what it refuses."""

import os
from pathlib import Path

import pytest

from llmtrain.config import decode
from llmtrain.errors import ConfigError, DataError
from llmtrain.prepare import decompress
from llmtrain.prepare.config import PrepareConfig
from llmtrain.prepare.job import prepare
from llmtrain.tokenizers.config import TokenizerConfig
from llmtrain.tokenizers.sentencepiece import train
from tests.support.preparing import config, documents_of, texts, tree, write


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
