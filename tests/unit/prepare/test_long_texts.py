"""Long documents have the ids of the whole document, wherever the parts that are encoded end."""

import io
from functools import cache

import numpy as np
import pytest
import sentencepiece

from llmtrain.prepare.encode import encode_documents
from llmtrain.prepare.long_texts import encode_text
from llmtrain.tokenizers.base import Tokenizer
from llmtrain.tokenizers.config import TokenizerConfig
from llmtrain.tokenizers.huggingface import JsonTokenizer
from llmtrain.tokenizers.sentencepiece import LONGEST_UNIGRAM_BYTES, SentencePieceTokenizer, train
from tests.support.tokenizers import KINDS, texts, train_tokenizer

TEXT = "\n".join(texts(120))
DOCUMENTS = {
    "words": TEXT,
    "no spaces": TEXT.replace(" ", "").replace("\n", ""),
    "runs of spaces": TEXT.replace(" ", " " * 5).replace("\n", "\n \n\n"),
    "marks": TEXT.replace("u", "u\u0308\u0301").replace("c", "👩\u200d👩"),
    "special tokens": TEXT.replace("er", "</s>").replace("a ", " <|endoftext|>[MASK]"),
    "one letter": "a" * 5000,
    "a long word among words": TEXT + "x" * 9000 + TEXT,
    "Chinese": "東京都庁第一本庁舎" * 900,
}


def sentencepiece_model(kind: str, prefix: bool) -> SentencePieceTokenizer:
    """With `prefix`, as T5's and Llama's models are; else one trained here."""
    if not prefix:
        return SentencePieceTokenizer(train(texts(), TokenizerConfig(kind=kind, vocab_size=400)))
    model = io.BytesIO()
    options = {"byte_fallback": True, "normalization_rule_name": "identity"} if kind == "bpe" else {}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts(),
        model_writer=model,
        vocab_size=400,
        model_type=kind,
        remove_extra_whitespaces=kind != "bpe",
        minloglevel=2,
        **options,
    )
    return SentencePieceTokenizer(model.getvalue())


@cache
def tokenizer(name: str) -> Tokenizer:
    if name in KINDS:
        return JsonTokenizer({"tokenizer.json": train_tokenizer(name).to_str()}, name)
    kind, _, prefix = name.partition(" ")
    return sentencepiece_model(kind, bool(prefix))


NAMES = [*KINDS, "unigram", "bpe", "unigram prefix", "bpe prefix"]


@pytest.mark.parametrize("document", DOCUMENTS)
@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_the_whole_document(name: str, document: str):
    text = DOCUMENTS[document]
    whole = tokenizer(name).encode(text)
    for part_bytes in (1999, 2048, 4096):
        assert encode_text(tokenizer(name), text.encode(), part_bytes).tolist() == whole, part_bytes


@pytest.mark.parametrize("name", NAMES)
def test_parts_are_short(name: str, monkeypatch: pytest.MonkeyPatch):
    encoded: list[int] = []
    plain = tokenizer(name).encode_arrays

    def counting(texts: list[bytes]) -> list[np.ndarray]:
        encoded.extend(map(len, texts))
        return plain(texts)

    monkeypatch.setattr(tokenizer(name), "encode_arrays", counting)
    encode_text(tokenizer(name), TEXT.encode(), 4096)
    assert max(encoded) <= 4096
    assert sum(encoded) < 1.25 * len(TEXT.encode())


def test_only_long_documents_are_cut(monkeypatch: pytest.MonkeyPatch):
    long, short = TEXT.encode(), b"das fur"
    llama = tokenizer("bpe prefix")
    assert llama.longest_text_bytes == 1 << 20
    # Rounding of the library's scores depends on what stands before.
    assert tokenizer("unigram").longest_text_bytes == LONGEST_UNIGRAM_BYTES
    monkeypatch.setattr(llama, "longest_text_bytes", 1000)
    found = encode_documents(llama, [short, long])
    assert [ids.tolist() for ids in found] == [llama.encode("das fur"), llama.encode(TEXT)]
