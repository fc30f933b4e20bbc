"""Beam search against all texts there are."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from llmtrain.errors import ConfigError
from llmtrain.generation.config import GenerateConfig
from llmtrain.generation.generate import generate
from llmtrain.models.encoder_decoder.config import Seq2SeqConfig
from llmtrain.models.encoder_decoder.model import EncoderDecoder
from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.gpt.model import GPT
from llmtrain.models.recurrent.config import LSTMConfig
from llmtrain.models.recurrent.model import RecurrentModel
from llmtrain.nn.initialize import initialize

V, LENGTH, EOS, START = 5, 3, 4, 0
PROMPTS = [[1, 2, 3], [2, 1], [3, 0, 1], [1]]
ALL = GenerateConfig(max_new_tokens=LENGTH, num_beams=V**LENGTH, batch_size=3)


def gpt() -> GPT:
    return GPT(GPTConfig(vocab_size=V, hidden_size=16, num_layers=2, num_heads=2, init_std=0.5))


def lstm() -> RecurrentModel:
    return RecurrentModel(LSTMConfig(vocab_size=V, hidden_size=16, num_layers=2))


def seq2seq() -> EncoderDecoder:
    config = Seq2SeqConfig(
        vocab_size=V, start_id=START, hidden_size=16, num_layers=2, num_heads=2, init_std=0.6, dropout=0.0
    )
    return EncoderDecoder(config)


def best_of_all(model: Any, prompt: list[int], penalty: float) -> tuple[int, ...]:
    """By the whole forward of every text that ends, or is as long as allowed."""
    scores = {}
    for length in range(1, LENGTH + 1):
        for text in itertools.product(range(V), repeat=length):
            if EOS in text[:-1] or (length < LENGTH and text[-1] != EOS):
                continue
            if isinstance(model, EncoderDecoder):
                log_probs = model(torch.tensor([[START, *text[:-1]]]), sources_BS=torch.tensor([prompt]))[0]
            else:
                log_probs = model(torch.tensor([[*prompt, *text[:-1]]]))[0, len(prompt) - 1 :]
            chosen = log_probs.log_softmax(-1)[torch.arange(length), torch.tensor(text)]
            scores[text] = float(chosen.sum()) / length**penalty
    return max(scores, key=lambda text: scores[text])


@pytest.mark.parametrize("build", [gpt, lstm, seq2seq])
@pytest.mark.parametrize("penalty", [0.0, 1.0, -2.0])
def test_as_many_beams_as_texts_find_the_best(build: Any, penalty: float) -> None:
    model = build().eval()
    initialize(model, seed=3)
    found = generate(model, PROMPTS, replace(ALL, length_penalty=penalty), eos_ids=[EOS])
    with torch.no_grad():
        expected = [best_of_all(model, prompt, penalty) for prompt in PROMPTS]
    assert found == [[token for token in text if token != EOS] for text in expected]


def test_penalties_and_least_lengths_tell() -> None:
    model = gpt().eval()
    initialize(model, seed=3)
    short = generate(model, PROMPTS, replace(ALL, length_penalty=-3.0), eos_ids=[EOS])
    long = generate(model, PROMPTS, replace(ALL, length_penalty=3.0), eos_ids=[EOS])
    assert sum(map(len, short)) < sum(map(len, long))
    forced = generate(model, PROMPTS, replace(ALL, length_penalty=-3.0, min_new_tokens=2), eos_ids=[EOS])
    assert min(map(len, forced)) >= 2
    greedy = GenerateConfig(max_new_tokens=9, min_new_tokens=9, temperature=0.0)
    assert {len(text) for text in generate(model, PROMPTS, greedy, eos_ids=[EOS])} == {9}


@pytest.mark.parametrize("build", [gpt, seq2seq])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_prompt_does_not_depend_on_the_others(build: Any, num_beams: int) -> None:
    model = build().eval()
    initialize(model, seed=5)
    config = GenerateConfig(max_new_tokens=12, temperature=0.0, num_beams=num_beams)
    done: list[int] = []
    together = generate(model, PROMPTS, config, eos_ids=[EOS], on_done=done.append)
    assert together == generate(model, PROMPTS, replace(config, batch_size=1), eos_ids=[EOS])
    assert sorted(done) == list(range(len(PROMPTS)))
    assert len(set(map(len, together))) > 1, "some end before others"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.7}, "temperature: got 0.7; allowed: 0 with num_beams=2; beams are not sampled"),
        ({"top_p": 0.5}, "top_p: got 0.5; allowed: null with num_beams=2"),
        ({"min_new_tokens": 4}, "min_new_tokens: got 4; allowed: 0 up to max_new_tokens=3"),
        ({"num_beams": 0}, "num_beams: got 0"),
        (
            {"num_beams": 1, "early_stopping": True},
            "early_stopping: got True; allowed: false with num_beams=1",
        ),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        generate(gpt(), [[1]], replace(GenerateConfig(max_new_tokens=3, num_beams=2), **changes))
    assert len(caught.value.problems) == 1
