"""Find and load the tokenizer of a folder, in any of the formats of Hugging Face folders."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.config import require, show
from llmtrain.errors import DataError, Problem
from llmtrain.reading import decode_file, parse_object, read_bytes
from llmtrain.tokenizers import huggingface as tokenizer_json
from llmtrain.tokenizers.base import BUNDLE_FILE, SENTENCEPIECE_FILE, Tokenizer
from llmtrain.tokenizers.checks import TOKENIZER_BYTES, VOCABULARY_BYTES, library_errors
from llmtrain.tokenizers.huggingface import (
    COMPANIONS,
    TEMPLATE_FILE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    JsonTokenizer,
    Token,
    text_of,
)
from llmtrain.tokenizers.sentencepiece import SentencePieceTokenizer, extended, with_files

VOCABULARY, MERGES, WORDPIECES = "vocab.json", "merges.txt", "vocab.txt"
SENTENCEPIECE_FILES = (SENTENCEPIECE_FILE, "spiece.model")
EXPORT_MARK = "exported_by"
"""Key of config.json that marks folders exported by llmtrain."""
MOST_EXTRA_IDS = 10_000
"""Maximum number of T5's sentinels; T5 itself has 100."""
ID_DIGITS = 9
_ALLOWED = f"{TOKENIZER}, a sentencepiece .model, {WORDPIECES}, or {VOCABULARY} with {MERGES}"


def find_tokenizer(folder: Path) -> Path | None:
    """Return the tokenizer file in `folder`, or in the newest checkpoint if it is a run folder; None if there
    is none."""
    names = [BUNDLE_FILE, TOKENIZER, *SENTENCEPIECE_FILES, VOCABULARY, WORDPIECES]
    if EXPORT_MARK in _json(folder / "config.json"):
        # The exported tokenizer.json was converted from this file, with which the corpus was prepared.
        names.insert(0, SENTENCEPIECE_FILE)
    for name in names:
        # Reading raises the error for an entry that is not a file.
        if os.path.exists(folder / name) and (name != VOCABULARY or os.path.exists(folder / MERGES)):
            return folder / name
    checkpoints = sorted((folder / "checkpoints").glob("step-*"))
    return find_tokenizer(checkpoints[-1]) if checkpoints else None


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer of a file or folder: a sentencepiece model, tokenizer.json, a bundle, vocab.txt, or
    vocab.json with merges.txt. Adjacent configuration files define the roles of special tokens.

    Raise DataError if there is no tokenizer or it is damaged. Nothing is unpickled and no code is run.
    """
    path = Path(path)
    if path.is_dir():
        found = find_tokenizer(path)
        if found is None:
            pickled = [file.name for file in sorted(path.glob("tokenizer*.p*kl*"))]
            got = f"no tokenizer but {pickled[0]}, which is not opened" if pickled else "no tokenizer"
            remedy = "save it with transformers' fast tokenizers" if pickled else ""
            raise DataError(Problem(str(path), got, _ALLOWED, remedy))
        path = found
    if path.name == WORDPIECES:
        return _complete({TOKENIZER: _wordpiece(path)}, path)
    if path.name == VOCABULARY:
        return _complete({TOKENIZER: _byte_level(path)}, path)
    if path.suffix == ".json":
        content = _text(_read(path), path)
        bundled = tokenizer_json.unbundle(content, str(path))
        return _complete({TOKENIZER: content}, path) if bundled is None else bundled
    tokenizer = SentencePieceTokenizer(_read(path), str(path))
    if path.name not in SENTENCEPIECE_FILES:
        return tokenizer
    # Only these names belong to the adjacent tokenizer_config.json.
    added = _added_tokens(path.parent, tokenizer.pieces())
    model = extended(tokenizer.model, added, str(path)) if added else tokenizer.model
    whole = with_files(model, {**tokenizer.files, **_chat_files(path.parent)})
    return tokenizer if whole == tokenizer.content else SentencePieceTokenizer(whole, str(path))


def _chat_files(folder: Path) -> dict[str, str]:
    """Return the file with the chat template of a folder, in the one form of those that it may have."""
    if os.path.exists(path := folder / TEMPLATE_FILE):
        return {TEMPLATE_FILE: _text(_read(path), path)}
    template = _json(folder / TOKENIZER_CONFIG).get("chat_template")
    if isinstance(template, str):
        return {TEMPLATE_FILE: template}
    return {} if template is None else {TOKENIZER_CONFIG: json.dumps({"chat_template": template})}


def _complete(files: dict[str, str], path: Path) -> JsonTokenizer:
    """Build a tokenizer from `files` and the companion files next to `path`; make a missing
    tokenizer_config.json."""
    for name in COMPANIONS:
        if os.path.exists(path.parent / name):
            files[name] = _text(_read(path.parent / name), path.parent / name)
    tokenizer = JsonTokenizer(files, str(path))
    if TOKENIZER_CONFIG in files:
        return tokenizer
    pieces = tokenizer.pieces()
    special = {role: pieces[i] for role, i in tokenizer.special_ids.items()}
    return JsonTokenizer({**files, TOKENIZER_CONFIG: tokenizer_json.make_config(special)}, str(path))


@dataclass(frozen=True)
class _FolderConfig:
    """The keys of tokenizer_config.json for tokenizers in other formats than tokenizer.json; null means
    false."""

    do_lower_case: bool | None = True
    strip_accents: bool | None = None
    tokenize_chinese_chars: bool | None = True
    add_prefix_space: bool | None = False
    extra_ids: int | None = None
    added_tokens_decoder: Mapping[str, Token] | None = None

    def problems(self) -> Iterator[Problem]:
        got = self.extra_ids
        fits = got is None or 0 <= got <= MOST_EXTRA_IDS
        yield from require(fits, "extra_ids", got, f"0 to {MOST_EXTRA_IDS:,}, or null")
        for key in self.added_tokens_decoder or {}:
            is_id = key.isdecimal() and len(key) <= ID_DIGITS
            yield from require(is_id, "added_tokens_decoder", key, "ids of tokens")


@dataclass(frozen=True)
class _AddedTokens:
    """The contents of added_tokens.json."""

    ids: Mapping[str, int]


def _config(folder: Path) -> _FolderConfig:
    path = folder / TOKENIZER_CONFIG
    return decode_file(_FolderConfig, _json(path), str(path), DataError)


def _added_tokens(folder: Path, pieces: list[str]) -> list[str]:
    """Return the tokens that the folder's configuration adds after the pieces of a sentencepiece model, by
    id."""
    vocab_size, config, path = len(pieces), _config(folder), folder / "added_tokens.json"
    decoded = {int(i): text_of(token) for i, token in (config.added_tokens_decoder or {}).items()}
    by_id = {i: token for i, token in decoded.items() if token is not None}
    by_id |= {
        i: token
        for token, i in decode_file(_AddedTokens, {"ids": _json(path)}, str(path), DataError).ids.items()
    }
    # T5's sentinels are numbered from the last id down, unless the model already has them.
    extra = 0 if "<extra_id_0>" in pieces else config.extra_ids or 0
    by_id |= {vocab_size + extra - 1 - n: f"<extra_id_{n}>" for n in range(extra)}
    added: list[str] = []
    while (i := vocab_size + len(added)) in by_id:
        added.append(by_id[i])
    return added


def _wordpiece(path: Path) -> str:
    """Convert vocab.txt, one piece per line, to tokenizer.json: BERT's tokenizer (Devlin et al.,
    arXiv:1810.04805)."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Library
    from tokenizers.decoders import WordPiece as Decoder
    from tokenizers.models import WordPiece
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer

    config = _config(path.parent)
    vocabulary = {piece: i for i, piece in enumerate(_lines(path))}
    library = Library(WordPiece(vocabulary, unk_token="[UNK]"))  # noqa: S106
    library.normalizer = BertNormalizer(
        lowercase=bool(config.do_lower_case),
        strip_accents=config.strip_accents,
        handle_chinese_chars=bool(config.tokenize_chinese_chars),
    )
    library.pre_tokenizer = BertPreTokenizer()
    library.decoder = Decoder()
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    library.add_special_tokens([AddedToken(t, normalized=False) for t in special if t in vocabulary])
    return library.to_str(pretty=False)


