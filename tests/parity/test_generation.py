"""Texts equal those of transformers' `generate`, of the same random weights: greedy and beams."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.generation.config import GenerateConfig
from llmtrain.generation.generate import generate
from tests.parity.architectures import Architecture, ours_from

pytestmark = pytest.mark.slow

V, PAD, START = 24, 1, 3
SPECIAL = {"eos_token_id": None, "pad_token_id": PAD, "bos_token_id": None}
LENGTHS = (9, 4, 9, 1, 6)

_LLAMA = {
    **SPECIAL,
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
# Shorter than what is generated and than the longest prompt.
_WINDOWS = {"head_dim": 16, "sliding_window": 5, "tie_word_embeddings": False, "query_pre_attn_scalar": 16}
ARCHITECTURES = (
    Architecture(
        "gpt2",
        "GPT2LMHeadModel",
        {**SPECIAL, "vocab_size": V, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    ),
    Architecture("llama", "LlamaForCausalLM", _LLAMA),
    Architecture("gemma2", "Gemma2ForCausalLM", {**_LLAMA, **_WINDOWS}),
    Architecture(
        "gemma3",
        "Gemma3ForCausalLM",
        {**_LLAMA, **_WINDOWS, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    Architecture("olmo2", "Olmo2ForCausalLM", _LLAMA),
    Architecture(
        "t5",
        "T5ForConditionalGeneration",
        {
            **SPECIAL,
            "vocab_size": V,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 40,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": START,
        },
    ),
    Architecture(
        "bart",
        "BartForConditionalGeneration",
        {
            **SPECIAL,
            "vocab_size": V,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 40,
            "decoder_ffn_dim": 40,
            "max_position_embeddings": 64,
            "init_std": 0.3,
            "decoder_start_token_id": START,
            "forced_eos_token_id": None,
        },
    ),
)
BEAMS = GenerateConfig(max_new_tokens=14, num_beams=4)
SETTINGS = (
    GenerateConfig(max_new_tokens=14, temperature=0.0),
    BEAMS,
    replace(BEAMS, length_penalty=-1.0),
    replace(BEAMS, length_penalty=0.0, early_stopping=True, num_beams=3),
    replace(BEAMS, length_penalty=2.0, min_new_tokens=5),
    GenerateConfig(max_new_tokens=14, temperature=0.0, repetition_penalty=1.5),
    replace(BEAMS, repetition_penalty=1.2),
)


def theirs_of(
    model: Any, prompts: list[list[int]], config: GenerateConfig, ends: list[int]
) -> list[list[int]]:
    """Sources together, padded; prompts each by itself."""
    asks = {
        "do_sample": False,
        "eos_token_id": ends,
        "max_new_tokens": config.max_new_tokens,
        "min_new_tokens": config.min_new_tokens,
        "num_beams": config.num_beams,
        "length_penalty": config.length_penalty,
        "early_stopping": config.early_stopping,
        "repetition_penalty": config.repetition_penalty,
    }
    asks = {key: value for key, value in asks.items() if value is not None}
    texts = []
    if model.config.is_encoder_decoder:
        longest = max(map(len, prompts))
        sources_BS = torch.tensor([[*p, *[PAD] * (longest - len(p))] for p in prompts])
        is_token_BS = torch.arange(longest) < torch.tensor(list(map(len, prompts)))[:, None]
        texts = [text[1:] for text in model.generate(sources_BS, attention_mask=is_token_BS.long(), **asks)]
    else:
        for prompt in prompts:
            prompt_1T = torch.tensor([prompt])
            (text,) = model.generate(prompt_1T, attention_mask=torch.ones_like(prompt_1T), **asks)
            texts.append(text[len(prompt) :])
    tokens = [text.tolist() for text in texts]
    lengths = [[place for place, token in enumerate(text) if token in ends] for text in tokens]
    return [text[: places[0]] if places else text for text, places in zip(tokens, lengths, strict=True)]


@pytest.mark.in_turns(2)
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.name)
def test_generation(architecture: Architecture, tmp_path: Path) -> None:
    theirs = architecture.theirs()
    if theirs.config.is_encoder_decoder:
        with torch.no_grad():  # their tied embeddings would repeat each token for ever
            for name, parameter in theirs.named_parameters():
                parameter *= 3.0 if ".layer" in name or "positions" in name else 1.0
    theirs.save_pretrained(tmp_path)
    ours = ours_from(tmp_path)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(4, V, (length,), generator=generator).tolist() for length in LENGTHS]
    # The two tokens that end the most texts at places of their own.
    free = generate(ours, prompts, SETTINGS[0])
    ends = sorted(
        range(V), key=lambda token: len({(text.index(token) if token in text else -1) for text in free})
    )[-2:]
    found = {}
    for config in SETTINGS:
        found[config] = generate(ours, prompts, config, eos_ids=ends)
        assert found[config] == theirs_of(theirs, prompts, config, ends), config
    assert len({len(text) for texts in found.values() for text in texts}) > 2, "some end, some do not"
    assert len({str(texts) for texts in found.values()}) > 2, "settings tell"
