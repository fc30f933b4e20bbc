"""Which places are predicted and in which order, by the numbers; the same whoever collates them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmtrain.labels import IGNORE_INDEX
from llmtrain.models.xlnet.config import XLNetConfig
from llmtrain.models.xlnet.model import XLNet
from llmtrain.nn.initialize import initialize
from llmtrain.objectives.permuted_lm import PermutedLM, PermutedLMConfig

V = 100
CONFIG = XLNetConfig(vocab_size=V, hidden_size=16, num_layers=1, num_heads=2, has_segments=False, dropout=0.0)


def plain() -> PermutedLM:
    return PermutedLM(PermutedLMConfig(), has_segments=False)


def rows(B: int = 400, T: int = 64, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        "tokens": generator.integers(4, V, (B, T + 1)),
        "documents": np.zeros((B, T + 1), dtype=np.int32),
        "keys": generator.integers(0, 2**63, B),
    }


@pytest.mark.parametrize(("K", "longest", "T"), [(6, 5, 64), (6, 5, 7), (3, 1, 33), (2, 4, 30)])
def test_places_are_spans_in_contexts_of_k_tokens_each(K: int, longest: int, T: int) -> None:
    config = PermutedLMConfig(predict_every=K, max_span=longest)
    raw = rows(T=T)
    targets = PermutedLM(config).collate(raw)["targets"].numpy()
    assert targets.shape == (400, T // K)
    assert targets.min() >= 0
    assert targets.max() < T
    assert (np.diff(targets, axis=1) > 0).all(), "each place once"
    # Every place is as likely, and no long stretch is left out.
    shares_T = np.bincount(targets.ravel(), minlength=T) / 400
    assert shares_T == pytest.approx(np.full(T, (T // K) / T), abs=0.1)
    assert np.diff(targets, axis=1).max(initial=0) < 2 * K * longest
    runs = np.split(targets[0], np.flatnonzero(np.diff(targets[0]) > 1) + 1)
    if longest == 1:
        assert max(len(run) for run in runs) <= 2, "a place, or two of neighbouring contexts"


def test_lengths_of_spans_are_uniform() -> None:
    """A span's neighbours seldom touch it in long rows with a large K."""
    config = PermutedLMConfig(predict_every=40, max_span=3)
    targets = PermutedLM(config).collate(rows(T=40 * 60))["targets"].numpy()
    lengths = [len(run) for row in targets for run in np.split(row, np.flatnonzero(np.diff(row) > 1) + 1)]
    shares = np.bincount(lengths, minlength=4)[1:4] / len(lengths)
    assert shares == pytest.approx([1 / 3] * 3, abs=0.03)


def test_labels_are_the_tokens_and_the_order_is_a_random_one() -> None:
    raw = rows()
    batch = {name: tensor.numpy() for name, tensor in plain().collate(raw).items()}
    assert set(batch) == {"tokens", "order", "targets", "labels"}
    tokens, targets, order = batch["tokens"], batch["targets"], batch["order"]
    assert (tokens == raw["tokens"][:, :-1]).all()
    assert (batch["labels"] == np.take_along_axis(tokens, targets, axis=1)).all()
    of_targets = np.take_along_axis(order, targets, axis=1)
    assert (np.sort(of_targets, axis=1) == np.arange(1, 11)).all()
    assert ((order > 0).sum(1) == 10).all()
    # Any place is as likely to be the first.
    firsts = np.bincount(of_targets.argmin(1), minlength=10)
    assert firsts.min() > 20
    assert np.corrcoef(of_targets[:, 0], of_targets[:, 1])[0, 1] == pytest.approx(-1 / 9, abs=0.12)


def test_choices_follow_the_samples_key_alone() -> None:
    raw = rows()
    whole = plain().collate(raw)
    order = np.random.default_rng(3).permutation(len(raw["keys"]))[:7]
    some = plain().collate({key: value[order] for key, value in raw.items()})
    for name, tensor in some.items():
        assert torch.equal(tensor, whole[name][order])
    again = plain().collate({**raw, "keys": raw["keys"] + 1})
    both = (whole["order"] > 0) & (again["order"] > 0)
    assert both.float().mean() == pytest.approx((10 / 64) ** 2, abs=0.005)


def test_ends_padding_and_contexts_are_not_predicted() -> None:
    raw = rows(2000)
    raw["documents"][:, 20:] = 1
    raw["documents"][:, 50:] = -1
    contexts = np.zeros_like(raw["documents"], dtype=bool)
    contexts[:, 20:25] = True
    batch = plain().collate({**raw, "contexts": contexts})
    ordered_T = (batch["order"] > 0).any(0).numpy()
    expected_T = np.ones(64, dtype=bool)
    expected_T[[19, 49]] = False
    expected_T[20:25] = expected_T[50:] = False
    assert (ordered_T == expected_T).all()
    is_asked = batch["labels"] != IGNORE_INDEX
    assert torch.equal(is_asked, batch["order"].gather(1, batch["targets"]) > 0)
    assert torch.equal(batch["documents"], torch.from_numpy(raw["documents"][:, :-1]))
    open_rows = PermutedLM(PermutedLMConfig(), document_mask=False, has_segments=False).collate(raw)
    assert open_rows["documents"].unique().tolist() == [-1, 0]


@pytest.mark.parametrize("has_segments", [False, True])
def test_empty_samples_add_nothing_and_evaluation_agrees(has_segments: bool) -> None:
    config = XLNetConfig(vocab_size=V, hidden_size=16, num_layers=1, num_heads=2, has_segments=has_segments)
    raw = rows(5, 32)
    empty = {key: value.copy() for key, value in raw.items()}
    empty["documents"][2:] = -1
    learned = PermutedLM(PermutedLMConfig(), has_segments=has_segments)
    model = XLNet(config).eval()
    initialize(model, seed=1)
    filled, alone = learned.collate(empty), learned.collate({key: value[:2] for key, value in raw.items()})
    with torch.no_grad():
        expected = learned.evaluate(model, alone)
        for found in (learned(model, filled), learned.evaluate(model, filled)):
            assert found.num_targets == expected.num_targets == learned.target_count(filled) == 10
            torch.testing.assert_close(found.loss_sum, expected.loss_sum)
        accuracy = learned.evaluate(model, filled).metrics["permuted_accuracy"]
    torch.testing.assert_close(accuracy, expected.metrics["permuted_accuracy"])
    learned(model, filled).loss_sum.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
