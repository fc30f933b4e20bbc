"""Packed documents train the model that each of them trains alone.

Every row of a corpus' split, read, collated and run as in training, against each document by itself, cut
where a row cannot hold it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.corpus.corpus import Corpus
from llmtrain.corpus.token_split import TokenSplit
from llmtrain.data.datasets.base import TokenSequences
from llmtrain.labels import IGNORE_INDEX
from llmtrain.models.gpt.model import GPT
from llmtrain.nn import attention_choice
from llmtrain.nn.initialize import initialize
from llmtrain.objectives.causal_lm import CausalLM
from tests.support.corpora import EOS, random_documents, write_corpus
from tests.support.presets import preset as preset_of
from tests.support.training import REPOSITORY

T = 96
DOCUMENTS = random_documents(25, seed=1, longest=150)
SHARD = 15
"""Documents of a shard."""
PACKINGS: dict[str, dict[str, Any]] = {
    "concat": {"packing": "concat"},
    "best_fit": {"packing": "best_fit"},
    "best_fit with overlap": {"packing": "best_fit", "overlap": 24},
}

pytestmark = [
    pytest.mark.parametrize("packing", PACKINGS),
    pytest.mark.parametrize("form", ["gpt_tiny", "llama_tiny"]),
]


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_choice, "BLOCK", 32)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> TokenSplit:
    folder = tmp_path_factory.mktemp("corpora") / "corpus"
    corpus = write_corpus(folder, {"train": DOCUMENTS}, samples_per_tar=SHARD // 5, documents_per_sample=5)
    return Corpus.open(corpus).split("train")


def build(form: str) -> GPT:
    """The preset's form, small, with weights so large that what a token sees shows in its loss."""
    preset = preset_of(REPOSITORY / f"conf/model/{form}.yaml")
    model = GPT(
        replace(preset, vocab_size=100, hidden_size=64, num_layers=2, mlp_hidden_size=96, init_std=0.2)
    )
    initialize(model, seed=0)
    return model


def pieces_alone(packing: str) -> Iterator[tuple[int, Tensor, int]]:
    """(document, tokens, how many of them are no targets) of each piece of each document."""
    overlap = PACKINGS[packing].get("overlap", 0)
    start = 0
    for number, document in enumerate(DOCUMENTS):
        start = 0 if number % SHARD == 0 else start
        tokens = torch.tensor([*document, EOS])
        first, context = 0, 1
        while first + context < len(tokens):
            length = T - (start + first) % T if packing == "concat" else T
            piece = tokens[first : first + length + 1]
            yield number, piece, context
            context = 1 + overlap
            first += len(piece) - context
        start += len(tokens)


def loss_alone(model: GPT, tokens: Tensor, context: int) -> Tensor:
    """Summed over the targets of one piece."""
    logits_TV = model(tokens[None, :-1])[0]
    return F.cross_entropy(logits_TV[context - 1 :], tokens[context:], reduction="sum")


def losses_packed(model: GPT, dataset: TokenSequences, objective: CausalLM) -> Tensor:
    """Summed over the targets of each document, (documents,), from the logits of all rows in one batch."""
    batch = objective.collate(dataset.get(np.arange(len(dataset))))
    arguments = objective.arguments(batch)
    labels_MT = arguments.pop("labels_BT")
    logits_MTV = model(**arguments)
    losses = F.cross_entropy(
        logits_MTV.transpose(1, 2), labels_MT, reduction="none", ignore_index=IGNORE_INDEX
    )
    document_MT = torch.zeros_like(labels_MT)
    for row in range(len(dataset)):
        held = [
            (SHARD * dataset.tar_names.index(shard) + document, length)
            for shard, document, length in dataset.where(row)
        ]
        inside = np.repeat(*np.array(held).T)[:T]
        document_MT[row, : len(inside)] = torch.from_numpy(inside)
    return torch.zeros(len(DOCUMENTS)).index_add(0, document_MT.flatten(), losses.flatten())


def test_each_document_loses_what_it_loses_alone(split: TokenSplit, form: str, packing: str) -> None:
    model, dataset = build(form), TokenSequences(split, T, **PACKINGS[packing])
    targets, alone = torch.zeros(len(DOCUMENTS)), torch.zeros(len(DOCUMENTS))
    with torch.no_grad():
        for document, tokens, context in pieces_alone(packing):
            alone[document] += loss_alone(model, tokens, context)
            targets[document] += len(tokens) - context
        packed = losses_packed(model, dataset, CausalLM())
        unmasked = losses_packed(model, dataset, CausalLM(document_mask=False))
    assert targets.tolist() == [len(document) for document in DOCUMENTS]
    torch.testing.assert_close(packed / targets, alone / targets, rtol=1e-5, atol=1e-5)
    # A row's first document sees no other, whatever is masked.
    assert ((unmasked - alone).abs() / targets > 0.01).sum() >= 5


def test_gradients_are_the_sum_of_the_documents_own(split: TokenSplit, form: str, packing: str) -> None:
    model, dataset = build(form), TokenSequences(split, T, **PACKINGS[packing])
    objective = CausalLM()
    batch = objective.collate(dataset.get(np.arange(len(dataset))))
    weights = list(model.parameters())
    packed = torch.autograd.grad(objective(model, batch).loss_sum, weights)
    alone = [torch.zeros_like(weight, dtype=torch.float64) for weight in weights]
    for _, tokens, context in pieces_alone(packing):
        own = torch.autograd.grad(loss_alone(model, tokens, context), weights)
        for total, gradient in zip(alone, own, strict=True):
            total += gradient
    for (name, _), found, expected in zip(model.named_parameters(), packed, alone, strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm(), name
