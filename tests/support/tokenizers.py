"""Tokenizers as Hugging Face folders hold them, trained here on a few words."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

KINDS = {
    "gpt2": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    "llama": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "bert": {f"{role.lower()}_token": f"[{role}]" for role in ("UNK", "CLS", "SEP", "PAD", "MASK")},
    "t5": {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
}
"""Kind → what its tokenizer_config.json says of special tokens."""
SENTINELS = 8


def texts(count: int = 300) -> Iterator[str]:
    """Lines of random words, some of them beyond ASCII."""
    rng = np.random.default_rng(3)
    words = ["".join(rng.choice([*"aeioubcdfglmnrstü"], rng.integers(2, 9))) for _ in range(400)]
    for _ in range(count):
        yield " ".join(rng.choice(words, 20)).capitalize() + ", don't stop.\n\t12 für 東京 cafés"


def train_tokenizer(kind: str, vocab_size: int = 500) -> Tokenizer:
    """A tokenizer as models of this kind have it."""
    special = list(dict.fromkeys(KINDS[kind].values()))
    options: dict[str, Any] = {"vocab_size": vocab_size, "show_progress": False, "special_tokens": special}
    if kind == "gpt2":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(**options)
    elif kind == "llama":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
        options["special_tokens"] += [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(limit_alphabet=60, **options)
    elif kind == "bert":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**options)
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        options["special_tokens"] += [f"<extra_id_{n}>" for n in range(SENTINELS)]
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **options)
    tokenizer.train_from_iterator(texts(), trainer)
    if kind == "llama":
        # Bytes are pieces of the vocabulary, not tokens that texts may spell.
        content = json.loads(tokenizer.to_str())
        content["added_tokens"] = content["added_tokens"][: len(KINDS[kind])]
        tokenizer = Tokenizer.from_str(json.dumps(content))
    return tokenizer


def write_tokenizer(folder: Path, kind: str, vocab_size: int = 500) -> Path:
    """A folder with tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer(kind, vocab_size).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **KINDS[kind]}))
    return folder


def write_chat_tokenizer(folder: Path, kind: str, tokens: Sequence[str], template: str | None) -> Path:
    """A folder with a tokenizer that has further special tokens, and a chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_str(_trained(kind))
    tokenizer.add_special_tokens(list(tokens))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= KINDS[kind] | ({} if template is None else {"chat_template": template})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@functools.cache
def _trained(kind: str) -> str:
    content: str = train_tokenizer(kind).to_str()
    return content
