"""Rebuild the tokenizer that the metadata of a GGUF file describe: byte-level BPE (`gpt2`) as tokenizer.json,
sentencepiece (`llama`) as a .model.

A file names the pre-tokenizer (tokenizer.ggml.pre), which splits texts before BPE, but does not contain its
rules; those known here are taken from the tokenizers of that name.
"""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from typing import Any, NamedTuple

from llmtrain.config import show
from llmtrain.errors import CheckpointError, DataError, Problem
from llmtrain.interchange.gguf import GgufFile
from llmtrain.tokenizers.base import Tokenizer
from llmtrain.tokenizers.checks import library_errors
from llmtrain.tokenizers.huggingface import TEMPLATE_FILE, TOKENIZER, TOKENIZER_CONFIG, JsonTokenizer
from llmtrain.tokenizers.sentencepiece import SentencePieceTokenizer, with_files

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens, numbered as in sentencepiece."""
_ROLES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad", "mask": "mask", "seperator": "sep"}
"""Name of an id in GGUF (with its misspelling) → role."""
_REMEDY = "give tokenizer=PATH, the model's own"


class _Cut(NamedTuple):
    """The rules of a pre-tokenizer, which splits texts before BPE."""

    pattern: str | None = None
    """Regular expression of the pieces; None: that of GPT-2."""
    single_digits: bool = False
    nfc: bool = False
    whole_words: bool = False
    """Whether a piece that is in the vocabulary becomes one token without merging."""


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CUTS = {
    "gpt-2": _Cut(),
    "smollm": _Cut(single_digits=True),
    "starcoder": _Cut(single_digits=True),
    "llama-bpe": _Cut(_CONTRACTIONS + r"\p{N}{1,3}" + _REST, whole_words=True),
    "qwen2": _Cut(_CONTRACTIONS + r"\p{N}" + _REST, nfc=True),
}
"""tokenizer.ggml.pre → rules."""


def gguf_tokenizer(file: GgufFile) -> Tokenizer:
    """Build the tokenizer of a GGUF file. Raise CheckpointError if its metadata are incomplete or
    unsupported."""
    said = file.said
    kind, tokens = said.text("tokenizer.ggml.model"), said.texts("tokenizer.ggml.tokens")
    if not tokens:
        raise _refusal(file, "tokenizer.ggml.tokens", "nothing", "the pieces of a tokenizer")
    types = said.numbers("tokenizer.ggml.token_type", len(tokens), whole=True) or [NORMAL] * len(tokens)
    if odd := sorted({*types} - {*range(NORMAL, BYTE + 1)}):
        raise _refusal(file, "tokenizer.ggml.token_type", str(odd[0]), f"{NORMAL} to {BYTE}")
    named = {role: said.whole(f"tokenizer.ggml.{name}_token_id") for name, role in _ROLES.items()}
    roles = {role: i for role, i in named.items() if i is not None and 0 <= i < len(tokens)}
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise _refusal(file, "tokenizer.ggml.model", show(kind), ", ".join(builders))
    try:
        return builders[kind](file, tokens, types, roles)
    except DataError as error:
        raise CheckpointError(replace(problem, remedy=_REMEDY) for problem in error.problems) from error


def _byte_level(file: GgufFile, tokens: list[str], types: list[int], roles: dict[str, int]) -> Tokenizer:
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Library

    name = file.said.text("tokenizer.ggml.pre")
    merges = file.said.texts("tokenizer.ggml.merges")
    if name not in _CUTS:
        raise _refusal(file, "tokenizer.ggml.pre", show(name), ", ".join(_CUTS))
    if merges is None:
        raise _refusal(file, "tokenizer.ggml.merges", "nothing", "the merges of its BPE")
    cut = _CUTS[name]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [(first, second) for first, _, second in (merge.partition(" ") for merge in merges)]
    where = f"{file.path}: tokenizer.ggml"
    with library_errors(f"{where}.merges", "no BPE", "merges of its tokens"):
        library = Library(models.BPE(vocabulary, pairs, ignore_merges=cut.whole_words))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if cut.single_digits else []
    if cut.pattern:
        steps.append(pre_tokenizers.Split(Regex(cut.pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut.pattern is None))
    library.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if cut.nfc:
        library.normalizer = normalizers.NFC()
    library.decoder = decoders.ByteLevel()
    special = {i for i, kind in enumerate(types) if kind in (CONTROL, UNKNOWN)} | {*roles.values()}
    added = sorted(special | {i for i, kind in enumerate(types) if kind == USER_DEFINED})
    with library_errors(f"{where}.tokens", "tokens that cannot be added", "texts"):
        library.add_tokens([AddedToken(tokens[i], normalized=False, special=i in special) for i in added])
    if file.said.flag("tokenizer.ggml.add_bos_token") and "bos" in roles:
        bos = tokens[roles["bos"]]
        with library_errors(f"{where}.bos_token_id", f"the token {show(bos)}", "one without spaces and $"):
            library.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, roles["bos"])]
            )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": tokens[i] for role, i in roles.items()},
    }
    if template := file.said.text("tokenizer.chat_template"):
        config["chat_template"] = template
    texts = {TOKENIZER: library.to_str(pretty=True), TOKENIZER_CONFIG: json.dumps(config, indent=2) + "\n"}
    return JsonTokenizer(texts, str(file.path))


def _sentencepiece(file: GgufFile, tokens: list[str], types: list[int], roles: dict[str, int]) -> Tokenizer:
    proto: Any = import_module("sentencepiece.sentencepiece_model_pb2")
    scores = file.said.numbers("tokenizer.ggml.scores", len(tokens))
    if scores is None:
        raise _refusal(file, "tokenizer.ggml.scores", "nothing", "a score of each token")
    spec = proto.ModelProto()
    for token, score, kind in zip(tokens, scores, types, strict=True):
        spec.pieces.add(piece=token, score=score, type=kind)
    trainer, normalizer = spec.trainer_spec, spec.normalizer_spec
    trainer.model_type = proto.TrainerSpec.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = BYTE in types
    for role in ("unk", "bos", "eos", "pad"):
        setattr(trainer, f"{role}_id", roles.get(role, -1))
        if role in roles:
            setattr(trainer, f"{role}_piece", tokens[roles[role]])
    normalizer.name = "identity"
    prefix, strip = (
        file.said.flag(f"tokenizer.ggml.{key}") for key in ("add_space_prefix", "remove_extra_whitespaces")
    )
    normalizer.add_dummy_prefix = True if prefix is None else prefix
    normalizer.remove_extra_whitespaces = bool(strip)
    template = file.said.text("tokenizer.chat_template")
    content = with_files(spec.SerializeToString(), {TEMPLATE_FILE: template} if template else {})
    return SentencePieceTokenizer(content, str(file.path))


def _refusal(file: GgufFile, key: str, got: str, allowed: str) -> CheckpointError:
    return CheckpointError(Problem(f"{file.path}: {key}", got, allowed, _REMEDY))
