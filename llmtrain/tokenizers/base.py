"""The interface of all tokenizers.

There are two kinds: sentencepiece models (sentencepiece.py), which `llmtrain prepare` can train, and the
`tokenizer.json` of Hugging Face folders (huggingface.py). folder.py finds and loads either.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from llmtrain.errors import DataError, Problem
from llmtrain.files import write_atomically

ROLES = ("mask", "cls", "sep", "pad", "bos", "eos", "unk")
"""Roles of special tokens."""
SENTENCEPIECE_FILE = "tokenizer.model"
BUNDLE_FILE = "tokenizer.bundle.json"
TOKENIZER_FILES = (SENTENCEPIECE_FILE, BUNDLE_FILE)
"""File names of the tokenizer in corpora and checkpoints, which hold one of them."""
_SENTINEL = re.compile(r"<extra_id_([0-9]{1,9})>")
_UNUSED = re.compile(r"[\[<]unused_?\d+[\]>]")
_SENTENCE_ENDS = (".", "!", "?", "…", "。", "！", "？", "\n", "<0x0A>", "Ċ")
"""Last characters of sentences. The last two are a newline byte in sentencepiece and in byte-level BPE."""
PROBES = (
    " a  b\n\tÅ ﬁ １ 😀 ꙮ ",  # white space, case, Unicode normalization, rare characters
    "Don 't . “stop” … it\u00a0is\u200b 漢字12",  # no leading space, clean-up of English, quotes
    "e\u0301 👩\u200d👩 \u2028 \n\n   \n",  # combining marks, joiners, consecutive line ends
)
"""Texts that lossy tokenizers are known to change."""
_REPLACEMENT = "�"
"""Invalid UTF-8 decodes to this."""


class Template(NamedTuple):
    """The special tokens around one text, or around two."""

    first: tuple[int, ...] = ()
    between: tuple[int, ...] = ()
    last: tuple[int, ...] = ()
    first_segments: tuple[int, ...] = ()
    between_segments: tuple[int, ...] = ()
    last_segments: tuple[int, ...] = ()
    segments: tuple[int, int] = (0, 1)
    """Segment of the tokens of the first text and of the second."""

    @property
    def num_specials(self) -> int:
        return len(self.first) + len(self.between) + len(self.last)


class Frame(NamedTuple):
    """How a model reads one text, and two."""

    one: Template
    two: Template


class Tokenizer(ABC):
    """Encodes texts to ids and decodes ids. Encoding does not add special tokens at the ends of a text."""

    file_name: ClassVar[str]
    """File name of the tokenizer in corpora and checkpoints."""
    content: bytes
    """Contents of that file."""
    vocab_size: int
    """Largest id + 1."""
    files: Mapping[str, str]
    """Name → text, of the files of its folder that go on with it, the chat template among them."""
    special_ids: Mapping[str, int]
    """Role → id of the special tokens; a subset of ROLES."""
    eos_id: int
    """Id of the token that separates documents: eos, else sep, else bos."""
    longest_text_bytes: int = 1 << 20
    """Longer texts are encoded in parts (prepare/long_texts.py), because libraries need up to 200 bytes of
    memory per byte of text."""

    def __init__(self, content: bytes, special_ids: Mapping[str, int], where: str) -> None:
        """content: contents of the file `file_name`; where: name of the source in messages.

        Raise DataError if the tokenizer has no token that can separate documents.
        """
        self.content = content
        self.special_ids = dict(special_ids)
        self.sha256: str = hashlib.sha256(content).hexdigest()
        ends = [special_ids[role] for role in ("eos", "sep", "bos") if role in special_ids]
        if not ends:
            raise DataError(
                Problem(
                    where,
                    "a tokenizer without an eos, sep or bos token",
                    "a tokenizer with one of them to separate documents",
                    "name its eos_token in tokenizer_config.json, or leave tokenizer.model=null",
                )
            )
        self.eos_id = ends[0]

    def save(self, folder: Path) -> Path:
        """Write the tokenizer to `folder`, in the format of corpora and checkpoints; return the path."""
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
        """Special ids that models of this tokenizer expect before every text; `encode` does not add them."""
        return ()

    @abstractmethod
    def typed_specials(self) -> list[str]:
        """Return the special tokens that `encode` recognizes where a text contains their spelling."""

    def added_tokens(self) -> list[str]:
        """Return the tokens, special or not, that `encode` matches whole before it divides a text."""
        return self.typed_specials()

    @abstractmethod
    def with_tokens(self, tokens: Sequence[str]) -> Tokenizer:
        """Return a tokenizer that also matches `tokens` whole; those that the vocabulary lacks have the ids
        after its last, in this order. It is this one if it matches them already."""

    @abstractmethod
    def encode_specials_as_text(self) -> None:
        """Make `encode` treat the spelling of special tokens as ordinary text from now on."""

    @abstractmethod
    def pieces(self) -> list[str]:
        """Return the piece of each id in the vocabulary; "" for an unused id."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`."""

    @abstractmethod
    def encode_arrays(self, texts: Sequence[str] | Sequence[bytes]) -> list[np.ndarray]:
        """Return the ids of each text (str or UTF-8) as int32 arrays, in the calling thread."""

    @abstractmethod
    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of `text`, and the characters [begin, end) that each stands for."""

    @cached_property
    def frame(self) -> Frame | None:
        """The special tokens that come with the tokenizer around one text and two; None: it adds none."""
        return None

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`. Special ids are skipped, invalid UTF-8 becomes U+FFFD."""

    @abstractmethod
    def word_starts(self) -> np.ndarray:
        """Return (vocab_size,) bool: whether each id begins a word. Special ids do."""

    @abstractmethod
    def token_byte_lengths(self) -> np.ndarray:
        """Return (vocab_size,) int32: UTF-8 bytes of text per id; 0 for special and unknown ids."""

    def sentence_ends(self) -> np.ndarray:
        """Return (vocab_size,) bool: whether each id ends a sentence, by its last character or as eos."""
        ends = np.array([piece.endswith(_SENTENCE_ENDS) for piece in self.pieces()])
        ends[self.eos_id] = True
        return ends

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def decode_after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """Return the text that `ids` add after the ids `before`. Without this context, some tokenizers omit
        the space before a word, or cannot combine the bytes of a character."""
        head, whole = self.decode(before).rstrip(_REPLACEMENT), self.decode([*before, *ids])
        return whole[len(head) :] if whole.startswith(head) else self.decode(ids)

    @property
    def is_lossless(self) -> bool:
        """Whether decoding restores all PROBES after encoding."""
        return all(self.decode(self.encode(probe)) == probe for probe in PROBES)

    @cached_property
    def sentinel_ids(self) -> tuple[int, ...]:
        """Ids of T5's sentinels <extra_id_0>, <extra_id_1>, …; empty if there are none."""
        found = {int(match[1]): i for i, p in enumerate(self.pieces()) if (match := _SENTINEL.fullmatch(p))}
        return tuple(found[n] for n in range(len(found))) if set(found) == set(range(len(found))) else ()

    def ordinary_ids(self) -> np.ndarray:
        """Return the ids of text, ascending, int64: those that are not special, unknown or reserved."""
        reserved = {*self.special_ids.values(), *self.sentinel_ids}
        reserved |= {i for i, piece in enumerate(self.pieces()) if _UNUSED.fullmatch(piece)}
        ids = np.flatnonzero(self.token_byte_lengths())
        return ids[~np.isin(ids, sorted(reserved))]
