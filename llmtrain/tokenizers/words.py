"""Tokenizers of whole words: a vocabulary of words, and one id for all others.

A text is divided into runs of letters, digits and underscores, and runs of other characters without white
space. Such a tokenizer is a `tokenizer.json` like others; it is what word vectors need.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from llmtrain.errors import DataError, Problem
from llmtrain.tokenizers.config import SPECIAL_TOKENS, TokenizerConfig
from llmtrain.tokenizers.huggingface import TOKENIZER, TOKENIZER_CONFIG, JsonTokenizer, make_config

ROLES = dict(zip(("unk", "bos", "eos", "pad"), SPECIAL_TOKENS, strict=True))


def word_tokenizer(words: Sequence[str], lowercase: bool, where: str) -> JsonTokenizer:
    """Return the tokenizer of these words, whose ids follow those of SPECIAL_TOKENS in this order. Words that
    are special tokens or occur twice are left out.

    lowercase: texts are read in lower case. where: name of the source in messages.
    """
    kept = [word for word in dict.fromkeys(words) if word and word not in SPECIAL_TOKENS]
    specials = [
        {
            "id": i,
            "content": token,
            "special": True,
            **dict.fromkeys(("single_word", "lstrip", "rstrip"), False),
        }
        for i, token in enumerate(SPECIAL_TOKENS)
    ]
    steps = [{"type": "NFC"}, *([{"type": "Lowercase"}] if lowercase else [])]
    spec: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**token, "normalized": False} for token in specials],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: i for i, word in enumerate((*SPECIAL_TOKENS, *kept))},
            "unk_token": SPECIAL_TOKENS[0],
        },
    }
    files = {TOKENIZER: json.dumps(spec, ensure_ascii=False), TOKENIZER_CONFIG: make_config(ROLES)}
    return JsonTokenizer(files, where)


def train_words(documents: Iterable[str], config: TokenizerConfig) -> bytes:
    """Return the file of the tokenizer of the most frequent words, which depends only on the documents and
    the config; of words that are equally frequent, those that come first in the alphabet.

    Raise DataError if no word occurs config.min_count times.
    """
    divider = word_tokenizer((), config.lowercase, "documents")
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(divider.words(document))
    often = [word for word, count in counts.items() if count >= config.min_count]
    often.sort(key=lambda word: (-counts[word], word))
    if not often:
        most = max(counts.values(), default=0)
        got = f"{config.min_count}, which leaves none of {len(counts):,} words"
        raise DataError(Problem("tokenizer.min_count", got, f"1 to {most}", "lower it, or add text"))
    size = config.vocab_size - len(SPECIAL_TOKENS)
    return word_tokenizer(often[:size], config.lowercase, "documents").content
