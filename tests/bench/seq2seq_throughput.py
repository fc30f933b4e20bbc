"""T5's span corruption and BART's denoising: `llmtrain train`'s engine against transformers' Trainer.

    python -m tests.bench.seq2seq_throughput CORPUS [--threads 2] [--rounds 3] [key=value …]

4 layers a side, 512 wide, the corpus' vocabulary, 8 texts of up to 128 tokens for the encoder, no dropout
(model.dropout=0.1 turns it on for both); the same weights, sources and targets. See against_trainer.py.
"""

from __future__ import annotations

from typing import Any

from tests.bench.against_trainer import Contest, main


def _to_theirs(batch: dict[str, Any]) -> dict[str, Any]:
    theirs = {
        "input_ids": batch["sources"],
        "decoder_input_ids": batch["tokens"],
        "labels": batch["labels"],
    }
    if "source_documents" in batch:
        theirs["attention_mask"] = (batch["source_documents"] >= 0).long()
    return theirs


_SIZE = (
    "model.num_layers=4",
    "model.dropout=0.0",
    "model.vocab_size=null",
    "data.workers=0",
    "batch.global_size=8",
    "batch.micro_size=8",
    "batch.sequence_length=128",
)
CONTESTS = {
    "t5": Contest(
        ("model=t5_small", "objective=span_corruption", *_SIZE), "T5ForConditionalGeneration", _to_theirs
    ),
    "bart": Contest(
        (
            "model=bart_base",
            "objective=denoising",
            "model.hidden_size=512",
            "model.num_heads=8",
            "model.mlp_hidden_size=2048",
            *_SIZE,
        ),
        "BartForConditionalGeneration",
        _to_theirs,
    ),
}

if __name__ == "__main__":
    main(CONTESTS, "tests.bench.seq2seq_throughput", __doc__ or "")
