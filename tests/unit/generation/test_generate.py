"""Generation with and against the whole forward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from llmtrain.config import decode
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.generation.config import GenerateConfig
from llmtrain.generation.folder import unsupported_settings
from llmtrain.generation.generate import generate, sample
from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.gpt.model import GPT
from llmtrain.models.recurrent.config import LSTMConfig
from llmtrain.models.recurrent.model import RecurrentModel
from llmtrain.nn.initialize import initialize
from tests.support.training import compose

V, T = 64, 32
GPT2 = GPTConfig(vocab_size=V, hidden_size=32, num_layers=2, num_heads=4, max_sequence_length=T, init_std=0.3)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7], [8, 9, 10], [11], [1, 2, 3]]
SAMPLING = GenerateConfig(max_new_tokens=10, temperature=1.0, seed=7)


def gpt() -> GPT:
    model = GPT(GPT2)
    initialize(model, seed=0)
    return model


def lstm() -> RecurrentModel:
    model = RecurrentModel(LSTMConfig(vocab_size=V, hidden_size=32))
    initialize(model, seed=0)
    return model


@pytest.mark.parametrize("build", [gpt, lstm])
def test_greedy_equals_the_whole_forward(build: Any) -> None:
    model = build()
    outputs = generate(model, PROMPTS, GenerateConfig(max_new_tokens=10, temperature=0.0))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        tokens = list(prompt)
        for _ in range(10):
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        assert output == tokens[len(prompt) :]


def test_a_prompt_does_not_depend_on_the_others() -> None:
    model = gpt()
    together = generate(model, PROMPTS, SAMPLING)
    assert generate(model, PROMPTS, replace(SAMPLING, batch_size=1)) == together
    assert generate(model, PROMPTS[:2], SAMPLING) == together[:2]
    assert together[0] != together[4], "equal prompts are sampled apart"


def test_seed() -> None:
    model = gpt()
    assert generate(model, PROMPTS, SAMPLING) == generate(model, PROMPTS, SAMPLING)
    assert generate(model, PROMPTS, SAMPLING) != generate(model, PROMPTS, replace(SAMPLING, seed=8))


def test_stops_at_eos_and_streams() -> None:
    model, streamed = gpt(), []
    free = generate(model, PROMPTS, SAMPLING)
    eos = free[1][4]
    stopped = generate(model, PROMPTS, SAMPLING, eos_ids=[eos], on_token=lambda *pair: streamed.append(pair))
    for whole, short in zip(free, stopped, strict=True):
        assert short == (whole[: whole.index(eos)] if eos in whole else whole)
    for index, output in enumerate(stopped):
        assert [token for i, token in streamed if i == index] == output


def test_any_of_several_ends_a_text() -> None:
    model = gpt()
    free = generate(model, PROMPTS, SAMPLING)
    ends = [free[0][3], free[1][5], V + 7]
    stopped = generate(model, PROMPTS, SAMPLING, eos_ids=ends)
    for whole, short in zip(free, stopped, strict=True):
        places = [place for place, token in enumerate(whole) if token in ends]
        assert short == whole[: min(places, default=len(whole))]
    assert len({len(text) for text in stopped}) > 1
    forced = generate(model, PROMPTS, replace(SAMPLING, min_new_tokens=10), eos_ids=ends)
    assert {len(text) for text in forced} == {10}
    assert not {token for text in forced for token in text} & set(ends)


@pytest.mark.parametrize(
    ("asked", "said", "expected"),
    [
        ({}, {}, {"temperature": 0.8, "max_new_tokens": 128, "repetition_penalty": 1.0, "num_beams": 1}),
        (
            {},
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1},
            {"temperature": 0.6, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1},
        ),
        ({}, {"do_sample": True, "top_k": 0, "max_new_tokens": 7}, {"temperature": 1.0, "top_k": None}),
        # Without do_sample, transformers leaves these alone.
        ({}, {"temperature": 0.6, "top_p": 0.9, "top_k": 20}, {"temperature": 0.8, "top_p": None}),
        ({}, {"do_sample": False, "temperature": 0.6, "top_k": 9}, {"temperature": 0.0, "top_k": None}),
        ({"temperature": 0.0}, {"do_sample": True, "top_p": 0.9}, {"temperature": 0.0, "top_p": None}),
        ({"temperature": 0.3}, {"do_sample": True, "top_p": 0.9}, {"temperature": 0.3, "top_p": 0.9}),
        ({"temperature": 0.0}, {"num_beams": 4}, {"num_beams": 1, "temperature": 0.0}),
        ({"temperature": 0.0, "num_beams": 2}, {"num_beams": 4}, {"num_beams": 2, "temperature": 0.0}),
        ({"top_p": 0.5}, {"num_beams": 4}, {"num_beams": 1, "temperature": 0.8, "top_p": 0.5}),
        (
            {},
            {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True},
            {"num_beams": 4, "temperature": 0.0, "length_penalty": 2.0, "early_stopping": True},
        ),
        ({"num_beams": 1}, {"num_beams": 4, "length_penalty": 2.0}, {"num_beams": 1, "length_penalty": 1.0}),
        ({"repetition_penalty": 1.0}, {"repetition_penalty": 1.3}, {"repetition_penalty": 1.0}),
    ],
)
def test_a_folder_s_settings_stand_in_for_what_is_not_asked(
    asked: dict[str, Any], said: dict[str, Any], expected: dict[str, Any]
) -> None:
    config = GenerateConfig(**asked).resolved(has_sources=False, folder_settings=said)
    assert {key: getattr(config, key) for key in expected} == expected
    assert not list(config.problems())


def test_what_is_not_heeded_of_a_folder_s_settings() -> None:
    said = {
        "eos_token_id": [1, 2],
        "do_sample": True,
        "num_beams": 2,
        "typical_p": 1.0,
        "no_repeat_ngram_size": 3,
        "suppress_tokens": [],
        "forced_bos_token_id": 0,
        "min_p": 0.1,
    }
    assert unsupported_settings(said) == [
        "no_repeat_ngram_size=3",
        "forced_bos_token_id=0",
        "min_p=0.1",
        "do_sample=True with num_beams",
    ]


def test_mode_is_restored() -> None:
    model = gpt().train()
    generate(model, [[1]], GenerateConfig(max_new_tokens=1))
    assert model.training


def frequencies(config: GenerateConfig, logits: list[float]) -> torch.Tensor:
    count = 4000
    draws = [(i + 0.5) / count for i in range(count)]
    tokens = sample(torch.tensor([logits]).expand(count, -1), config, draws)
    return torch.bincount(tokens, minlength=len(logits)) / count


def test_sampling_follows_the_distribution() -> None:
    probs = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
    logits = probs.log().tolist()
    config = GenerateConfig(temperature=1.0)
    torch.testing.assert_close(frequencies(config, logits), probs, atol=1e-3, rtol=0)
    cooled = probs**2 / (probs**2).sum()
    torch.testing.assert_close(
        frequencies(replace(config, temperature=0.5), logits), cooled, atol=1e-3, rtol=0
    )
    top2 = torch.tensor([0, 0.4, 0, 0.25, 0]) / 0.65
    torch.testing.assert_close(frequencies(replace(config, top_k=2), logits), top2, atol=1e-3, rtol=0)
    torch.testing.assert_close(frequencies(replace(config, top_p=0.6), logits), top2, atol=1e-3, rtol=0)
    top3 = torch.tensor([0, 0.4, 0, 0.25, 0.2]) / 0.85
    torch.testing.assert_close(frequencies(replace(config, top_p=0.7), logits), top3, atol=1e-3, rtol=0)
    only = frequencies(replace(config, top_p=1e-9), logits)
    assert only.tolist() == [0, 1, 0, 0, 0]
    assert frequencies(replace(config, top_k=100), logits)[2] > 0


def test_extreme_draws_stay_inside() -> None:
    logits = torch.tensor([[0.0, -1e9, -1e9]])
    assert sample(logits, GenerateConfig(temperature=1.0), [1 - 2**-53]).item() == 0
    assert sample(logits, GenerateConfig(temperature=1.0), [0.0]).item() == 0


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([[]], {}, "prompt: got no tokens"),
        ([[1], []], {}, r"prompt\[1\]: got no tokens"),
        ([[1] * T], {}, "prompt: got 32 tokens; allowed: fewer than .* 32"),
        ([[1] * 30], {"max_new_tokens": 3}, "max_new_tokens: got 3 after a prompt of 30.*at most 2"),
        ([[V]], {}, "token 64; allowed: 0 to 63"),
        ([[-1]], {}, "token -1"),
        ([[1]], {"temperature": -1.0}, r"generate\.temperature: got -1\.0"),
        (
            [[1]],
            {"temperature": 0.0, "top_p": 0.5},
            r"generate\.top_p: got 0\.5; allowed: null with temperature=0",
        ),
    ],
)
def test_refusals(prompts: list[list[int]], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(gpt(), prompts, GenerateConfig(**({"max_new_tokens": 2} | changes)))


def test_longest_allowed_and_beyond_for_lstm() -> None:
    assert len(generate(gpt(), [[1] * 30], GenerateConfig(max_new_tokens=2))[0]) == 2
    assert len(generate(lstm(), [[1] * 100], GenerateConfig(max_new_tokens=2))[0]) == 2


def test_diverged_model() -> None:
    model = gpt()
    torch.nn.init.constant_(model.norm.weight, float("nan"))
    with pytest.raises(CheckpointError, match="not finite"):
        generate(model, [[1]], GenerateConfig(max_new_tokens=1))


def test_the_command_line_s_defaults_are_the_dataclass_s() -> None:
    assert decode(GenerateConfig, compose(["checkpoint=any"], "generate")["generate"]) == GenerateConfig()
