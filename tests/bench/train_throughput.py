"""Training GPTs: our engine against GPT2LMHeadModel and LlamaForCausalLM in transformers' Trainer.

    python -m tests.bench.train_throughput CORPUS [--threads 2] [--rounds 3] [key=value …]

GPT-2's form (8 layers, 512 wide, 30 M parameters at 8,192 tokens) and Llama's (6 layers, 512 wide), 8
sequences of 512, no dropout; the same weights and rows. The Trainer knows no document masks, so ours are off
(data.document_mask=true turns ours on). See against_trainer.py.
"""

from __future__ import annotations

from typing import Any

from tests.bench.against_trainer import Contest, main


def _to_theirs(batch: dict[str, Any]) -> dict[str, Any]:
    # Their models shift labels themselves, and ask for one fewer a row.
    return {"input_ids": batch["tokens"], "labels": batch["labels"].roll(1, dims=1)}


_SHARED = (
    "model.hidden_size=512",
    "model.num_heads=8",
    "model.max_sequence_length=512",
    "model.dropout=0.0",
    "data.document_mask=false",
    "data.workers=0",
    "batch.global_size=8",
    "batch.micro_size=8",
    "batch.sequence_length=512",
)
CONTESTS = {
    "gpt2": Contest(("model=gpt_tiny", "model.num_layers=8", *_SHARED), "GPT2LMHeadModel", _to_theirs),
    "llama": Contest(
        (
            "model=llama_tiny",
            "model.num_layers=6",
            "model.num_kv_heads=4",
            "model.mlp_hidden_size=1408",
            *_SHARED,
        ),
        "LlamaForCausalLM",
        _to_theirs,
    ),
}

if __name__ == "__main__":
    main(CONTESTS, "tests.bench.train_throughput", __doc__ or "")
