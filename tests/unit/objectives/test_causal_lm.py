import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.gpt.model import GPT
from llmtrain.nn.initialize import initialize
from llmtrain.objectives.causal_lm import CausalLM

V = 23
X = -100


def raw(tokens: list[list[int]], documents: list[list[int]]) -> dict[str, np.ndarray]:
    return {"tokens": np.array(tokens, dtype=np.int64), "documents": np.array(documents, dtype=np.int32)}


def test_collate_by_hand():
    batch = CausalLM().collate(
        raw(
            [[5, 6, 1, 7, 1, 8], [9, 9, 9, 1, 0, 0], [0, 0, 0, 0, 0, 0]],
            [[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, -1, -1], [-1] * 6],
        )
    )
    assert batch["tokens"].tolist() == [[5, 6, 1, 7, 1], [9, 9, 9, 1, 0], [0] * 5]
    assert batch["labels"].tolist() == [[6, 1, X, 1, X], [9, 9, 1, X, X], [X] * 5]
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0], [0, 1, 2, 3, 4]]
    assert batch["documents"].tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, -1], [-1] * 5]
    assert {key: str(value.dtype) for key, value in batch.items()} == {
        "tokens": "torch.int64",
        "labels": "torch.int64",
        "positions": "torch.int64",
        "documents": "torch.int32",
    }
    assert CausalLM().target_count(batch) == 6


def test_context_is_seen_and_no_target():
    sample = raw([[5, 6, 7, 8, 1, 9, 1, 0]], [[0, 0, 0, 0, 0, 1, 1, -1]])
    contexts = np.array([[True, True, True, False, False, True, False, False]])
    plain, batch = CausalLM().collate(sample), CausalLM().collate(sample | {"contexts": contexts})
    assert plain["labels"].tolist() == [[6, 7, 8, 1, X, 1, X]]
    assert batch["labels"].tolist() == [[X, X, 8, 1, X, 1, X]]
    assert {key: value.tolist() for key, value in (batch | {"labels": plain["labels"]}).items()} == {
        key: value.tolist() for key, value in plain.items()
    }


@pytest.mark.parametrize(
    ("document_mask", "documents"),
    [(True, [[0, 0, 0, 0]]), (True, [[0, 0, 0, 1]]), (True, [[0, 0, -1, -1]]), (False, [[0, 0, 1, 1]])],
)
def test_documents_are_given_only_where_a_mask_is_needed(document_mask: bool, documents: list[list[int]]):
    batch = CausalLM(document_mask).collate(raw([[4, 5, 6, 7]], documents))
    assert set(batch) == {"tokens", "labels"}


def test_without_the_mask_the_targets_are_the_same():
    sample = raw([[5, 6, 1, 7, 1, 8]], [[0, 0, 0, 1, 1, 2]])
    with_mask, without = CausalLM(True).collate(sample), CausalLM(False).collate(sample)
    assert with_mask["labels"].tolist() == without["labels"].tolist()


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_positions_count_from_zero_in_each_document(lengths: list[int]):
    documents = [number for number, length in enumerate(lengths) for _ in range(length)] + [len(lengths)]
    batch = CausalLM().collate(raw([[3] * len(documents)], [documents]))
    expected = [place for length in lengths for place in range(length)]
    assert batch.get("positions", torch.arange(len(expected))[None]).tolist() == [expected]


def tiny_gpt() -> GPT:
    model = GPT(
        GPTConfig(
            vocab_size=V, max_sequence_length=16, hidden_size=16, num_layers=2, num_heads=2, init_std=0.3
        )
    )
    initialize(model, seed=1)
    return model.eval()


def test_packed_documents_lose_what_they_lose_apart():
    """The whole path: packing, shifting, masks and positions, against each document alone."""
    rng = np.random.default_rng(0)
    texts = [[*rng.integers(2, V, n).tolist(), 1] for n in (3, 6, 1)]
    packed = raw([[t for text in texts for t in text]], [[i for i, text in enumerate(texts) for _ in text]])
    model, objective = tiny_gpt(), CausalLM()
    batch = objective.collate(packed)
    with torch.no_grad():
        terms = objective(model, batch)
        apart = torch.stack(
            [
                F.cross_entropy(model(torch.tensor([text[:-1]]))[0], torch.tensor(text[1:]), reduction="sum")
                for text in texts
            ]
        )
    assert terms.num_targets == objective.target_count(batch) == sum(len(text) - 1 for text in texts)
    torch.testing.assert_close(terms.loss_sum, apart.sum(), rtol=1e-5, atol=0)
    assert terms.metrics == {}


def test_padding_and_empty_rows_add_nothing():
    model, objective = tiny_gpt(), CausalLM()
    alone = objective.collate(raw([[5, 6, 7, 1]], [[0, 0, 0, 0]]))
    padded = objective.collate(raw([[5, 6, 7, 1, 0, 0], [0] * 6], [[0, 0, 0, 0, -1, -1], [-1] * 6]))
    empty = objective.collate(raw([[0] * 6], [[-1] * 6]))
    with torch.no_grad():
        expected = objective.evaluate(model, alone)
        found = objective.evaluate(model, padded)
        nothing = objective.evaluate(model, empty)
    assert (found.num_targets, nothing.num_targets) == (expected.num_targets, 0)
    torch.testing.assert_close(found.loss_sum, expected.loss_sum)
    assert float(nothing.loss_sum) == 0.0
