"""What is put for [MASK], and how prompts become rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmtrain.commands.fill import encode_prompt
from llmtrain.errors import CheckpointError
from llmtrain.generation.fill import BLANK, fill_masks
from llmtrain.models.bert.config import BertConfig, MaskedLMConfig
from llmtrain.models.bert.model import Bert
from llmtrain.models.xlnet.config import XLNetConfig
from llmtrain.models.xlnet.model import XLNet
from llmtrain.nn.initialize import initialize
from llmtrain.tokenizers.folder import load_tokenizer

V, MASK = 30, 30


@pytest.fixture
def model() -> Bert:
    config = BertConfig(
        vocab_size=V + 3, hidden_size=16, num_layers=2, num_heads=2, max_sequence_length=16, init_std=0.4
    )
    model = Bert(config)
    initialize(model, seed=2)
    return model.eval()


def test_candidates_are_the_models_likeliest(model: Bert) -> None:
    tokens = [5, MASK, 7, 8, MASK, 9]
    found = fill_masks(model, tokens, MASK, 4, V)
    with torch.no_grad():
        probs = model(torch.tensor([tokens]))[0].softmax(-1)
    assert len(found) == 2
    for place, candidates in zip((1, 4), found, strict=True):
        ids, shown = [token for token, _ in candidates], [p for _, p in candidates]
        assert ids == probs[place, :V].argsort(descending=True)[:4].tolist()
        assert shown == pytest.approx(probs[place, ids].tolist(), rel=1e-4)
    assert fill_masks(model, [1, 2], MASK, 4, V) == []
    assert len(fill_masks(model, tokens, MASK, 1000, V)[0]) == V


def test_blanks_are_what_the_query_stream_predicts() -> None:
    model = XLNet(XLNetConfig(vocab_size=V, hidden_size=16, num_layers=2, num_heads=2, init_std=0.4)).eval()
    initialize(model, seed=2)
    found = fill_masks(model, [5, BLANK, 7, 8, BLANK, 9], BLANK, 4, V)
    with torch.no_grad():
        # Whatever stands there, no place sees it.
        probs = model(torch.tensor([[5, 11, 7, 8, 12, 9]]), targets_BM=torch.tensor([[1, 4]]))[0].softmax(-1)
    for candidates, probs_V in zip(found, probs, strict=True):
        assert [token for token, _ in candidates] == probs_V.argsort(descending=True)[:4].tolist()
        assert [p for _, p in candidates] == pytest.approx(probs_V.topk(4).values.tolist(), rel=1e-4)


def test_a_diverged_model_is_named(model: Bert) -> None:
    with torch.no_grad():
        model.transform.weight.fill_(torch.nan)
    with pytest.raises(CheckpointError, match="logits that are not finite"):
        fill_masks(model, [MASK], MASK, 1, V)


def test_prompts_become_rows_as_in_training(corpus: Path) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer.model")
    n = tokenizer.vocab_size
    ids = {"vocab_size": n + 3, "mask_id": n, "cls_id": n + 1, "sep_id": n + 2}
    config = BertConfig(**ids, objective=MaskedLMConfig(pairs="next_sentence"))  # type: ignore[arg-type]
    row = encode_prompt("the film was a [MASK] story[MASK].", tokenizer, config)
    assert (row[0], row[-1], row.count(n)) == (n + 1, n + 2, 2)
    first, second = (place for place, token in enumerate(row) if token == n)
    assert tokenizer.decode(row[1:first]) == "the film was a"
    assert tokenizer.decode(row[first + 1 : second]) == " story"
    assert tokenizer.decode(row[second + 1 : -1]) == "."
    plain = encode_prompt("the [MASK]", tokenizer, BertConfig(**ids))  # type: ignore[arg-type]
    assert plain == [*tokenizer.encode("the"), n, tokenizer.eos_id]
