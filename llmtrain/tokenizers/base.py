"""What every tokenizer gives, whatever library runs it.

Two kinds: sentencepiece models (tokenizer_sentencepiece.py), which `llmtrain prepare` also trains, and the
`tokenizer.json` of Hugging Face folders (tokenizer_json.py). tokenizer_folder.py finds and loads either.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np

from llmtrain.errors import DataError, Problem
from llmtrain.files import write_atomically

ROLES = ("mask", "cls", "sep", "pad", "bos", "eos", "unk")
"""What a special token is for."""
SENTENCEPIECE_FILE = "tokenizer.model"
BUNDLE_FILE = "tokenizer.bundle.json"
TOKENIZER_FILES = (SENTENCEPIECE_FILE, BUNDLE_FILE)
"""Names under which corpora and checkpoints carry their one tokenizer."""
_SENTINEL = re.compile(r"<extra_id_([0-9]{1,9})>")
_UNUSED = re.compile(r"[\[<]unused_?\d+[\]>]")
_SENTENCE_ENDS = (".", "!", "?", "…", "。", "！", "？", "\n", "<0x0A>", "Ċ")
"""Newlines among them, as bytes are written in sentencepiece and in byte-level BPE."""
PROBES = (
    " a  b\n\tÅ ﬁ １ 😀 ꙮ ",  # spaces and line ends, case, forms that Unicode normalizes, rare characters
    "Don 't . “stop” … it\u00a0is\u200b 漢字12",  # no space first, clean-up of English, quotes
    "e\u0301 👩\u200d👩 \u2028 \n\n   \n",  # marks and joiners, line ends in a row
)
_REPLACEMENT = "�"
"""What bytes that are no UTF-8 decode to."""


class Tokenizer(ABC):
    """Texts to ids and back. Ids of texts are without any special token at their ends."""

    file_name: ClassVar[str]
    """Name under which corpora and checkpoints carry it."""
    content: bytes
    """That file's."""
    vocab_size: int
    """One more than the largest id."""
    special_ids: Mapping[str, int]
    """Of the ROLES that it has."""
    eos_id: int
    """Separates documents: its eos, or its sep, or its bos."""
    longest_text_bytes: int = 1 << 20
    """Longer texts are encoded in parts that are joined (preparation/long_texts.py): libraries take up to 200
    bytes of memory for a byte of text."""

    def __init__(self, content: bytes, special_ids: Mapping[str, int], where: str) -> None:
        """Raise DataError for one that has nothing to separate documents with."""
        self.content = content
        self.special_ids = dict(special_ids)
        self.sha256: str = hashlib.sha256(content).hexdigest()
        ends = [special_ids[role] for role in ("eos", "sep", "bos") if role in special_ids]
        if not ends:
            raise DataError(
                Problem(
                    where,
                    "a tokenizer with neither an eos nor a sep nor a bos token",
                    "one with any of them, which separates documents",
                    "name its eos_token in tokenizer_config.json, or leave tokenizer.model=null",
                )
            )
        self.eos_id = ends[0]

    def save(self, folder: Path) -> Path:
        """Write it into `folder` as corpora and checkpoints carry it; returns the file's path."""
        path = folder / self.file_name
        write_atomically(path, self.content)
        return path

    @property
    def unk_id(self) -> int | None:
        return self.special_ids.get("unk")

    @property
    def bos_id(self) -> int | None:
        return self.special_ids.get("bos")

    @property
    def pad_id(self) -> int | None:
        return self.special_ids.get("pad")

    @property
    def first_ids(self) -> tuple[int, ...]:
        """What models of this tokenizer saw before every text, which `encode` leaves out."""
        return ()

    @abstractmethod
    def typed_specials(self) -> list[str]:
        """Special tokens that `encode` takes for themselves where a text spells them out."""

    @abstractmethod
    def take_specials_for_text(self) -> None:
        """From here on take them for text like any other."""

    @abstractmethod
    def pieces(self) -> list[str]:
        """What each id is called in the vocabulary; "" for an id that is not in it."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`."""

    @abstractmethod
    def encode_arrays(self, texts: Sequence[str] | Sequence[bytes]) -> list[np.ndarray]:
        """Ids of each text (str or UTF-8), int32 arrays; faster than lists. Runs on the calling thread."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special ids stand for nothing, bytes that are no UTF-8 for U+FFFD."""

    @abstractmethod
    def word_starts(self) -> np.ndarray:
        """(vocab_size,) bool: whether each id begins a word; special ids do."""

    @abstractmethod
    def token_byte_lengths(self) -> np.ndarray:
        """(vocab_size,) int32: UTF-8 bytes of text each id stands for; 0 for special and unknown ids."""

    def sentence_ends(self) -> np.ndarray:
        """(vocab_size,) bool: whether each id ends a sentence: by its last character, or as the end of a
        document."""
        ends = np.array([piece.endswith(_SENTENCE_ENDS) for piece in self.pieces()])
        ends[self.eos_id] = True
        return ends

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def decode_after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """What `ids` add to the text of `before`. Some tokenizers write the space before a word, or join
        the bytes of a character, only where they see what stands before."""
        head, whole = self.decode(before).rstrip(_REPLACEMENT), self.decode([*before, *ids])
        return whole[len(head) :] if whole.startswith(head) else self.decode(ids)

    @property
    def is_lossless(self) -> bool:
        """Whether probes of what tokenizers are known to change come back as they went in."""
        return all(self.decode(self.encode(probe)) == probe for probe in PROBES)

    @cached_property
    def sentinel_ids(self) -> tuple[int, ...]:
        """Ids of T5's <extra_id_0>, <extra_id_1>, …; none where it has none."""
        found = {int(match[1]): i for i, p in enumerate(self.pieces()) if (match := _SENTINEL.fullmatch(p))}
        return tuple(found[n] for n in range(len(found))) if set(found) == set(range(len(found))) else ()

    def ordinary_ids(self) -> np.ndarray:
        """Ids that stand for text, ascending, int64: neither special nor unknown nor reserved."""
        reserved = {*self.special_ids.values(), *self.sentinel_ids}
        reserved |= {i for i, piece in enumerate(self.pieces()) if _UNUSED.fullmatch(piece)}
        ids = np.flatnonzero(self.token_byte_lengths())
        return ids[~np.isin(ids, sorted(reserved))]
