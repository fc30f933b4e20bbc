"""Estimates against what torch really keeps."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from llmtrain.engine import deepspeed as deepspeed_engine
from llmtrain.models import attention, head
from llmtrain.models.config import GPTConfig, LSTMConfig, SimpleCNNConfig
from llmtrain.models.convolutional import SimpleCNN
from llmtrain.models.gpt import GPT
from llmtrain.models.initialize import initialize
from llmtrain.models.recurrent import LSTMLanguageModel
from llmtrain.optim.config import OptimizerConfig
from llmtrain.optim.optimizers import build_optimizer
from llmtrain.parallel.layout import BatchConfig, Layout, ParallelConfig, plan_layout
from llmtrain.plan import activations, memory
from llmtrain.plan.activations import ModelConfig, Numbers, activation_bytes, matrix_parameter_count
from llmtrain.plan.memory import Memory, memory_per_process, optimizer_slots, start_bytes

TOLERANCE = 0.03
"""The estimates' stated error where the arithmetic is this project's own; oneDNN's workspace is measured."""

B, T, V = 4, 64, 50
GPT2_FORM = {"vocab_size": V, "max_sequence_length": T, "hidden_size": 96, "num_layers": 3, "num_heads": 6}
LLAMA_FORM = {
    **GPT2_FORM,
    "num_kv_heads": 2,
    "mlp_hidden_size": 200,
    "norm": "rmsnorm",
    "positions": "rope",
    "activation": "silu",
    "gated_mlp": True,
    "bias": False,
    "tie_embeddings": False,
}


