"""What either stream of XLNet sees of a row, and how its loss adds up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.labels import IGNORE_INDEX
from llmtrain.models.xlnet.config import XLNetConfig
from llmtrain.models.xlnet.model import XLNet
from llmtrain.nn.initialize import initialize, match_initializers

B, T, V = 2, 12, 40
CONFIG = XLNetConfig(
    vocab_size=V, hidden_size=24, num_layers=2, num_heads=3, has_segments=False, dropout=0.0, init_std=0.3
)
FORMS = {
    "plain": CONFIG,
    "segments": replace(CONFIG, has_segments=True, mlp_hidden_size=40),
    "untied": replace(CONFIG, tie_embeddings=False),
}
TARGETS = [9, 2, 5]
ORDER = [0, 0, 2, 0, 0, 3, 0, 0, 0, 1, 0, 0]
"""Place 9 is predicted first, then 2, then 5."""


def make(config: XLNetConfig = CONFIG) -> XLNet:
    model = XLNet(config)
    initialize(model, seed=5)
    return model.eval()


@pytest.fixture(name="tokens_BT")
def random_tokens() -> Tensor:
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(0))


@pytest.fixture(name="asked")
def targets_and_order() -> dict[str, Tensor]:
    return {
        "order_BT": torch.tensor(ORDER).expand(B, T),
        "targets_BM": torch.tensor(TARGETS).expand(B, len(TARGETS)),
    }


def other_token(tokens_BT: Tensor, place: int) -> Tensor:
    changed = tokens_BT.clone()
    changed[:, place] = (changed[:, place] + 1) % V
    return changed


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
    assert max(p.numel() for p in model.parameters()) == config.largest_parameter_count()


@torch.no_grad()
def test_a_prediction_sees_what_comes_before_it_in_the_order(
    tokens_BT: Tensor, asked: dict[str, Tensor]
) -> None:
    """Through two layers: what the streams hand on must not tell of later tokens, nor of the token itself."""
    model = make()
    before = model(tokens_BT, **asked)
    for place in range(T):
        differs_M = (model(other_token(tokens_BT, place), **asked) != before).any(-1).any(0)
        assert differs_M.tolist() == [ORDER[place] < ORDER[target] for target in TARGETS]


@torch.no_grad()
def test_a_token_sees_itself_and_its_order_or_less(tokens_BT: Tensor, asked: dict[str, Tensor]) -> None:
    model = make()
    order_BT = asked["order_BT"]
    before = model(tokens_BT, order_BT=order_BT)
    for place in range(T):
        differs_T = (model(other_token(tokens_BT, place), order_BT=order_BT) != before).any(-1).any(0)
        assert torch.equal(differs_T, order_BT[0] >= ORDER[place])


@torch.no_grad()
def test_without_an_order_no_prediction_sees_another(tokens_BT: Tensor, asked: dict[str, Tensor]) -> None:
    model = make()
    targets_BM = asked["targets_BM"]
    before = model(tokens_BT, targets_BM=targets_BM)
    for place in range(T):
        changed = model(other_token(tokens_BT, place), targets_BM=targets_BM)
        assert torch.equal(changed, before) == (place in TARGETS)


@torch.no_grad()
def test_documents_are_apart_and_stand_anywhere_in_a_row(tokens_BT: Tensor, asked: dict[str, Tensor]) -> None:
    """Positions are relative: a document reads the same alone."""
    model = make()
    documents_BT = torch.tensor([0] * 4 + [1] * 6 + [-1] * 2).expand(B, T)
    packed = model(tokens_BT, documents_BT=documents_BT, **asked)
    first = model(tokens_BT[:, :4], order_BT=asked["order_BT"][:, :4], targets_BM=asked["targets_BM"][:, 1:2])
    second = model(
        tokens_BT[:, 4:10], order_BT=asked["order_BT"][:, 4:10], targets_BM=asked["targets_BM"][:, ::2] - 4
    )
    torch.testing.assert_close(packed[:, 1:2], first, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed[:, ::2], second, rtol=1e-4, atol=1e-5)


def test_a_place_that_sees_nothing_learns_without_a_leak(tokens_BT: Tensor) -> None:
    """All tokens of a document are predicted, and a row is all padding: numbers stay finite."""
    model = make()
    documents_BT = torch.tensor([[0] * 9 + [1] * 3, [-1] * T])
    asked = {
        "order_BT": torch.tensor([[0] * 9 + [2, 1, 3]] * B),
        "targets_BM": torch.tensor([[9, 10, 11]] * B),
        "documents_BT": documents_BT,
    }
    labels_BM = tokens_BT.gather(1, asked["targets_BM"])
    labels_BM[1] = IGNORE_INDEX
    logits = model(tokens_BT, **asked)
    assert logits.isfinite().all()
    changed = model(other_token(tokens_BT, 10), **asked)
    assert torch.equal(changed[0, 1], logits[0, 1])
    assert not torch.equal(changed[0, 0], logits[0, 0])
    model(tokens_BT, labels_BM=labels_BM, **asked).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_segments_tell_same_from_other(tokens_BT: Tensor, asked: dict[str, Tensor]) -> None:
    model = make(FORMS["segments"])
    one_BT, two_BT = torch.zeros_like(tokens_BT), (torch.arange(T) >= 6).long().expand(B, T)
    plain = model(tokens_BT, **asked)
    torch.testing.assert_close(model(tokens_BT, segments_BT=one_BT, **asked), plain)
    told = model(tokens_BT, segments_BT=two_BT, **asked)
    assert not torch.allclose(told, plain)
    torch.testing.assert_close(model(tokens_BT, segments_BT=1 - two_BT, **asked), told)
    with pytest.raises(ValueError, match="no segments"):
        make()(tokens_BT, segments_BT=one_BT)


@torch.no_grad()
def test_the_loss_is_of_labels_that_are_asked(tokens_BT: Tensor, asked: dict[str, Tensor]) -> None:
    model = make()
    logits = model(tokens_BT, **asked)
    labels_BM = torch.tensor([[3, IGNORE_INDEX, 8], [int(logits[1, 0].argmax()), 5, 1]])
    sums = model(tokens_BT, labels_BM=labels_BM, with_metrics=True, **asked)
    loss, correct = sums["loss"], sums["correct"]
    expected = F.cross_entropy(logits.flatten(0, 1), labels_BM.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model(tokens_BT, labels_BM=labels_BM, **asked), expected)
    assert correct == (logits.argmax(-1) == labels_BM).sum() >= 1
    with pytest.raises(ValueError, match="targets_BM"):
        model(tokens_BT, labels_BM=labels_BM)


def test_dropout_is_a_function_of_the_samples_keys(tokens_BT: Tensor, asked: dict[str, Tensor]) -> None:
    model = make(replace(CONFIG, dropout=0.3)).train()
    keys_B = torch.tensor([11, 12])
    both = model(tokens_BT, dropout_keys_B=keys_B, **asked)
    alone = model(
        tokens_BT[1:], dropout_keys_B=keys_B[1:], **{name: value[1:] for name, value in asked.items()}
    )
    torch.testing.assert_close(both[1:], alone)
    assert not torch.allclose(both, model(tokens_BT, dropout_keys_B=keys_B + 1, **asked))
