"""How a tokenizer is made, or which one is taken. Free of torch and of everything heavy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmtrain.config import require
from llmtrain.errors import Problem

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")
"""Pieces of the ids 0, 1, 2 and 3 of a tokenizer trained here: unknown, begin, end, padding."""
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256 + 1
"""Special tokens, one token a byte, and at least one piece."""


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes ids: a sentencepiece model (Kudo and Richardson, arXiv:1808.06226)."""

    kind: Literal["unigram", "bpe"] = "unigram"
    """Unigram language model (arXiv:1804.10959) or byte-pair merges (arXiv:1508.07909)."""
    vocab_size: int = 8192
    """Ids in all, special tokens and 256 bytes included."""
    model: Path | None = None
    """An existing tokenizer, taken as it is; then nothing is trained: a sentencepiece .model, a
    tokenizer.json, or the folder of a Hugging Face model, a run, a checkpoint or a corpus."""
    train_bytes: int = 16 << 20
    """Most UTF-8 bytes of training documents the tokenizer is trained on; training takes about 22
    times as much memory."""
    character_coverage: float = 0.9995
    """Share of the characters that get pieces of their own; the others become bytes."""
    split_digits: bool = True
    """Each digit is a piece of its own."""
    typed_specials: Literal["text", "special"] = "text"
    """What special tokens of a given tokenizer are where a text spells them out, as `</s>`: text like any
    other, or special tokens, as in texts that a chat's template made."""

    def problems(self) -> Iterator[Problem]:
        if self.model is None:
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