def kept_bytes(model: nn.Module, loss: Callable[[], torch.Tensor]) -> int:
    """Bytes of distinct storages, parameters aside, that the forward pass keeps for the backward pass."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = loss()
    del result
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in parameters)


def built(model: nn.Module, precision: str) -> nn.Module:
    initialize(model, 0)
    return model.bfloat16() if precision == "bf16" else model


def autocast(precision: str) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else nullcontext()


NUMBERS = {"fp32": Numbers(4, 4), "autocast": Numbers(2, 4), "bf16": Numbers(2, 2)}
CASES = {
    "gpt2": (GPT2_FORM, False),
    "gpt2 documents": (GPT2_FORM, True),
    "gpt2 dropout": ({**GPT2_FORM, "dropout": 0.1}, False),
    "gpt2 no bias": ({**GPT2_FORM, "bias": False, "tie_embeddings": False}, False),
    "llama": (LLAMA_FORM, False),
    "llama dropout": ({**LLAMA_FORM, "dropout": 0.1}, False),
    "llama documents": (LLAMA_FORM, True),
}


@pytest.mark.parametrize("precision", NUMBERS)
@pytest.mark.parametrize("case", CASES)
def test_gpt_activations(case: str, precision: str) -> None:
    settings, with_documents = CASES[case]
    config = GPTConfig(**settings)
    model = built(GPT(config), precision)
    tokens_BT = torch.randint(V, (B, T))
    documents_BT = (torch.arange(T) // 20).expand(B, T) if with_documents else None

    def loss() -> torch.Tensor:
        with autocast(precision):
            return model(tokens_BT, labels_BT=tokens_BT, documents_BT=documents_BT)

    numbers = NUMBERS[precision]
    expected = activation_bytes(
        config, numbers, micro_size=B, sequence_length=T, device="cpu", document_mask=with_documents
    )
    expected += B * T * config.hidden_size * numbers.compute + 4 * V * config.hidden_size
    if precision == "autocast":
        expected += 2 * matrix_parameter_count(config)
    assert kept_bytes(model, loss) == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("form", [GPT2_FORM, LLAMA_FORM], ids=["gpt2", "llama"])
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("longest", [100, 4096])
def test_gpt_activations_of_longer_sequences(
    longest: int, with_documents: bool, form: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 tokens are two blocks of attention, or past the longest that is done in blocks."""
    monkeypatch.setattr(attention, "LONGEST", longest)
    monkeypatch.setattr(activations, "LONGEST_BLOCKWISE", longest)
    config = GPTConfig(**{**form, "max_sequence_length": 200})
    model = built(GPT(config), "fp32")
    tokens_BT = torch.randint(V, (2, 200))
    documents_BT = (torch.arange(200) // 30).expand(2, 200) if with_documents else None
    expected = activation_bytes(
        config,
        NUMBERS["fp32"],
        micro_size=2,
        sequence_length=200,
        device="cpu",
        document_mask=with_documents,
    )
    expected += 400 * config.hidden_size * 4 + 4 * V * config.hidden_size
    found = kept_bytes(model, lambda: model(tokens_BT, labels_BT=tokens_BT, documents_BT=documents_BT))
    assert found == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("precision", ["fp32", "autocast"])
@pytest.mark.parametrize(("hidden_size", "num_layers"), [(96, 1), (96, 3), (256, 2)])
def test_lstm_activations(hidden_size: int, num_layers: int, precision: str) -> None:
    config = LSTMConfig(vocab_size=V, hidden_size=hidden_size, num_layers=num_layers)
    model = built(LSTMLanguageModel(config), precision)
    tokens_BT = torch.randint(V, (B, T))

    def loss() -> torch.Tensor:
        with autocast(precision):
            return model(tokens_BT, labels_BT=tokens_BT)

    numbers = NUMBERS[precision]
    expected = activation_bytes(config, numbers, micro_size=B, sequence_length=T, device="cpu")
    expected += B * T * hidden_size * numbers.compute + 4 * V * hidden_size
    if precision == "autocast":
        expected += 2 * matrix_parameter_count(config)
    assert kept_bytes(model, loss) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("precision", ["fp32", "autocast"])
@pytest.mark.parametrize(
    ("tokens", "hidden_size", "vocab_size"), [(512, 64, 2000), (512, 256, 2000), (64, 64, 500)]
)
def test_peak_of_the_head(
    tokens: int, hidden_size: int, vocab_size: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (head, activations):
        monkeypatch.setattr(module, "LOGITS_PER_CHUNK", 2**18)
    model = head.LanguageModelHead(hidden_size, vocab_size)
    torch.nn.init.normal_(model.weight, std=0.02)
    hidden = torch.randn(1, tokens, hidden_size, requires_grad=True)
    labels = torch.randint(vocab_size, (1, tokens))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as run:
        with autocast(precision):
            loss = model(hidden, labels)
        loss.backward()
    now = peak = 0
    for event in run.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    config = GPTConfig(vocab_size=vocab_size, hidden_size=hidden_size)
    expected = activations.head_bytes(config, NUMBERS[precision], tokens=tokens, device="cpu")
    assert 0.4 * expected <= peak <= 1.05 * expected, "an upper estimate"


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_cnn_activations(dropout: float) -> None:
    config = SimpleCNNConfig(dropout=dropout)
    model = built(SimpleCNN(config), "fp32")
    images, labels = torch.randn(16, 1, 28, 28), torch.zeros(16, dtype=torch.long)
    expected = activation_bytes(config, NUMBERS["fp32"], micro_size=16, sequence_length=1, device="cpu")
    assert kept_bytes(model, lambda: model(images, labels)) == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "adagrad", "rmsprop"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_optimizer_state(name: str, momentum: float) -> None:
    config = OptimizerConfig(name, momentum=momentum)
    model = nn.Linear(16, 16)
    optimizer = build_optimizer(config, model.named_parameters(), "cpu")
    model(torch.randn(2, 16)).sum().backward()
    optimizer.step()
    slots = sum(
        value.numel()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.ndim > 0
    )
    assert slots == optimizer_slots(config) * sum(p.numel() for p in model.parameters())


def test_constants_are_those_of_the_models_and_the_engine() -> None:
    assert activations.LOGITS_PER_CHUNK == head.LOGITS_PER_CHUNK
    assert activations.ATTENTION_BLOCK == attention.BLOCK
    assert activations.LONGEST_BLOCKWISE == attention.LONGEST
    assert memory.DEEPSPEED_BUCKET_ELEMENTS == deepspeed_engine.MAX_BUCKET_ELEMENTS
    config = deepspeed_engine.deepspeed_config(
        layout(zero=3, data=4), "bf16", OptimizerConfig(), 10**12, "cuda"
    )
    assert config["zero_optimization"]["reduce_bucket_size"] == memory.DEEPSPEED_BUCKET_ELEMENTS
    assert config["zero_optimization"]["stage3_max_live_parameters"] == memory.DEEPSPEED_LIVE_ELEMENTS


def layout(*, zero: int = 0, data: int = 1, micro_size: int = 2) -> Layout:
    return Layout(data, data, 1, 1, 1, zero, micro_size, 1, data * micro_size, 16)


def planned(model: ModelConfig, precision: str = "bf16", **settings: int) -> Memory:
    return memory_per_process(
        model,
        layout(**settings),
        precision=precision,  # type: ignore[arg-type]
        optimizer=OptimizerConfig(),
        device="cuda",
    )


def test_zero_shards_term_by_term() -> None:
    model = GPTConfig(vocab_size=50257)
    P = model.parameter_count()
    plans = [planned(model, zero=zero, data=8) for zero in range(4)]
    terms = [(m.weights, m.gradients, m.optimizer) for m in plans]
    assert terms[0] == (4 * P + 2 * matrix_parameter_count(model), 4 * P, 8 * P)
    assert terms[1] == (2 * P, 6 * P, 12 * P // 8)
    assert terms[2] == (2 * P, 4 * P // 8, 12 * P // 8)
    assert terms[3] == (2 * P // 8, 4 * P // 8, 12 * P // 8)


def test_fp32_and_fp16() -> None:
    model = GPTConfig(vocab_size=50257)
    P = model.parameter_count()
    fp32, fp16 = planned(model, "fp32", zero=2, data=2), planned(model, "fp16", zero=2, data=2)
    assert (fp32.weights, fp32.gradients, fp32.optimizer) == (4 * P, 2 * P, 6 * P)
    assert (fp16.weights, fp16.gradients, fp16.optimizer) == (2 * P, P, 6 * P)


def test_total_is_the_sum_and_largest_its_greatest() -> None:
    m = Memory(weights=1, gradients=2, optimizer=9, activations=3, logits=4, buffers=5, runtime=6)
    assert m.total == 30
    assert m.largest == "optimizer"
    assert list(m.terms) == [
        "weights", "gradients", "optimizer", "activations", "logits", "buffers", "runtime",
    ]  # fmt: skip


def test_activations_grow_with_the_micro_batch_alone() -> None:
    model = GPTConfig(vocab_size=50257)
    one, two = planned(model, micro_size=1), planned(model, micro_size=2)
    assert two.activations == 2 * one.activations
    assert (one.weights, one.gradients, one.optimizer) == (two.weights, two.gradients, two.optimizer)


def test_building_the_whole_model_counts() -> None:
    """ZeRO 3 shards 70 billion weights over 512 processes, but each builds them all first."""
    model = GPTConfig(
        vocab_size=128256, hidden_size=8192, num_layers=80, num_heads=64, num_kv_heads=8,
        mlp_hidden_size=28672, gated_mlp=True, norm="rmsnorm", positions="rope", bias=False,
        tie_embeddings=False,
    )  # fmt: skip
    layout = plan_layout(
        ParallelConfig(zero=3),
        BatchConfig(512, 1, 128),
        engine="deepspeed",
        precision="bf16",
        world_size=512,
        device="cuda",
    )
    assert start_bytes(model, layout, "cuda") > 4 * model.parameter_count()
