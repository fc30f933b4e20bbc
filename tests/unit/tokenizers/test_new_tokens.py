"""Tokens that a tokenizer is given: they are matched whole, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.chat.encoder import Encoder
from llmtrain.tokenizers.base import Tokenizer
from llmtrain.tokenizers.folder import load_tokenizer
from tests.support.tokenizers import write_chat_tokenizer

NEW = ("<|im_start|>", "<|im_end|>")
TEXT = "<|im_start|>user\nIs it a film?<|im_end|>\n"


@pytest.fixture(params=["sentencepiece", "gpt2", "llama"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param == "sentencepiece":
        return load_tokenizer(request.getfixturevalue("corpus"))
    return load_tokenizer(write_chat_tokenizer(tmp_path / "folder", request.param, (), None))


def test_new_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    grown = tokenizer.with_tokens(NEW)
    size = tokenizer.vocab_size
    assert grown.vocab_size == size + 2
    assert grown.pieces() == [*tokenizer.pieces(), *NEW]
    assert grown.special_ids == tokenizer.special_ids
    plain = "Is it a film? für"
    assert grown.encode(plain) == tokenizer.encode(plain)
    loaded = load_tokenizer(grown.save(tmp_path))
    assert loaded.sha256 == grown.sha256
    ids, offsets = Encoder(loaded).encode(TEXT)
    spelled = [
        (TEXT[begin:end], int(i) - size) for i, (begin, end) in zip(ids, offsets, strict=True) if i >= size
    ]
    assert spelled == [("<|im_start|>", 0), ("<|im_end|>", 1)]
    assert loaded.with_tokens(NEW) is loaded