def _byte_level(path: Path) -> str:
    """Convert vocab.json and merges.txt to tokenizer.json: the tokenizer of GPT-2, RoBERTa and BART."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Library
    from tokenizers.decoders import ByteLevel as Decoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    config, vocabulary = _config(path.parent), _json(path)
    for piece, i in vocabulary.items():
        if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < 10**ID_DIGITS:
            raise DataError(Problem(f"{path}: {show(piece)}", show(i), "the id of a token"))
    lines = [line for line in _lines(path.parent / MERGES) if line and not line.startswith("#version")]
    pairs = [line.partition(" ") for line in lines]
    with library_errors(str(path), f"a vocabulary that does not fit {MERGES}", "files of one tokenizer"):
        library = Library(BPE(vocabulary, [(first, second) for first, _, second in pairs]))
    library.pre_tokenizer = ByteLevel(add_prefix_space=bool(config.add_prefix_space))
    library.decoder = Decoder()
    mask = AddedToken("<mask>", lstrip=True, normalized=False)
    special = [AddedToken(t, normalized=False) for t in ("<|endoftext|>", "<s>", "<pad>", "</s>", "<unk>")]
    library.add_special_tokens([token for token in (*special, mask) if token.content in vocabulary])
    return library.to_str(pretty=False)


def _read(path: Path, at_most: int = TOKENIZER_BYTES) -> bytes:
    try:
        return read_bytes(path, at_most)
    except OSError as error:
        raise DataError(Problem(str(path), str(error.strerror), _ALLOWED)) from error


def _text(content: bytes, path: Path) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        got = f"an invalid tokenizer (invalid UTF-8 at byte {error.start})"
        raise DataError(Problem(str(path), got, _ALLOWED)) from None


def _lines(path: Path) -> list[str]:
    """Split at line feeds only, as transformers does: pieces may contain other characters at which
    str.splitlines splits."""
    *lines, last = _text(_read(path, VOCABULARY_BYTES), path).split("\n")
    return [line.removesuffix("\r") for line in (*lines, *([last] if last else []))]


def _json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, {} if the file is missing. Raise DataError if it is not a JSON
    object."""
    if not os.path.exists(path):
        return {}
    try:
        return parse_object(_read(path, VOCABULARY_BYTES), utf8=True)
    except ValueError as error:
        raise DataError(Problem(str(path), str(error), "a JSON object")) from None
