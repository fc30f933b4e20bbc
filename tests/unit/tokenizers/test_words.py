"""Tokenizers of whole words."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.errors import DataError
from llmtrain.tokenizers.config import TokenizerConfig
from llmtrain.tokenizers.folder import load_tokenizer
from llmtrain.tokenizers.words import train_words, word_tokenizer


def test_words_are_found_whole_and_others_are_unknown(tmp_path: Path) -> None:
    made = word_tokenizer(["film", "don", "'", "t", "film", "</s>", "über"], lowercase=True, where="here")
    made.save(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.sha256 == made.sha256
    assert tokenizer.vocab_size == 4 + 5
    assert tokenizer.pieces()[:5] == ["<unk>", "<s>", "</s>", "<pad>", "film"]
    assert tokenizer.special_ids == {"unk": 0, "bos": 1, "eos": 2, "pad": 3}
    ids = tokenizer.encode("Film, U\u0308ber films don't")
    assert [tokenizer.pieces()[i] for i in ids] == ["film", "<unk>", "über", "<unk>", "don", "'", "t"]
    assert [ids.tolist() for ids in tokenizer.encode_arrays(["film don"])] == [[4, 5]]
    text = "A film… über"
    ids, places = tokenizer.encode_with_offsets(text)
    assert [text[begin:end] for begin, end in places] == ["A", "film", "…", "über"]
    assert tokenizer.word_starts().all()
    assert tokenizer.token_byte_lengths().tolist() == [0, 0, 0, 0, 5, 4, 1, 2, 6]


def test_the_most_frequent_words_in_their_order(tmp_path: Path) -> None:
    documents = ["b b B a a c", "c d </s>"]
    config = TokenizerConfig("words", vocab_size=7, min_count=2)
    (tmp_path / "tokenizer.bundle.json").write_bytes(train_words(documents, config))
    assert load_tokenizer(tmp_path).pieces()[4:] == ["b", "a", "c"]
    cased = TokenizerConfig("words", min_count=2, lowercase=False)
    (tmp_path / "tokenizer.bundle.json").write_bytes(train_words(documents, cased))
    assert load_tokenizer(tmp_path).pieces()[4:] == ["a", "b", "c"]


def test_a_vocabulary_that_min_count_empties() -> None:
    with pytest.raises(
        DataError, match=r"tokenizer\.min_count: got 4, which leaves none of 2 words; allowed: 1 to 3"
    ):
        train_words(["a a a b"], TokenizerConfig("words", min_count=4))
