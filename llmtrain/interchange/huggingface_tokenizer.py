"""Write a tokenizer as the files of Hugging Face's fast tokenizers.

The files of an imported tokenizer are written unchanged. For a sentencepiece model the JSON is built here,
without the `tokenizers` library. Its ids equal those of sentencepiece, except for
- ties between equally likely segmentations, which sentencepiece decides by the rounding of fp32 sums: about
one token in
  80,000, in texts of that length;
- a literal `<0x41>` in a text, if the vocabulary has no `<`;
- user-defined symbols of a foreign model that also adds a space before every text.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llmtrain.chat.source import own_source
from llmtrain.errors import DataError, Problem
from llmtrain.tokenizers.base import SENTENCEPIECE_FILE, Frame, Template, Tokenizer
from llmtrain.tokenizers.folder import load_tokenizer
from llmtrain.tokenizers.huggingface import TEMPLATE_FILE, TOKENIZER_CONFIG, JsonTokenizer
from llmtrain.tokenizers.sentencepiece import SentencePieceTokenizer

SPACE = "▁"


def tokenizer_files(
    tokenizer: Tokenizer,
    max_length: int | None,
    where: str,
    model_ids: Mapping[str, int] = MappingProxyType({}),
    frame: Frame | None = None,
) -> dict[str, bytes | str | Any]:
    """Return file name → contents: bytes, text, or a value to be written as JSON.

    max_length: context length of the model in tokens; None: unlimited. where: name of the tokenizer file in
    messages.
    model_ids: role → id of the model's special tokens; those after the ids of a sentencepiece model are added
    to it.
    frame: special tokens that a sentencepiece model adds around one text and two; None: none.
    Raise DataError for a kind of sentencepiece model without a fast equivalent.
    """
    if isinstance(tokenizer, JsonTokenizer):
        return dict(tokenizer.files)
    return {
        SENTENCEPIECE_FILE: _model_of(tokenizer),
        **_json_of_sentencepiece(tokenizer, max_length, where, model_ids, frame),
    }


def chat_files(
    contents: Mapping[str, Any], tokenizer: Tokenizer, template: str | None
) -> dict[str, bytes | str | Any]:
    """Return the files that a chat template adds or changes.

    contents: the tokenizer's other files. template: of the conversations that the model was trained on; None:
    the tokenizer's own.
    """
    if isinstance(tokenizer, JsonTokenizer) and (template is None or own_source(tokenizer) == template):
        return {}  # it is among the contents
    found: dict[str, Any] = {TEMPLATE_FILE: template}
    if template is None:
        files = tokenizer.files.items()
        found = {name: json.loads(text) if name == TOKENIZER_CONFIG else text for name, text in files}
    if found and isinstance(config := contents.get(TOKENIZER_CONFIG), dict):
        # What the template spells must become the special tokens.
        found[TOKENIZER_CONFIG] = {**config, **found.get(TOKENIZER_CONFIG, {}), "split_special_tokens": False}
    return found


def _model_of(tokenizer: Tokenizer) -> bytes:
    """Return the file of a sentencepiece model, as other programs have it."""
    return tokenizer.model if isinstance(tokenizer, SentencePieceTokenizer) else tokenizer.content


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Return `bos_token_id`, `eos_token_id` and `pad_token_id`, as far as the tokenizer has them."""
    roles = ("bos", "eos", "pad")
    return {
        f"{role}_token_id": tokenizer.special_ids[role] for role in roles if role in tokenizer.special_ids
    }


def read_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """Load a tokenizer. Raise DataError if it is unreadable or invalid, or has more ids than the `vocab_size`
    of the model."""
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            Problem(
                str(path),
                f"a tokenizer of {tokenizer.vocab_size:,} ids",
                f"at most the model's vocab_size of {vocab_size:,}",
                "give the tokenizer that the model was trained with",
            )
        )
    return tokenizer


