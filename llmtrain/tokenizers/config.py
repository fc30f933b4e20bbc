"""Configuration of the tokenizer that `prepare` trains or uses. Does not import torch or other heavy
packages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmtrain.config import require
from llmtrain.errors import Problem

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")
"""Pieces of the ids 0 to 3 of a tokenizer trained here: unknown, begin, end, padding."""
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256 + 1
"""Special tokens, one token per byte, and at least one piece."""


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer: a sentencepiece model to train (Kudo and Richardson, arXiv:1808.06226), or an existing
    tokenizer."""

    kind: Literal["unigram", "bpe", "words"] = "unigram"
    """Model type: unigram language model (arXiv:1804.10959), byte-pair encoding (arXiv:1508.07909), or the
    most frequent whole words, with one id for all others."""
    vocab_size: int = 8192
    """Number of ids, including special tokens and, but for words, 256 bytes; of words the most."""
    min_count: int = 1
    """Of words: how often one occurs at least in the training documents."""
    lowercase: bool = True
    """Of words: whether texts are read in lower case."""
    model: Path | None = None
    """Existing tokenizer to use without training: a sentencepiece .model, a tokenizer.json, or the folder of
    a Hugging Face model, run, checkpoint or corpus. null: train one."""
    train_bytes: int = 16 << 20
    """Maximum UTF-8 bytes of the documents that the tokenizer is trained on. Training needs about 22 times as
    much memory."""
    character_coverage: float = 0.9995
    """Share of the characters in the training documents, 0.9 to 1, that get their own pieces; others are
    encoded as bytes."""
    split_digits: bool = True
    """Make each digit a separate piece."""
    typed_specials: Literal["text", "special"] = "text"
    """Encoding of the spelling of special tokens in texts, such as `</s>`, by an existing tokenizer. text: as
    ordinary text. special: as special tokens, for texts made by a chat template."""

    def problems(self) -> Iterator[Problem]:
        if self.kind == "words":
            least = len(SPECIAL_TOKENS) + 1
            allowed = f"{least} ({len(SPECIAL_TOKENS)} specials, a word) to {1 << 24}"
            yield from require(least <= self.vocab_size <= 1 << 24, "vocab_size", self.vocab_size, allowed)
            yield from require(self.min_count >= 1, "min_count", self.min_count, "1 or more")
        elif self.model is None:
            yield from require(
                SMALLEST_VOCABULARY <= self.vocab_size <= 1 << 24,
                "vocab_size",
                self.vocab_size,
                f"{SMALLEST_VOCABULARY} (256 bytes, {len(SPECIAL_TOKENS)} specials, a piece) to {1 << 24}",
            )
        yield from require(self.train_bytes >= 1, "train_bytes", self.train_bytes, "1 or more")
        yield from require(
            0.9 <= self.character_coverage <= 1.0, "character_coverage", self.character_coverage, "0.9 to 1"
        )
