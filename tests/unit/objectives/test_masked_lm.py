"""What is hidden, by the numbers; pairs by their texts; the same whoever collates them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from llmtrain.labels import IGNORE_INDEX
from llmtrain.models.bert.config import BertConfig
from llmtrain.models.bert.model import Bert
from llmtrain.nn.initialize import initialize
from llmtrain.objectives.masked_lm import MaskedLM, MaskedLMConfig

V, MASK, CLS, SEP = 100, 100, 101, 102
CONFIG = BertConfig(
    vocab_size=V + 3,
    mask_id=MASK,
    cls_id=CLS,
    sep_id=SEP,
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    max_sequence_length=64,
    dropout=0.0,
)


def objective(
    word_starts_V: np.ndarray | None = None, document_mask: bool = True, **settings: object
) -> MaskedLM:
    config = MaskedLMConfig(**settings)  # type: ignore[arg-type]
    return MaskedLM(config.fitted(CONFIG), config, word_starts_V=word_starts_V, document_mask=document_mask)


def rows(B: int = 400, T: int = 64, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        "tokens": generator.integers(4, V, (B, T + 1)),
        "documents": np.zeros((B, T + 1), dtype=np.int32),
        "keys": generator.integers(0, 2**63, B),
    }


def passages(B: int = 300, T: int = 32) -> dict[str, np.ndarray]:
    """Texts whose tokens tell where they are from: 10·row-free numbers rising from 4 in passages, the same
    from 54 in others."""
    L = T - 3
    generator = np.random.default_rng(1)
    places = np.arange(L)
    return {
        "passages": np.broadcast_to(4 + places, (B, L)).astype(np.int64),
        "passage_lengths": generator.integers(2, L + 1, B),
        "others": np.broadcast_to(54 + places, (B, L)).astype(np.int64),
        "other_lengths": generator.integers(2, L + 1, B),
        "keys": generator.integers(0, 2**63, B),
    }


def test_shares_of_hidden_masked_random_and_kept() -> None:
    raw = rows()
    batch = objective().collate(raw)
    tokens, labels = batch["tokens"].numpy(), batch["labels"].numpy()
    original = raw["tokens"][:, :-1]
    hidden = labels != IGNORE_INDEX
    assert (labels[hidden] == original[hidden]).all()
    assert (tokens[~hidden] == original[~hidden]).all()
    assert hidden.mean() == pytest.approx(0.15, abs=0.01)
    assert (tokens[hidden] == MASK).mean() == pytest.approx(0.8, abs=0.02)
    # A random token is the same one for 1 of 100.
    assert (tokens[hidden] == original[hidden]).mean() == pytest.approx(0.101, abs=0.015)
    is_random = hidden & (tokens != MASK) & (tokens != original)
    assert len(np.unique(tokens[is_random])) > 80
    assert tokens[is_random].max() < V
    # Every place of a row is as likely.
    assert hidden.mean(0).min() > 0.08
    assert hidden.mean(0).max() < 0.22


def test_choices_follow_the_samples_key_alone() -> None:
    raw = rows()
    whole = objective().collate(raw)
    order = np.random.default_rng(3).permutation(len(raw["keys"]))[:7]
    some = objective().collate({key: value[order] for key, value in raw.items()})
    for key in ("tokens", "labels"):
        assert torch.equal(some[key], whole[key][order])
    again = objective().collate({**raw, "keys": raw["keys"] + 1})
    both = (whole["labels"] != IGNORE_INDEX) & (again["labels"] != IGNORE_INDEX)
    assert both.float().mean() == pytest.approx(0.15**2, abs=0.005)


def test_ends_padding_and_contexts_are_not_hidden() -> None:
    raw = rows()
    raw["documents"][:, 20:] = 1
    raw["documents"][:, 50:] = -1
    contexts = np.zeros_like(raw["documents"], dtype=bool)
    contexts[:, 20:25] = True
    batch = objective(share=0.9).collate({**raw, "contexts": contexts})
    hidden_T = (batch["labels"] != IGNORE_INDEX).any(0).numpy()
    expected_T = np.ones(64, dtype=bool)
    expected_T[[19, 49]] = False
    expected_T[20:25] = expected_T[50:] = False
    assert (hidden_T == expected_T).all()
    assert batch["positions"][0].tolist() == [*range(20), *range(30), *range(14)]
    assert torch.equal(batch["documents"], torch.from_numpy(raw["documents"][:, :-1]))
    open_rows = objective(document_mask=False).collate(raw)
    assert open_rows["documents"].unique().tolist() == [-1, 0]


def test_whole_rows_need_no_documents() -> None:
    assert set(objective().collate(rows())) == {"tokens", "labels"}


def test_whole_words_are_hidden_together() -> None:
    starts_V = np.arange(V) % 3 == 0
    raw = rows()
    raw["documents"][:, 40:] = 1
    labels = objective(starts_V, whole_words=True).collate(raw)["labels"].numpy()
    hidden = labels != IGNORE_INDEX
    begins = starts_V[raw["tokens"][:, :-1]]
    begins[:, [0, 39, 40]] = True  # a document's end is a word by itself, and is not hidden
    inside = ~begins[:, 1:]
    assert (hidden[:, 1:] == hidden[:, :-1])[inside].all()
    assert hidden.mean() == pytest.approx(0.15, abs=0.015)


def spans(batch: dict[str, torch.Tensor], row: int) -> tuple[list[int], list[int]]:
    """Texts A and B of a row as they were; asserts the special tokens around them."""
    labels = batch["labels"][row]
    tokens = torch.where(labels != IGNORE_INDEX, labels, batch["tokens"][row]).tolist()
    first, second = (place for place, token in enumerate(tokens) if token == SEP)
    assert tokens[0] == CLS
    assert batch["segments"][row].tolist() == [0] * (first + 1) + [1] * (second - first) + [0] * (
        len(tokens) - second - 1
    )
    assert set(tokens[second + 1 :]) <= {0}
    if "documents" in batch:
        assert (batch["documents"][row] == 0).tolist() == [p <= second for p in range(len(tokens))]
    return tokens[1:first], tokens[first + 1 : second]


def test_next_sentence_pairs() -> None:
    raw = passages()
    batch = objective(pairs="next_sentence").collate(raw)
    is_other = batch["pair_labels"].numpy()
    assert is_other.mean() == pytest.approx(0.5, abs=0.1)
    for row, (n, m) in enumerate(zip(raw["passage_lengths"], raw["other_lengths"], strict=True)):
        a, b = spans(batch, row)
        assert len(a) >= max(1, n // 4)
        assert a == list(range(4, 4 + len(a)))
        if is_other[row]:
            assert b == list(range(54, 54 + m))[-len(b) :]
        else:
            assert a + b == list(range(4, 4 + n))
        # Whatever B is, it is as long.
        assert len(a) + len(b) == n
        assert len(b) >= min(m, max(1, n // 4))


def test_sentence_order_pairs() -> None:
    raw = passages()
    batch = objective(pairs="sentence_order").collate(raw)
    swapped = batch["pair_labels"].numpy()
    assert swapped.mean() == pytest.approx(0.5, abs=0.1)
    for row, n in enumerate(raw["passage_lengths"]):
        a, b = spans(batch, row)
        assert (b + a if swapped[row] else a + b) == list(range(4, 4 + n))
        assert a
        assert b


def test_special_tokens_of_pairs_are_not_hidden() -> None:
    batch = objective(pairs="next_sentence", share=0.9).collate(passages())
    hidden = batch["labels"][batch["labels"] != IGNORE_INDEX]
    assert hidden.min() >= 4
    assert hidden.max() < V


def test_a_shard_of_one_document_has_true_pairs_alone() -> None:
    raw = passages()
    raw["other_lengths"][:] = 0
    assert not objective(pairs="next_sentence").collate(raw)["pair_labels"].any()


@pytest.mark.parametrize("pairs", ["none", "next_sentence", "sentence_order"])
def test_empty_samples_add_nothing_and_evaluation_agrees(pairs: str) -> None:
    raw = rows(5, 32) if pairs == "none" else passages(5)
    empty = {key: value.copy() for key, value in raw.items()}
    if pairs == "none":
        empty["documents"][2:] = -1
    else:
        empty["passage_lengths"][2:] = empty["other_lengths"][2:] = 0
    learned = objective(pairs=pairs)
    model = Bert(replace(CONFIG, pair_head=pairs != "none")).eval()
    initialize(model, seed=1)
    filled, alone = learned.collate(empty), learned.collate({key: value[:2] for key, value in raw.items()})
    with torch.no_grad():
        expected = learned.evaluate(model, alone)
        for found in (learned(model, filled), learned.evaluate(model, filled)):
            assert found.num_targets == expected.num_targets == learned.target_count(filled) > 0
            torch.testing.assert_close(found.loss_sum, expected.loss_sum)
        metrics = learned.evaluate(model, filled).metrics
    assert metrics.keys() == expected.metrics.keys()
    for name, value in metrics.items():
        torch.testing.assert_close(value, expected.metrics[name])
    if pairs != "none":
        assert metrics["pair_accuracy"][1] == 2


def test_whole_words_need_a_table() -> None:
    with pytest.raises(ValueError, match="word_starts"):
        objective(whole_words=True)