def _json_of_sentencepiece(
    tokenizer: Tokenizer,
    max_length: int | None,
    where: str,
    model_ids: Mapping[str, int],
    frame: Frame | None,
) -> dict[str, Any]:
    proto: Any = import_module("sentencepiece.sentencepiece_model_pb2")
    spec = proto.ModelProto.FromString(_model_of(tokenizer))
    kinds = {proto.TrainerSpec.UNIGRAM: _unigram, proto.TrainerSpec.BPE: _bpe}
    kind = spec.trainer_spec.model_type
    if kind not in kinds or spec.trainer_spec.treat_whitespace_as_suffix:
        name = proto.TrainerSpec.ModelType.Name(kind).lower()
        suffix = " with spaces as suffixes" if spec.trainer_spec.treat_whitespace_as_suffix else ""
        raise DataError(
            Problem(
                where,
                f"a sentencepiece model of kind {name}{suffix}",
                "unigram or bpe, spaces before words",
                "export without a tokenizer, or train with another",
            )
        )
    types = proto.ModelProto.SentencePiece
    added = [
        _added_token(i, piece.piece, special=piece.type != types.USER_DEFINED)
        for i, piece in enumerate(spec.pieces)
        if piece.type in (types.CONTROL, types.UNKNOWN, types.USER_DEFINED)
    ]
    special = {role: spec.pieces[i].piece for role, i in tokenizer.special_ids.items()}
    # Sorted by id, because the library assigns ids in order.
    behind = sorted((i, role) for role, i in model_ids.items() if i >= tokenizer.vocab_size)
    for i, role in behind:
        special[role] = f"[{role.upper()}]"
        added.append(_added_token(i, special[role], special=True))
    names = {i: piece.piece for i, piece in enumerate(spec.pieces)}
    names |= {i: special[role] for i, role in behind}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": _normalizer(spec.normalizer_spec),
        "pre_tokenizer": None,
        "post_processor": None if frame is None else _post_processor(frame, names),
        "decoder": _decoder(spec.normalizer_spec),
        # The tokenizer's unk_id is checked: that of the model's spec may not exist.
        "model": kinds[kind](spec, types, tokenizer.unk_id or 0),
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        # As in sentencepiece, `</s>` in a text is ordinary text. But the added [MASK] must be one token.
        "split_special_tokens": not behind,
        **{f"{name}_token": piece for name, piece in special.items()},
    }
    return {"tokenizer.json": content, "tokenizer_config.json": config}


def _post_processor(frame: Frame, names: Mapping[int, str]) -> dict[str, Any]:
    """Return what adds the special tokens of a frame. names: id → token."""
    used = {i for template in frame for part in template[:3] for i in part}

    def of(template: Template, texts: str) -> list[dict[str, Any]]:
        def specials(ids: tuple[int, ...], segments: tuple[int, ...]) -> list[dict[str, Any]]:
            both = zip(ids, segments, strict=True)
            return [{"SpecialToken": {"id": names[i], "type_id": segment}} for i, segment in both]

        items = specials(template.first, template.first_segments)
        items.append({"Sequence": {"id": "A", "type_id": template.segments[0]}})
        if texts == "AB":
            items += specials(template.between, template.between_segments)
            items.append({"Sequence": {"id": "B", "type_id": template.segments[1]}})
        return items + specials(template.last, template.last_segments)

    return {
        "type": "TemplateProcessing",
        "single": of(frame.one, "A"),
        "pair": of(frame.two, "AB"),
        "special_tokens": {
            names[i]: {"id": names[i], "ids": [i], "tokens": [names[i]]} for i in sorted(used)
        },
    }


def _unigram(spec: Any, types: Any, unk_id: int) -> dict[str, Any]:
    textual = (types.NORMAL, types.USER_DEFINED)
    lowest = min((piece.score for piece in spec.pieces if piece.type in textual), default=0.0)
    # Fast tokenizers match all vocabulary entries in texts, sentencepiece only textual ones: control and byte
    # pieces must score lower than any other segmentation of their spelling, which has at most 6 characters.
    never = 16 * lowest - 100.0
    return {
        "type": "Unigram",
        "unk_id": unk_id,
        "vocab": [[piece.piece, piece.score if piece.type in textual else never] for piece in spec.pieces],
        "byte_fallback": spec.trainer_spec.byte_fallback,
    }


def _bpe(spec: Any, types: Any, unk_id: int) -> dict[str, Any]:
    # sentencepiece merges the neighbours whose union has the highest score: list the merges in this order.
    rank = {
        piece.piece: (-piece.score, i) for i, piece in enumerate(spec.pieces) if piece.type == types.NORMAL
    }
    merges = [
        (rank[whole], cut, [whole[:cut], whole[cut:]])
        for whole in rank
        for cut in range(1, len(whole))
        if whole[:cut] in rank and whole[cut:] in rank
    ]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": spec.pieces[unk_id].piece,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": spec.trainer_spec.byte_fallback,
        "ignore_merges": False,
        "vocab": {piece.piece: i for i, piece in enumerate(spec.pieces)},
        "merges": [pair for _, _, pair in sorted(merges)],
    }


def _normalizer(spec: Any) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        for extra, left in ((r"\A +", ""), (r" +\z", ""), (" {2,}", " ")):
            steps.append({"type": "Replace", "pattern": {"Regex": extra}, "content": left})
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return {"type": "Sequence", "normalizers": steps}


def _decoder(spec: Any) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if spec.add_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _added_token(i: int, content: str, *, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": content, **flags, "special": special}
