"""Every preset against its published size and against its own arithmetic, on the meta device."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from llmtrain.models.bert.model import Bert
from llmtrain.models.skeleton import skeleton_of
from llmtrain.nn.model_config import ModelConfig
from llmtrain.vectors.config import VECTORS_CONFIGS
from tests.support.presets import preset, preset_section, usual_objective
from tests.support.training import REPOSITORY

PRESETS = REPOSITORY / "conf/model"

EXACT = {
    "gpt2_124m": 124_439_808,
    "gpt2_355m": 354_823_168,
    "gpt2_774m": 774_030_080,
    "gpt2_1.5b": 1_557_611_200,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_405b": 405_853_388_800,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "mistral_7b": 7_241_732_096,
    "qwen2_0.5b": 494_032_768,
    "qwen3_0.6b": 596_049_920,
    "smollm2_135m": 134_515_008,
    "gemma2_2b": 2_614_341_888,
    "gemma3_1b": 999_885_952,
    "olmo2_1b": 1_484_916_736,
    # As transformers counts OPTForCausalLM.
    "opt_125m": 125_239_296,
    "opt_1.3b": 1_315_758_080,
    "opt_2.7b": 2_651_596_800,
    "opt_6.7b": 6_658_473_984,
    "opt_13b": 12_853_473_280,
    "opt_30b": 29_974_540_288,
    "opt_66b": 65_719_701_504,
    "opt_175b": 174_604_468_224,
    "simple_cnn": 421_642,
    "mlp": 784 * 256 + 256 + 256 * 10 + 10,
    "gan": 1_093_137,
    "dcgan": 904_834,
    # As He et al.'s models are published by torchvision.
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    # As transformers counts BertForPreTraining, and RobertaForMaskedLM without its one segment.
    "bert_base": 110_106_428,
    "bert_large": 336_226_108,
    "roberta_base": 124_697_433 - 768,
    "roberta_large": 355_412_057 - 1024,
    # As transformers counts T5ForConditionalGeneration and BartForConditionalGeneration.
    "t5_small": 60_506_624,
    "t5_base": 222_903_552,
    "bart_base": 139_420_416,
    # As transformers counts XLNetLMHeadModel.
    "xlnet_base": 116_750_336,
    "xlnet_large": 360_300_800,
}
# Papers that print a rounded size, and sizes of our own.
ROUNDED = {
    # He et al., table 6.
    "resnet20": 0.27e6,
    "resnet32": 0.46e6,
    "resnet56": 0.85e6,
    "gpt3_6.7b": 6.7e9,
    "gpt3_13b": 12.9e9,
    "gpt3_175b": 174.6e9,
    "gpt_tiny": 7.1e6,
    "llama_tiny": 8.6e6,
    "bert_tiny": 1.9e6,
    "xlnet_tiny": 1.91e6,
    # The paper's 65 M and 213 M, which its tables round.
    "transformer_base": 63.1e6,
    "transformer_big": 214.2e6,
    "transformer_tiny": 2.44e6,
    "t5_tiny": 2.9e6,
    "bart_tiny": 2.97e6,
}


def load(name: str) -> ModelConfig:
    config: ModelConfig = preset(PRESETS / f"{name}.yaml")
    config = usual_objective(config).fitted(config)
    if config.lacks_vocab_size:
        config = replace(config, vocab_size=8192)
    if config.task is not None:
        config = replace(config, task=config.task.assuming(2))
    return config


FORMS = (
    *("gpt_tiny", "llama_tiny", "lstm", "attention_lstm", "simple_cnn", "mlp", "resnet20"),
    *("bert_tiny", "xlnet_tiny", "t5_tiny", "bart_tiny"),
)

# That of a folder is no size of its own, and word vectors have that of their text.
WITHOUT_SIZE = {"pretrained", "_word_vectors", *VECTORS_CONFIGS}
NAMES = sorted(path.stem for path in PRESETS.glob("*.yaml") if path.stem not in WITHOUT_SIZE)


@pytest.mark.parametrize("name", NAMES)
def test_parameter_count(name: str) -> None:
    config = load(name)
    model = skeleton_of(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    count = sum(p.numel() for p in model.parameters())
    assert count == config.parameter_count()
    if name in EXACT:
        assert count == EXACT[name]
    elif name in ROUNDED:
        assert count == pytest.approx(ROUNDED[name], rel=0.01)


def test_no_form_loads_the_compiler_of_torch() -> None:
    """It takes seconds of each start."""
    code = (
        "import sys, torch; from llmtrain.interchange.trained import build_module;"
        "from tests.unit.models.test_presets import FORMS, load;"
        "[build_module(load(name), torch.device('cpu')) for name in FORMS];"
        "assert 'torch._dynamo' not in sys.modules and 'sympy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


def test_all_published_sizes_are_checked() -> None:
    recurrent = {"rnn", "gru", "lstm", "bilstm", "attention_lstm", "seq2seq_lstm"}
    assert {*EXACT, *ROUNDED, *recurrent} == set(NAMES)


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
        mapping = preset_section(PRESETS / f"{name}.yaml")
        if mapping["family"] == "gpt":
            assert {
                "vocab_size",
                "norm",
                "positions",
                "activation",
                "bias",
                "tie_embeddings",
            } <= mapping.keys()
