"""Scores and texts do not depend on what else is in a batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from llmtrain.adapt.config import PromptConfig
from llmtrain.errors import CheckpointError
from llmtrain.generation.config import GenerateConfig
from llmtrain.generation.generate import generate
from llmtrain.harness import continuing, scoring
from llmtrain.harness.codec import Codec
from llmtrain.harness.continuing import Ends, continue_texts
from llmtrain.harness.scoring import Row, score_rows
from llmtrain.interchange.trained import build_module
from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.gpt.model import GPT
from llmtrain.models.recurrent.config import LSTMConfig
from llmtrain.models.recurrent.model import RecurrentModel
from llmtrain.nn.initialize import initialize
from llmtrain.tokenizers.folder import load_tokenizer

V = 320


def gpt() -> GPT:
    model = GPT(GPTConfig(vocab_size=V, hidden_size=32, num_layers=2, num_heads=4, max_sequence_length=64))
    initialize(model, seed=0)
    return model.eval()


def lstm() -> RecurrentModel:
    model = RecurrentModel(LSTMConfig(vocab_size=V, hidden_size=32, num_layers=2))
    initialize(model, seed=0)
    return model.eval()


def prompted() -> nn.Module:
    """A GPT whose rows begin with virtual tokens."""
    model = build_module(replace(gpt().config, adaptation=PromptConfig(length=3)), torch.device("cpu"))
    initialize(model, seed=0)
    return model.eval()


def tokens(length: int, seed: int = 0) -> list[int]:
    found: list[int] = np.random.default_rng([length, seed]).integers(4, V, length).tolist()
    return found


@pytest.mark.parametrize("build", [gpt, lstm, prompted])
def test_scores_are_sums_of_log_probabilities(build: Any):
    model = build()
    rows = [Row(tokens(9), [[7, 8, 9], [5], [6]]), Row(tokens(4), [[11]]), Row(tokens(20), [tokens(20, 1)])]
    for row, scores in zip(rows, score_rows(model, rows), strict=True):
        with torch.no_grad():
            log_probs_TV = model(torch.tensor([row.inputs]))[0].log_softmax(-1)
        for answer, score in zip(row.answers, scores, strict=True):
            of_answer = log_probs_TV[-len(answer) :]
            expected = of_answer[torch.arange(len(answer)), torch.tensor(answer)].sum()
            assert score.log_prob == pytest.approx(float(expected), abs=1e-5)
            assert score.is_greedy == (of_answer.argmax(-1).tolist() == answer)
    greedy = int(model(torch.tensor([rows[0].inputs]))[0, -1].argmax())
    assert score_rows(model, [Row(rows[0].inputs, [[greedy]])])[0][0].is_greedy


def test_logits_in_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch):
    model, rows = gpt(), [Row(tokens(12), [tokens(9, 2)]), Row(tokens(8), [[5], [6, 7]])]
    whole = score_rows(model, rows)
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 4 * V)
    assert score_rows(model, rows) == whole


def test_a_diverged_model_is_named():
    model = gpt()
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    with pytest.raises(CheckpointError, match="model: got logits that are not finite"):
        score_rows(model, [Row([1, 2], [[3]])])


def test_batches_hold_so_many_tokens():
    lengths = [3, 10, 4, 9, 2, 25, 1]
    batches = scoring.batches_of([Row(tokens(length), [[1]]) for length in lengths], 20)
    assert sorted(i for batch in batches for i in batch.numbers) == list(range(len(lengths)))
    assert [[lengths[i] for i in batch.numbers] for batch in batches] == [[25], [10, 9], [4, 3, 2, 1]]
    assert {batch.shared for batch in batches} == {0}


@pytest.mark.parametrize("build", [gpt, lstm, prompted])
def test_a_context_is_read_once_for_all_its_continuations(build: Any):
    model, context, other = build(), tokens(30), tokens(30, 9)
    answers = [[5], [6, 7], [8, 9, 10, 11]]
    rows = [Row([*context, *answer[:-1]], [answer], 29) for answer in answers]
    rows += [Row(other, [[5]], 29), Row(tokens(3), [[5], [6]], 2)]
    batches = scoring.batches_of(rows, 64)
    assert [(batch.numbers, batch.shared) for batch in batches] == [([0, 1, 2], 29), ([3, 4], 0)]
    shared = score_rows(model, rows[:3], 29)
    for ours, theirs in zip(shared, score_rows(model, rows[:3]), strict=True):
        assert ours[0].log_prob == pytest.approx(theirs[0].log_prob, abs=1e-5)
        assert ours[0].is_greedy == theirs[0].is_greedy
    assert [len(batch.numbers) for batch in scoring.batches_of(rows[:3], 20)] == [2, 1]


@pytest.fixture(scope="module")
def codec(corpus: Path) -> Codec:
    return Codec(load_tokenizer(corpus))


@pytest.mark.parametrize("build", [gpt, lstm])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_of_different_lengths_are_written_together(build: Any, temperature: float, codec: Codec):
    """As each alone; random draws follow from the number of a prompt."""
    model = build()
    prompts = [tokens(length) for length in (3, 9, 5, 9)]
    settings = GenerateConfig(max_new_tokens=12, temperature=temperature, seed=1, repetition_penalty=1.2)
    ends = Ends(frozenset({codec.eos_id}), ())
    settings = settings.resolved(has_sources=False)
    together = continue_texts(model, prompts, [0, 1, 2, 3], settings, ends, codec)
    alone = generate(model, prompts, settings, eos_ids=[codec.eos_id])
    assert together == [codec.decode(text) for text in alone]
    assert len(set(together)) > 1


def test_a_text_ends_where_it_says_so(codec: Codec):
    model, prompts = gpt(), [tokens(3), tokens(5)]
    settings = GenerateConfig(max_new_tokens=20, temperature=0.0).resolved(has_sources=False)
    whole = continue_texts(model, prompts, [0, 1], settings, Ends(frozenset(), ()), codec)
    end = whole[0][len(whole[0]) // 2]
    cut = continue_texts(model, prompts, [0, 1], settings, Ends(frozenset(), (end,)), codec)
    assert cut == [text.split(end)[0] for text in whole]
    assert cut[0] != whole[0]


def test_the_spelling_of_a_special_token_ends_a_text_by_its_id(codec: Codec):
    ends = Ends.of(["</s>", "\n", ""], [codec.eos_id], codec)
    assert ends.ids == {codec.eos_id}
    assert ends.texts == ("</s>", "\n")
    assert ends.cut("one\ntwo") == "one"


def test_batches_of_texts_are_of_like_length():
    lengths = [100, 3, 97, 50, 5, 99]
    batches = continuing.batches_of(lengths, 10, 2)
    assert [[lengths[i] for i in batch] for batch in batches] == [[100, 99], [97], [50], [5, 3]]
