"""Tokenizers of `tokenizer.json` in Hugging Face folders, run by the `tokenizers` library: byte-level BPE
(Radford et al. 2019), WordPiece (Schuster and Nakajima 2012), Unigram and BPE with metaspaces.

The ids are those of transformers' AutoTokenizer with add_special_tokens=False. The spelling of a special
token in a text is encoded as the special token, as there, or as text (split_special_tokens=True there).
Corpora and checkpoints
hold a single file, the bundle: the unchanged tokenizer files of the folder, which an export writes again.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from typing import Any, Literal

import numpy as np

from llmtrain.errors import DataError, Problem
from llmtrain.reading import decode_file, parse_object
from llmtrain.tokenizers.base import BUNDLE_FILE, PROBES, ROLES, Frame, Template, Tokenizer
from llmtrain.tokenizers.checks import check_ids, check_steps, library_errors, without_stderr

# There is already one worker per core, and the library's threads do not survive a fork. It reads this at each
# call.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

FORMAT = "llmtrain-tokenizer"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
TEMPLATE_FILE = "chat_template.jinja"
COMPANIONS = (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, "added_tokens.json", TEMPLATE_FILE)
"""Files that accompany tokenizer.json."""
_ALLOWED = "tokenizer.json of the tokenizers library"
MOST_VALUES = 8_000_000
"""Maximum number of JSON values: three per piece or merge, of which the largest known tokenizers have a
million."""
SPACE = "▁"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_KNOWN = {
    "mask": ("[MASK]", "<mask>"),
    "cls": ("[CLS]", "<cls>"),
    "sep": ("[SEP]", "<sep>"),
    "pad": ("[PAD]", "<pad>", "<|pad|>"),
    "bos": ("<s>", "[BOS]", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>"),
    "eos": ("</s>", "[EOS]", "<|end_of_text|>", "<|endoftext|>"),
    "unk": ("[UNK]", "<unk>"),
}
"""Usual tokens of each role, used if no file defines the role."""


@dataclass(frozen=True)
class AddedToken:
    """A token with options, of which only the text is used."""

    content: str


Token = str | AddedToken | None


def text_of(token: Token) -> str | None:
    return token.content if isinstance(token, AddedToken) else token


@dataclass(frozen=True)
class _SpecialTokens:
    """The tokens of roles in tokenizer_config.json and special_tokens_map.json."""

    mask_token: Token = None
    cls_token: Token = None
    sep_token: Token = None
    pad_token: Token = None
    bos_token: Token = None
    eos_token: Token = None
    unk_token: Token = None


@dataclass(frozen=True)
class _Bundle:
    """The contents of a bundle file."""

    format: Literal["llmtrain-tokenizer"]
    version: int
    files: Mapping[str, str] = field(default_factory=dict)
    """File name → text. Other versions may lack it."""


class JsonTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library, with its companion files."""

    file_name = BUNDLE_FILE

    def __init__(self, files: Mapping[str, str], where: str) -> None:
        """files: name → text of tokenizer.json and the existing COMPANIONS; where: name of the source in
        messages.

        Raise DataError if the files are not a valid tokenizer.
        """
        from tokenizers import Tokenizer as Library

        self._where = where
        # Reject duplicate keys: the library might use another value than the one checked here.
        spec = _object(files[TOKENIZER], where, unique=True)
        try:
            check_steps(spec)
        except ValueError as error:
            raise _no_tokenizer(where, str(error)) from None
        with without_stderr(), library_errors(where, "an invalid tokenizer", _ALLOWED):
            self._library = Library.from_str(files[TOKENIZER])
            # Files may set these for inference; here they would truncate and pad documents.
            self._library.no_padding()
            self._library.no_truncation()
            ids = self._library.get_vocab(with_added_tokens=True)
            self._added = self._library.get_added_tokens_decoder()
            self._try_out()
        if not ids:
            raise _no_tokenizer(where, "its vocabulary is empty")
        self.files = {TOKENIZER: files[TOKENIZER], **{n: files[n] for n in COMPANIONS if n in files}}
        self.vocab_size = max(ids.values()) + 1
        check_ids(self.vocab_size - 1, len(ids), where)
        self._style = _Style.of(spec)
        declared = [
            _declared_tokens(_object(files[name], f"{where}: {name}"), f"{where}: {name}")
            for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP)
            if name in files
        ]
        bundle = {"format": FORMAT, "version": 1, "files": self.files}
        super().__init__(
            json.dumps(bundle, indent=1, ensure_ascii=False).encode() + b"\n",
            _roles(spec, declared, ids, self._added),
            where,
        )

    def _try_out(self) -> None:
        """Encode and decode probes, so that a tokenizer that panics does so here. Other errors are ignored
        here and reported when a real text raises them."""
        for probe in PROBES:
            with suppress(Exception):
                self._library.decode(self._library.encode(probe).ids)

    def _errors(self) -> AbstractContextManager[None]:
        return library_errors(self._where, "a tokenizer that fails on a text", _ALLOWED)

    @cached_property
    def first_ids(self) -> tuple[int, ...]:  # type: ignore[override]
        """Ids that the post-processor adds before a text: bos for Llama 3 and Mistral, cls for BERT."""
        with self._errors():
            encoding = self._library.encode("a")
        # Ids of the text have its sequence number, added ids have None.
        count = len(list(takewhile(lambda number: number is None, encoding.sequence_ids)))
        return tuple(encoding.ids[:count])

    def typed_specials(self) -> list[str]:
        if self._library.encode_special_tokens:
            return []
        return [token.content for token in self._added.values() if token.special]

    def added_tokens(self) -> list[str]:
        return [*self.typed_specials(), *(t.content for t in self._added.values() if not t.special)]

    def with_tokens(self, tokens: Sequence[str]) -> JsonTokenizer:
        from tokenizers import AddedToken as Added
        from tokenizers import Tokenizer as Library

        if {*tokens} <= {*self.added_tokens()}:
            return self
        library = Library.from_str(self.files[TOKENIZER])
        with self._errors():
            library.add_special_tokens([Added(token, normalized=False, special=True) for token in tokens])
            content = library.to_str(pretty=True)
        return JsonTokenizer({**self.files, TOKENIZER: content}, self._where)

    def encode_specials_as_text(self) -> None:
        spec, typed = json.loads(self.files[TOKENIZER]), {*self.typed_specials()}
        vocabulary = spec["model"]["vocab"]
        if isinstance(vocabulary, list):
            # Unigram models match special tokens as pieces: rename these to something that no text contains.
            spec["model"]["vocab"] = [[f"\0{p}" if p in typed else p, score] for p, score in vocabulary]
            with self._errors():
                self._library = type(self._library).from_str(json.dumps(spec))
                self._library.no_padding()
                self._library.no_truncation()
        self._library.encode_special_tokens = True

    def pieces(self) -> list[str]:
        pieces = [""] * self.vocab_size
        for piece, i in self._library.get_vocab(with_added_tokens=True).items():
            pieces[i] = piece
        return pieces

    def words(self, text: str) -> list[str]:
        """Return what the text is divided into before the vocabulary is asked."""
        normalizer, divider = self._library.normalizer, self._library.pre_tokenizer
        with self._errors():
            normal = text if normalizer is None else normalizer.normalize_str(text)
            return [normal] if divider is None else [word for word, _ in divider.pre_tokenize_str(normal)]

    def encode(self, text: str) -> list[int]:
        with self._errors():
            return self._library.encode(text, add_special_tokens=False).ids

    def encode_arrays(self, texts: Sequence[str] | Sequence[bytes]) -> list[np.ndarray]:
        decoded = [text.decode() if isinstance(text, bytes) else text for text in texts]
        with self._errors():
            encodings = self._library.encode_batch_fast(decoded, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        with self._errors():
            encoding = self._library.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    @cached_property
    def frame(self) -> Frame | None:
        """What the post-processor adds."""
        with self._errors():
            one, two = self._library.encode("a"), self._library.encode("a", "b")
        frame = Frame(_template(one), _template(two))
        return frame if frame.one.num_specials or frame.two.num_specials else None

    def decode(self, ids: Sequence[int]) -> str:
        with self._errors():
            return self._library.decode([int(i) for i in ids], skip_special_tokens=True)

    def word_starts(self) -> np.ndarray:
        starts = np.array([self._style.starts_word(piece) for piece in self.pieces()])
        starts[[i for i, token in self._added.items() if token.special]] = True
        return starts

    def token_byte_lengths(self) -> np.ndarray:
        """Return (vocab_size,) int32, exact for lossless tokenizers. A WordPiece that begins with a letter or
        digit includes the space before it, which WordPiece discards."""
        lengths = np.array([self._style.num_bytes(piece) for piece in self.pieces()], np.int32)
        for i, token in self._added.items():
            lengths[i] = 0 if token.special else len(token.content.encode())
        if self.unk_id is not None:
            lengths[self.unk_id] = 0
        return lengths


def _template(encoding: Any) -> Template:
    """Return what an encoding has around its texts."""
    # Ids of a text have its number, added ids have None.
    texts: list[int | None] = encoding.sequence_ids
    inside = [i for i, text in enumerate(texts) if text is not None]
    a = [i for i in inside if texts[i] == 0]
    b = [i for i in inside if texts[i] == 1]
    ids, segments = encoding.ids, encoding.type_ids
    parts = [slice(0, inside[0]), slice(a[-1] + 1, b[0]) if b else slice(0, 0), slice(inside[-1] + 1, None)]
    of_a, of_b = segments[a[0]], segments[b[0]] if b else segments[a[0]]
    first, between, last = ((tuple(ids[part]), tuple(segments[part])) for part in parts)
    return Template(first[0], between[0], last[0], first[1], between[1], last[1], (of_a, of_b))


class _Style:
    """The notation of spaces and bytes in a vocabulary."""

    def __init__(
        self, byte_level: bool, byte_fallback: bool, prefix: str | None, suffix: str | None, words: bool
    ) -> None:
        self.byte_level, self.byte_fallback = byte_level, byte_fallback
        self.prefix, self.suffix, self.words = prefix, suffix, words

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> _Style:
        model = spec.get("model") or {}
        byte_level = any('"ByteLevel"' in json.dumps(spec.get(p)) for p in ("pre_tokenizer", "decoder"))
        is_wordpiece = model.get("type") == "WordPiece"
        prefix = model.get("continuing_subword_prefix") or ("##" if is_wordpiece else None)
        suffix = model.get("end_of_word_suffix") or None
        words = model.get("type") == "WordLevel"
        return cls(byte_level, bool(model.get("byte_fallback")), prefix, suffix, words)

    def starts_word(self, piece: str) -> bool:
        if self.byte_level:
            # Space, tab and line ends.
            return piece[:1] in "ĠĊĉč"
        if self.words:
            return True
        return not piece.startswith(self.prefix) if self.prefix else piece.startswith(SPACE)

    def num_bytes(self, piece: str) -> int:
        if self.byte_level:
            return len(piece)  # one character per byte
        if self.byte_fallback and _BYTE.fullmatch(piece):
            return 1
        if self.words:
            return len(piece.encode()) + piece[:1].isalnum()
        if self.prefix:
            bare = piece.removeprefix(self.prefix)
            return len(bare.encode()) + (bare == piece and piece[:1].isalnum())
        if self.suffix and piece.endswith(self.suffix):
            return len(piece.removesuffix(self.suffix).encode()) + 1
        return len(piece.replace(SPACE, " ").encode())


def unbundle(content: str, where: str) -> JsonTokenizer | None:
    """Return the tokenizer of a bundle, None if the JSON is not a bundle. Raise DataError if it is
    damaged."""
    content_of = _object(content, where)
    if content_of.get("format") != FORMAT:
        return None
    bundle = decode_file(_Bundle, content_of, where, DataError)
    if bundle.version != 1:
        raise DataError(
            Problem(
                where, f"version {bundle.version}", "version 1", "use the version of llmtrain that wrote it"
            )
        )
    if TOKENIZER not in bundle.files:
        raise _no_tokenizer(where, f"a bundle without {TOKENIZER}")
    return JsonTokenizer(bundle.files, where)


def make_config(special: Mapping[str, str]) -> str:
    """Return a tokenizer_config.json for a tokenizer.json without one. special: role → token."""
    roles = {f"{role}_token": token for role, token in special.items()}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **roles}
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _declared_tokens(content: dict[str, Any], where: str) -> dict[str, str | None]:
    """Return role key → token for the roles that a file defines; None if it defines that there is no
    token."""
    tokens = decode_file(_SpecialTokens, content, where, DataError)
    keys = [f"{role}_token" for role in ROLES]
    return {key: text_of(getattr(tokens, key)) for key in keys if key in content}


