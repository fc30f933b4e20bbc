from dataclasses import replace

import pytest

from llmtrain.config import encode
from llmtrain.models.gpt.config import GPTConfig
from llmtrain.train.config import model_differences

MODEL = GPTConfig(vocab_size=320)


def test_what_weights_and_forward_pass_do_not_depend_on_is_no_other_model():
    ours = encode(replace(MODEL, dropout=0.1, init_std=0.01))
    assert model_differences(ours, encode(MODEL)) == []


@pytest.mark.parametrize("changes", [{"norm_eps": 1e-6}, {"num_layers": 3}, {"positions": "rope"}])
def test_another_model_is_told_by_key(changes: dict):
    ((key, value),) = changes.items()
    there = getattr(MODEL, key)
    ours = encode(replace(MODEL, **changes))
    assert model_differences(ours, encode(MODEL)) == [f"model.{key}={value} here, {there} there"]
