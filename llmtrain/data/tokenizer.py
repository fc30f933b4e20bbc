"""The sentencepiece tokenizer: load, encode, decode, train (Kudo and Richardson, arXiv:1808.06226).

A tokenizer trained here is lossless: decode(encode(x)) == x for every text without U+2581, the
character with which sentencepiece writes a space. Characters without a piece become their bytes.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from llmtrain.data.config import SPECIAL_TOKENS, TokenizerConfig
from llmtrain.errors import DataError, Problem

SPACE = "▁"
# Sums over threads are floating point: a fixed number makes the model the same on every machine.
TRAINING_THREADS = 8
# Longer than any word, short enough that sentencepiece's lattices stay small.
SENTENCE_BYTES = 4096


class Tokenizer:
    """A sentencepiece model with the ids this project needs.

    eos_id separates documents; it is the model's eos, or its bos where it has no eos.
    """

    def __init__(self, model: bytes, where: str = "tokenizer") -> None:
        """Raises DataError for bytes that are no model, or a model without eos and bos."""
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError) as error:
            raise DataError(
                Problem(where, f"no sentencepiece model ({error})", "a .model file of sentencepiece")
            ) from error
        self.model = model
        self.sha256: str = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._processor.get_piece_size()
        self.unk_id: int = self._processor.unk_id()
        bos_id, eos_id, pad_id = (getattr(self._processor, name)() for name in ("bos_id", "eos_id", "pad_id"))
        self.bos_id: int | None = bos_id if bos_id >= 0 else None
        self.pad_id: int | None = pad_id if pad_id >= 0 else None
        if eos_id < 0 and bos_id < 0:
            raise DataError(
                Problem(
                    where,
                    "a model with neither an eos nor a bos token",
                    "a model with one of them, which separates documents",
                    "train it with eos_id set, or leave tokenizer.model=null",
                )
            )
        self.eos_id: int = eos_id if eos_id >= 0 else bos_id

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a .model file; raises DataError when it is missing or no model."""
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise DataError(Problem(str(path), str(error.strerror), "a sentencepiece .model file")) from error
        return cls(model, str(path))

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos or eos."""
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts), num_threads=1)

    def encode_arrays(self, texts: Sequence[str] | Sequence[bytes]) -> list[np.ndarray]:
        """Ids of each text (str or UTF-8), int32 arrays; twice as fast as lists."""
        return self._processor.encode([*texts], out_type="numpy", num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; control ids stand for nothing, bytes that are no UTF-8 for U+FFFD."""
        return self._processor.decode([int(i) for i in ids])

    @property
    def is_lossless(self) -> bool:
        """Whether a probe of spaces, controls and rare characters comes back as it went in."""
        probe = " a  b\n\tÅ ﬁ １ 😀 ꙮ "
        return self.decode(self.encode(probe)) == probe

    def word_starts(self) -> np.ndarray:
        """(vocab_size,) bool: whether each id begins a word, with a space or as a control id."""
        processor = self._processor
        return np.array(
            [
                processor.is_control(i) or processor.id_to_piece(i).startswith(SPACE)
                for i in range(self.vocab_size)
            ]
        )

    def token_byte_lengths(self) -> np.ndarray:
        """(vocab_size,) int32: UTF-8 bytes of text each id stands for; 0 for control and unknown ids."""
        processor = self._processor
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for i in range(self.vocab_size):
            if processor.is_control(i) or processor.is_unused(i) or processor.is_unknown(i):
                continue
            text = processor.id_to_piece(i).replace(SPACE, " ")
            lengths[i] = 1 if processor.is_byte(i) else len(text.encode())
        return lengths


def train(documents: Iterable[str], config: TokenizerConfig) -> bytes:
    """Train a model and return its bytes; they depend on the documents and the config alone.

    Raises DataError when the data do not allow the vocabulary, with the nearest size that they do.
    """
    model = io.BytesIO()
    sentences = (sentence for document in documents for sentence in _sentences(document))
    unk, bos, eos, pad = range(len(SPECIAL_TOKENS))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            model_type=config.kind,
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            split_digits=config.split_digits,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 30,
            unk_id=unk,
            bos_id=bos,
            eos_id=eos,
            pad_id=pad,
            num_threads=TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(_training_problem(str(error), config)) from error
    return model.getvalue()


def _sentences(document: str) -> Iterator[str]:
    """Lines, cut before a space where they are long: pieces never reach over either."""
    for line in document.split("\n"):
        start = 0
        while len(line) - start > SENTENCE_BYTES:
            space = line.rfind(" ", start + 1, start + SENTENCE_BYTES)
            stop = space if space > 0 else start + SENTENCE_BYTES
            yield line[start:stop]
            start = stop
        if line[start:].strip():
            yield line[start:]


def _training_problem(message: str, config: TokenizerConfig) -> Problem:
    where = "tokenizer.vocab_size"
    if most := re.search(r"Vocabulary size too high.*<= (\d+)", message):
        return Problem(
            where,
            f"{config.vocab_size}, more than the training documents allow",
            f"at most {most[1]} with this text",
            f"set {where}={most[1]} or add text",
        )
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return Problem(
            where,
            f"{config.vocab_size}, fewer than the characters of the training documents need",
            f"at least {int(least[1]) + 1} with this text (256 bytes, special tokens and its characters)",
            "raise it, or lower tokenizer.character_coverage",
        )
    return Problem(
        "tokenizer", f"a training failure of sentencepiece: {message}", "", "try tokenizer.kind=bpe"
    )
