"""Losses of BERT and RoBERTa, and their gradients, against transformers' own with the same weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.interchange.huggingface import export_folder
from llmtrain.labels import IGNORE_INDEX
from llmtrain.models.bert.config import BertConfig
from llmtrain.models.bert.model import Bert
from llmtrain.nn.initialize import initialize

pytestmark = pytest.mark.slow

V, T = 211, 24
BERT = BertConfig(
    vocab_size=V,
    hidden_size=48,
    num_layers=3,
    num_heads=4,
    mlp_hidden_size=80,
    max_sequence_length=T,
    dropout=0.0,
    init_std=0.2,
    pair_head=True,
)
ROBERTA = replace(BERT, position_offset=2, num_segments=0, norm_eps=1e-5, pair_head=False)


def make(config: BertConfig) -> Bert:
    """Weights that differ everywhere, biases and norms too."""
    model = Bert(config)
    initialize(model, seed=3)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def in_transformers(model: Bert, folder: Path) -> Any:
    """The same model by way of a folder."""
    import transformers

    export_folder(model.config, dict(model.named_parameters()), None, folder)
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Rows with 24, 17 and 5 tokens."""
    torch.manual_seed(1)
    lengths_B = torch.tensor([T, 17, 5])
    places_T = torch.arange(T)
    is_token_BT = places_T < lengths_B[:, None]
    tokens_BT = torch.randint(4, V, (3, T)).where(is_token_BT, torch.tensor(1))
    asked_BT = is_token_BT & (torch.rand(3, T) < 0.3)
    return {
        "tokens": tokens_BT,
        "is_token": is_token_BT,
        "segments": (places_T >= lengths_B[:, None] // 2).long() * is_token_BT,
        "labels": torch.where(asked_BT, torch.randint(0, V, (3, T)), IGNORE_INDEX),
        "pair_labels": torch.tensor([0, 1, 1]),
    }


def test_bert_for_pre_training(batch: dict[str, Tensor], tmp_path: Path) -> None:
    model = make(BERT)
    theirs = in_transformers(model, tmp_path / "out")
    assert type(theirs).__name__ == "BertForPreTraining"
    documents_BT = batch["is_token"].int() - 1
    for row in range(3):  # one by one, since our loss weighs a row's pair by its tokens
        ours = {key: value[row : row + 1] for key, value in batch.items()}
        expected = theirs(
            input_ids=ours["tokens"],
            attention_mask=ours["is_token"].long(),
            token_type_ids=ours["segments"],
            labels=ours["labels"],
            next_sentence_label=ours["pair_labels"],
        )
        given = {"documents_BT": documents_BT[row : row + 1], "segments_BT": ours["segments"]}
        logits = model(ours["tokens"], **given)
        kept = ours["is_token"]
        torch.testing.assert_close(logits[kept], expected.prediction_logits[kept], atol=1e-4, rtol=1e-4)
        loss = model(ours["tokens"], labels_BT=ours["labels"], pair_labels_B=ours["pair_labels"], **given)
        asked = (ours["labels"] != IGNORE_INDEX).sum()
        torch.testing.assert_close(loss / asked, expected.loss, atol=1e-4, rtol=1e-4)
        # Gradients too, where the two name a weight alike.
        model.zero_grad()
        theirs.zero_grad()
        (loss / asked).backward()
        expected.loss.backward()
        pairs = [
            (model.embedding.weight, theirs.bert.embeddings.word_embeddings.weight),
            (model.segments.weight, theirs.bert.embeddings.token_type_embeddings.weight),
            (model.head.bias, theirs.cls.predictions.bias),
            (model.pooler.weight, theirs.bert.pooler.dense.weight),
            (model.blocks[0].mlp.up.weight, theirs.bert.encoder.layer[0].intermediate.dense.weight),
        ]
        for mine, other in pairs:
            torch.testing.assert_close(mine.grad, other.grad, atol=1e-4, rtol=1e-4)


def test_roberta_for_masked_lm(batch: dict[str, Tensor], tmp_path: Path) -> None:
    model = make(ROBERTA)
    theirs = in_transformers(model, tmp_path / "out")
    assert type(theirs).__name__ == "RobertaForMaskedLM"
    kept = batch["is_token"]
    expected = theirs(batch["tokens"], attention_mask=kept.long(), labels=batch["labels"])
    documents_BT = kept.int() - 1
    logits = model(batch["tokens"], documents_BT=documents_BT)
    torch.testing.assert_close(logits[kept], expected.logits[kept], atol=1e-4, rtol=1e-4)
    loss = model(batch["tokens"], documents_BT=documents_BT, labels_BT=batch["labels"])
    mean = loss / (batch["labels"] != IGNORE_INDEX).sum()
    torch.testing.assert_close(mean, expected.loss, atol=1e-4, rtol=1e-4)