def _roles(
    spec: Mapping[str, Any], declared: Sequence[Mapping[str, str | None]], ids: Mapping[str, int], added: Any
) -> dict[str, int]:
    """Return role → id, as defined by tokenizer_config.json, else special_tokens_map.json, else the
    post-processor of tokenizer.json, else the usual names of added tokens."""
    names = {token.content for token in added.values()}
    processor = spec.get("post_processor") or {}
    roles = {}
    for role in ROLES:
        key = f"{role}_token"
        tokens = [tokens_of_file[key] for tokens_of_file in declared if key in tokens_of_file]
        if isinstance(processor.get(role), list):  # BertProcessing and RobertaProcessing: [token, id]
            tokens += processor[role][:1]
        tokens += [next((token for token in _KNOWN[role] if token in names), None)]
        # A null in a file means that the tokenizer has no such token.
        if tokens[0] is not None and tokens[0] in ids:
            roles[role] = ids[tokens[0]]
    return roles


def _object(content: str | bytes, where: str, *, unique: bool = False) -> dict[str, Any]:
    try:
        return parse_object(content, unique=unique, utf8=True, most=MOST_VALUES)
    except ValueError as error:
        raise _no_tokenizer(where, str(error)) from None


def _no_tokenizer(where: str, reason: str) -> DataError:
    reason = " ".join(reason.split())[:200]
    return DataError(Problem(where, f"an invalid tokenizer ({reason})", _ALLOWED))
