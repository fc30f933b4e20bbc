"""What BERT sees of a row, and how its losses add up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.labels import IGNORE_INDEX
from llmtrain.models.bert.config import BertConfig
from llmtrain.models.bert.model import Bert
from llmtrain.nn.initialize import initialize, match_initializers

B, T, V = 3, 12, 40
CONFIG = BertConfig(
    vocab_size=V,
    max_sequence_length=T,
    hidden_size=24,
    num_layers=2,
    num_heads=3,
    dropout=0.0,
    init_std=0.3,
    pair_head=True,
)
FORMS = {
    "bert": CONFIG,
    "roberta": replace(CONFIG, pair_head=False, num_segments=0, position_offset=2),
    "untied": replace(CONFIG, tie_embeddings=False),
}


def make(config: BertConfig = CONFIG) -> Bert:
    model = Bert(config)
    initialize(model, seed=5)
    return model.eval()


@pytest.fixture(name="tokens_BT")
def random_tokens() -> Tensor:
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", FORMS)
def test_counts_names_and_initializers_agree(form: str) -> None:
    config = FORMS[form]
    model = make(config)
    names = [name for name, _ in model.named_parameters()]
    match_initializers(model.initializers(), names)
    assert sum(p.numel() for p in model.parameters()) == config.parameter_count()
    held = [
        sum(p.numel() for m in stage.modules.values() for p in m.parameters()) for stage in model.stages()
    ]
    assert held == config.step_parameter_counts()
    staged = {
        f"{n}.{p}"
        for stage in model.stages()
        for n, m in stage.modules.items()
        for p, _ in m.named_parameters()
    }
    assert set(names) <= staged
    assert max(p.numel() for p in model.parameters()) == config.largest_parameter_count()


@torch.no_grad()
def test_a_token_sees_all_of_its_document_and_nothing_else(tokens_BT: Tensor) -> None:
    model = make()
    documents_BT = torch.tensor([0] * 5 + [1] * 4 + [-1] * 3).expand(B, T)
    before = model(tokens_BT, documents_BT=documents_BT)
    for place in (0, 4, 6, 11):
        changed = tokens_BT.clone()
        changed[:, place] = (changed[:, place] + 1) % V
        differs_T = (model(changed, documents_BT=documents_BT) != before).any(-1).any(0)
        assert torch.equal(differs_T, documents_BT[0] == documents_BT[0, place])


@torch.no_grad()
def test_padding_changes_nothing(tokens_BT: Tensor) -> None:
    model = make()
    documents_BT = torch.where(torch.arange(T) < 7, 0, -1).expand(B, T)
    padded = model(tokens_BT, documents_BT=documents_BT)[:, :7]
    torch.testing.assert_close(padded, model(tokens_BT[:, :7]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_segments_and_position_offset_are_seen(tokens_BT: Tensor) -> None:
    model = make()
    segments_BT = torch.ones_like(tokens_BT)
    assert not torch.allclose(model(tokens_BT), model(tokens_BT, segments_BT=segments_BT))
    roberta = make(FORMS["roberta"])
    expected = roberta(tokens_BT)
    roberta.positions.weight[:2] = 7.0  # rows that no position has
    assert torch.equal(roberta(tokens_BT), expected)


@torch.no_grad()
def test_the_loss_is_of_asked_tokens_and_their_rows_pairs(tokens_BT: Tensor) -> None:
    model = make()
    labels_BT = torch.full((B, T), IGNORE_INDEX)
    labels_BT[0, [2, 5, 7]], labels_BT[2, 4] = torch.tensor([3, 9, 11]), 8
    asked = {"labels_BT": labels_BT, "pair_labels_B": torch.tensor([1, 0, IGNORE_INDEX])}
    logits = model(tokens_BT)
    token_loss = F.cross_entropy(logits.flatten(0, 1), labels_BT.flatten(), reduction="sum")
    sums = model(tokens_BT, **asked, with_metrics=True)
    loss, alone, correct, num_pairs = (sums[n] for n in ("loss", "token_loss", "correct", "pairs"))
    pair_loss, pair_correct = sums["pair_loss"], sums["pair_correct"]
    torch.testing.assert_close(model(tokens_BT, **asked), loss)
    torch.testing.assert_close(alone, token_loss)
    assert correct == (logits.argmax(-1) == labels_BT).sum()
    assert num_pairs == 2
    # One row's pair at a time: row 0 has three asked tokens, row 1 none, row 2 no pair.
    pairs = [
        model(tokens_BT, labels_BT=labels_BT, pair_labels_B=torch.tensor([label, -100, -100]))
        for label in (0, 1)
    ]
    first = (pairs[1] - token_loss) / 3
    torch.testing.assert_close(loss, token_loss + 3 * first)
    other = (pairs[0] - token_loss) / 3
    # Two classes: their probabilities are all there is.
    torch.testing.assert_close((-first).exp() + (-other).exp(), torch.tensor(1.0))
    assert pair_loss > first
    assert pair_correct >= (first < other)


def test_nothing_asked_is_a_loss_of_zero_with_gradients(tokens_BT: Tensor) -> None:
    model = make()
    loss = model(
        tokens_BT,
        labels_BT=torch.full((B, T), IGNORE_INDEX),
        pair_labels_B=torch.full((B,), IGNORE_INDEX),
    )
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
