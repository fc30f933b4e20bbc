"""BERT's masked language modelling: our engine against BertForMaskedLM in transformers' Trainer.

    python -m tests.bench.bert_throughput CORPUS [--threads 2] [--rounds 3] [key=value …]

6 layers, 512 wide, the corpus' vocabulary, 16 sequences of 128, 15 % of the tokens asked for, no dropout
(model.dropout=0.1 turns it on for both); the same weights, rows and hidden tokens. See against_trainer.py.
"""

from __future__ import annotations

from typing import Any

from tests.bench.against_trainer import Contest, main


def _to_theirs(batch: dict[str, Any]) -> dict[str, Any]:
    return {"input_ids": batch["tokens"], "labels": batch["labels"]}


CONTESTS = {
    "bert": Contest(
        (
            "model=bert_tiny",
            "objective=mlm",
            "model.num_layers=6",
            "model.hidden_size=512",
            "model.num_heads=8",
            "model.dropout=0.0",
            "data.document_mask=false",
            "data.workers=0",
            "batch.global_size=16",
            "batch.micro_size=16",
            "batch.sequence_length=128",
        ),
        "BertForMaskedLM",
        _to_theirs,
    )
}

if __name__ == "__main__":
    main(CONTESTS, "tests.bench.bert_throughput", __doc__ or "")
