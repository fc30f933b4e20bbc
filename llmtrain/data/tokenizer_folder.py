"""Where a folder keeps its tokenizer, in each of the forms that Hugging Face folders have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmtrain.data import tokenizer_json
from llmtrain.data.tokenizer import BUNDLE_FILE, SENTENCEPIECE_FILE, Tokenizer
from llmtrain.data.tokenizer_json import COMPANIONS, TOKENIZER, TOKENIZER_CONFIG, JsonTokenizer
from llmtrain.data.tokenizer_sentencepiece import SentencePieceTokenizer, extended
from llmtrain.errors import DataError, Problem

VOCABULARY, MERGES, WORDPIECES = "vocab.json", "merges.txt", "vocab.txt"
SENTENCEPIECE_FILES = (SENTENCEPIECE_FILE, "spiece.model")
EXPORT_MARK = "exported_by"
"""Key of config.json that tells our exports from others' folders."""
_ALLOWED = f"{TOKENIZER}, a sentencepiece .model, {WORDPIECES}, or {VOCABULARY} with {MERGES}"


def find_tokenizer(folder: Path) -> Path | None:
    """The file that `load_tokenizer` takes in `folder`, or in the newest checkpoint of a run's folder; None
    without one."""
    names = [BUNDLE_FILE, TOKENIZER, *SENTENCEPIECE_FILES, VOCABULARY, WORDPIECES]
    if EXPORT_MARK in _json(folder / "config.json"):
        # Its tokenizer.json was made of this one, with which the corpus was prepared.
        names.insert(0, SENTENCEPIECE_FILE)
    for name in names:
        if (folder / name).is_file() and (name != VOCABULARY or (folder / MERGES).is_file()):
            return folder / name
    checkpoints = sorted((folder / "checkpoints").glob("step-*"))
    return find_tokenizer(checkpoints[-1]) if checkpoints else None


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a file, or in a Hugging Face folder: a sentencepiece model, tokenizer.json, a bundle,
    vocab.txt, or vocab.json with merges.txt. What stands beside these says what their special tokens are for.

    Raises DataError, one line, when there is none or it is damaged. Nothing is unpickled, no code is run.
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
    model = _read(path)
    if path.name in SENTENCEPIECE_FILES:
        # Elsewhere a tokenizer_config.json beside it is another's.
        tokenizer = SentencePieceTokenizer(model, str(path))
        if added := _added_tokens(path.parent, tokenizer.pieces()):
            model = extended(model, added, str(path))
    return SentencePieceTokenizer(model, str(path))


def _complete(files: dict[str, str], path: Path) -> JsonTokenizer:
    """With what stands beside `path`; a tokenizer_config.json is made where there is none."""
    for name in COMPANIONS:
        if (path.parent / name).is_file():
            files[name] = _text(_read(path.parent / name), path.parent / name)
    tokenizer = JsonTokenizer(files, str(path))
    if TOKENIZER_CONFIG in files:
        return tokenizer
    pieces = tokenizer.pieces()
    special = {role: pieces[i] for role, i in tokenizer.special_ids.items()}
    return JsonTokenizer({**files, TOKENIZER_CONFIG: tokenizer_json.make_config(special)}, str(path))


def _added_tokens(folder: Path, pieces: list[str]) -> list[str]:
    """Tokens that the folder's configuration puts behind a sentencepiece model's pieces, by id."""
    vocab_size, config = len(pieces), _json(folder / TOKENIZER_CONFIG)
    by_id: dict[int, str] = {}
    for i, token in (config.get("added_tokens_decoder") or {}).items():
        by_id[int(i)] = token["content"] if isinstance(token, dict) else str(token)
    by_id |= {i: token for token, i in _json(folder / "added_tokens.json").items() if isinstance(i, int)}
    # T5's: from the last id down, unless the model has them already.
    extra = 0 if "<extra_id_0>" in pieces else config.get("extra_ids") or 0
    by_id |= {vocab_size + extra - 1 - n: f"<extra_id_{n}>" for n in range(extra)}
    added: list[str] = []
    while (i := vocab_size + len(added)) in by_id:
        added.append(by_id[i])
    return added


def _wordpiece(path: Path) -> str:
    """vocab.txt, one piece a line, as tokenizer.json: BERT's tokenizer (Devlin et al., arXiv:1810.04805)."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Library
    from tokenizers.decoders import WordPiece as Decoder
    from tokenizers.models import WordPiece
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer

    config = _json(path.parent / TOKENIZER_CONFIG)
    lowercase = bool(config.get("do_lower_case", True))
    vocabulary = {piece: i for i, piece in enumerate(_lines(path))}
    library = Library(WordPiece(vocabulary, unk_token="[UNK]"))
    library.normalizer = BertNormalizer(
        lowercase=lowercase,
        strip_accents=config.get("strip_accents"),
        handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
    )
    library.pre_tokenizer = BertPreTokenizer()
    library.decoder = Decoder()
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    library.add_special_tokens([AddedToken(t, normalized=False) for t in special if t in vocabulary])
    return library.to_str(pretty=False)


def _byte_level(path: Path) -> str:
    """vocab.json and merges.txt as tokenizer.json: GPT-2's tokenizer, and RoBERTa's and BART's."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Library
    from tokenizers.decoders import ByteLevel as Decoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    config = _json(path.parent / TOKENIZER_CONFIG)
    vocabulary = _json(path)
    lines = [line for line in _lines(path.parent / MERGES) if line and not line.startswith("#version")]
    pairs = [line.partition(" ") for line in lines]
    try:
        library = Library(BPE(vocabulary, [(first, second) for first, _, second in pairs]))
    except Exception as error:  # the library raises this class itself
        got = f"a vocabulary that does not fit {MERGES} ({error})"
        raise DataError(Problem(str(path), got, "files of one tokenizer")) from error
    add_prefix_space = bool(config.get("add_prefix_space", False))
    library.pre_tokenizer = ByteLevel(add_prefix_space=add_prefix_space)
    library.decoder = Decoder()
    mask = AddedToken("<mask>", lstrip=True, normalized=False)
    special = [AddedToken(t, normalized=False) for t in ("<|endoftext|>", "<s>", "<pad>", "</s>", "<unk>")]
    library.add_special_tokens([token for token in (*special, mask) if token.content in vocabulary])
    return library.to_str(pretty=False)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(Problem(str(path), str(error.strerror), _ALLOWED)) from error


def _text(content: bytes, path: Path) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        got = f"no tokenizer (no UTF-8 at byte {error.start})"
        raise DataError(Problem(str(path), got, _ALLOWED)) from None


def _lines(path: Path) -> list[str]:
    """As transformers parts them: at line feeds alone. Pieces may hold what else str.splitlines, or a file
    read as text, would cut at."""
    *lines, last = _text(_read(path), path).split("\n")
    return [line.removesuffix("\r") for line in (*lines, *([last] if last else []))]


def _json(path: Path) -> dict[str, Any]:
    """{} for a file that is not there; raises DataError for one that holds no JSON object."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise DataError(Problem(str(path), f"no JSON ({error})", "a JSON object")) from error
    if not isinstance(value, dict):
        raise DataError(Problem(str(path), f"JSON {type(value).__name__}", "a JSON object"))
    return value
