"""Tokens a second of greedy generation with a cache: ours against transformers' `generate`, in turn.

    python -m tests.bench.generation [--threads 2] [--rounds 5] [--forms gpt2,llama,t5,bart]

The same random weights on both sides, by way of a folder, in fp32: prompts of 64 tokens, 128 new ones each,
batches of 1 and 8. Both run in one process, one after the other, with the same threads. Ratios are medians
over rounds, of wall time and of the processor time that each took; the latter suffers less from what else the
machine does. That both wrote the same is checked first.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmtrain.generation.config import GenerateConfig
from llmtrain.generation.generate import generate
from tests.parity.architectures import Architecture, ours_from

PROMPT, NEW, BATCHES = 64, 128, (1, 8)
V, LAYERS, WIDTH, HEADS = 8192, 12, 512, 8
START = 3
_ENDLESS = {"vocab_size": V, "eos_token_id": None, "bos_token_id": None, "pad_token_id": 1}

FORMS = {
    "gpt2": Architecture(
        "gpt2",
        "GPT2LMHeadModel",
        {**_ENDLESS, "n_positions": 256, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS},
    ),
    "llama": Architecture(
        "llama",
        "LlamaForCausalLM",
        {
            **_ENDLESS,
            "hidden_size": WIDTH,
            "intermediate_size": 1408,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": 4,
            "max_position_embeddings": 256,
        },
    ),
    "t5": Architecture(
        "t5",
        "T5ForConditionalGeneration",
        {
            **_ENDLESS,
            "d_model": WIDTH,
            "d_kv": WIDTH // HEADS,
            "d_ff": 2048,
            "num_layers": 6,
            "num_heads": HEADS,
            "decoder_start_token_id": START,
        },
    ),
    "bart": Architecture(
        "bart",
        "BartForConditionalGeneration",
        {
            **_ENDLESS,
            "d_model": WIDTH,
            "encoder_layers": 6,
            "decoder_layers": 6,
            "encoder_attention_heads": HEADS,
            "decoder_attention_heads": HEADS,
            "encoder_ffn_dim": 2048,
            "decoder_ffn_dim": 2048,
            "max_position_embeddings": 256,
            "decoder_start_token_id": START,
            "forced_eos_token_id": None,
        },
    ),
}


def measure(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of wall and of processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(ours: Any, theirs: Any, batch: int, rounds: int) -> str:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(8, V, (batch, PROMPT), generator=generator)
    config = GenerateConfig(max_new_tokens=NEW, temperature=0.0)
    asks = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}

    def run_ours() -> list[list[int]]:
        return generate(ours, prompts.tolist(), config)

    def run_theirs() -> list[list[int]]:
        texts = theirs.generate(prompts, attention_mask=torch.ones_like(prompts), **asks)
        return [text[-NEW:].tolist() for text in texts]

    pairs = list(zip(run_ours(), run_theirs(), strict=True))
    # Texts may part where two tokens are equally likely but for rounding.
    same = sum(a == b for text_a, text_b in pairs for a, b in zip(text_a, text_b, strict=True))
    times = [(measure(run_ours), measure(run_theirs)) for _ in range(rounds)]
    seconds = [statistics.median(turn[side][0] for turn in times) for side in (0, 1)]
    wall, cpu = (statistics.median(turn[1][i] / turn[0][i] for turn in times) for i in (0, 1))
    rates = "".join(f"{batch * NEW / s:>14,.0f}" for s in seconds)
    return f"{rates}{wall:>12.2f}{cpu:>12.2f}{same / (batch * NEW):>12.0%}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--forms", default=",".join(FORMS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{'':<20}{'ours, tok/s':>14}{'theirs':>14}{'wall ratio':>12}{'cpu ratio':>12}{'same tokens':>12}")
    for form in options.forms.split(","):
        with tempfile.TemporaryDirectory() as folder:
            theirs = FORMS[form].theirs()
            theirs.save_pretrained(folder)
            ours = ours_from(Path(folder))
        for batch in BATCHES:
            row = compare(ours, theirs, batch, options.rounds)
            print(f"{form + f', batch {batch}':<20}{row}", flush=True)


if __name__ == "__main__":
    main()
