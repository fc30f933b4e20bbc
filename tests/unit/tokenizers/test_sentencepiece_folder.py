"""Folders with a sentencepiece model alone: their chat template goes on with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece

from llmtrain.chat.source import own_source, template_of
from llmtrain.errors import DataError
from llmtrain.interchange.huggingface import write_contents
from llmtrain.interchange.huggingface_tokenizer import chat_files, tokenizer_files
from llmtrain.tokenizers.config import TokenizerConfig
from llmtrain.tokenizers.folder import load_tokenizer
from llmtrain.tokenizers.sentencepiece import train
from tests.support.chat_templates import STYLES

TEMPLATE = STYLES["llama 2"].plain
TALK = [{"role": "user", "content": "alpha beta"}, {"role": "assistant", "content": "gamma"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as those of Llama 2 were at first."""
    folder = tmp_path / "folder"
    folder.mkdir()
    model = train(["alpha beta gamma delta"] * 50, TokenizerConfig(kind="bpe", vocab_size=280))
    (folder / "tokenizer.model").write_bytes(model)
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_the_chat_template_goes_on(folder: Path, tmp_path: Path) -> None:
    import transformers

    tokenizer = load_tokenizer(folder)
    original = (folder / "tokenizer.model").read_bytes()
    assert template_of(tokenizer).source == TEMPLATE
    saved = load_tokenizer(tokenizer.save(tmp_path))  # as in a checkpoint
    assert saved.sha256 == tokenizer.sha256
    assert saved.encode("alpha delta") == tokenizer.encode("alpha delta")
    assert own_source(saved.with_tokens(["<|new|>"])) == TEMPLATE
    plain = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert plain.encode("alpha delta") == tokenizer.encode("alpha delta")

    exported = tmp_path / "exported"
    exported.mkdir()
    contents = tokenizer_files(saved, None, "x")
    write_contents(exported, contents | chat_files(contents, saved, None))
    assert (exported / "tokenizer.model").read_bytes() == original
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    text = theirs.apply_chat_template(TALK, tokenize=False)
    assert text == "<s>[INST] alpha beta [/INST] gamma </s>"
    assert theirs(text, add_special_tokens=False)["input_ids"][0] == tokenizer.bos_id
    (exported / "config.json").write_text(json.dumps({"exported_by": "llmtrain"}))
    assert load_tokenizer(exported).sha256 == tokenizer.sha256


def test_one_of_several_templates_and_a_damaged_one(folder: Path, tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    tokenizer = load_tokenizer(folder)
    assert own_source(tokenizer) == TEMPLATE
    contents = tokenizer_files(tokenizer, None, "x")
    assert chat_files(contents, tokenizer, None)["tokenizer_config.json"]["chat_template"] == named
    damaged = tmp_path / "damaged.model"
    damaged.write_bytes(tokenizer.content[:200])
    with pytest.raises(DataError, match="the files that it holds"):
        load_tokenizer(damaged)
