"""Every preset against its published size and against its own arithmetic, on the meta device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from llmtrain.config import decode
from llmtrain.models.bert import Bert
from llmtrain.models.bert_config import BertConfig
from llmtrain.models.config import GPTConfig, LSTMConfig, SimpleCNNConfig
from llmtrain.models.convolutional import SimpleCNN
from llmtrain.models.gpt import GPT
from llmtrain.models.recurrent import LSTMLanguageModel

PRESETS = Path(__file__).parents[3] / "conf" / "model"
CONFIGS = {"gpt": GPTConfig, "bert": BertConfig, "lstm": LSTMConfig, "simple_cnn": SimpleCNNConfig}
MODELS = {"gpt": GPT, "bert": Bert, "lstm": LSTMLanguageModel, "simple_cnn": SimpleCNN}

EXACT = {
    "gpt2_124m": 124_439_808,
    "gpt2_355m": 354_823_168,
    "gpt2_774m": 774_030_080,
    "gpt2_1.5b": 1_557_611_200,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_405b": 405_853_388_800,
    "simple_cnn": 421_642,
    # As transformers counts BertForPreTraining, and RobertaForMaskedLM without its one segment.
    "bert_base": 110_106_428,
    "bert_large": 336_226_108,
    "roberta_base": 124_697_433 - 768,
    "roberta_large": 355_412_057 - 1024,
}
# Papers that print a rounded size, and sizes of our own.
ROUNDED = {
    "gpt3_6.7b": 6.7e9,
    "gpt3_13b": 12.9e9,
    "gpt3_175b": 174.6e9,
    "gpt_tiny": 7.1e6,
    "llama_tiny": 8.6e6,
    "bert_tiny": 1.9e6,
}


def load(name: str) -> GPTConfig | BertConfig | LSTMConfig | SimpleCNNConfig:
    mapping = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
    config = decode(CONFIGS[mapping["family"]], mapping)
    if getattr(config, "vocab_size", 0) is None:
        config = replace(config, vocab_size=8192)
    return config


NAMES = sorted(path.stem for path in PRESETS.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_parameter_count(name: str) -> None:
    config = load(name)
    with torch.device("meta"):
        model = MODELS[config.family](config)
    count = sum(p.numel() for p in model.parameters())
    assert count == config.parameter_count()
    if name in EXACT:
        assert count == EXACT[name]
    elif name in ROUNDED:
        assert count == pytest.approx(ROUNDED[name], rel=0.01)


def test_all_published_sizes_are_checked() -> None:
    assert {*EXACT, *ROUNDED, "lstm"} == {n for n in NAMES if load(n).family in MODELS}


@pytest.mark.parametrize(("name", "published"), [("bert_base", 109_482_240), ("bert_large", 335_141_888)])
def test_encoder_with_pooler(name: str, published: int) -> None:
    with torch.device("meta"):
        model = Bert(load(name))
    heads = ("transform", "head.bias", "pair_head")
    count = sum(p.numel() for key, p in model.named_parameters() if not key.startswith(heads))
    assert count == published


def test_presets_state_every_choice() -> None:
    """A reader of a preset sees each field that its form depends on."""
    for name in NAMES:
        mapping = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
        if mapping["family"] == "gpt":
            assert {
                "vocab_size",
                "norm",
                "positions",
                "activation",
                "bias",
                "tie_embeddings",
            } <= mapping.keys()
