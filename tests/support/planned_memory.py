"""Plans of memory and what torch really keeps, to be compared."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmtrain.models.gpt.config import GPTConfig
from llmtrain.nn.initialize import initialize
from llmtrain.nn.linear import way_of
from llmtrain.nn.memory import Conditions, ModelMemory, Numbers
from llmtrain.nn.model_config import ModelConfig, Row
from llmtrain.nn.recompute_config import RecomputeConfig
from llmtrain.optim.config import OptimizerConfig
from llmtrain.parallel.layout import Layout
from llmtrain.plan.memory import (
    Memory,
    memory_per_process,
    model_memory,
)
from tests.support.presets import row_of

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

NOTHING = RecomputeConfig()

NUMBERS = {"fp32": Numbers(4, 4), "autocast": Numbers(2, 4), "bf16": Numbers(2, 2)}

GPT_1B = GPTConfig(vocab_size=50257, hidden_size=2048, num_layers=24, num_heads=16)


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


def memory_of(
    model: ModelConfig, numbers: Numbers, B: int, T: int, conditions: Conditions, row: Row | None = None
) -> ModelMemory:
    """Of one rank that no other shares the model with."""
    layout = Layout(1, 1, 1, 1, 1, 0, B, 1, B, T)
    found = model_memory(model, row or row_of(model, T), numbers, layout, conditions)
    assert found is not None
    return found


def all_steps(model: ModelConfig) -> range:
    return range(len(model.step_parameter_counts()))


def kept_by(
    model: ModelConfig, numbers: Numbers, B: int, T: int, row: Row | None = None, **conditions: Any
) -> int:
    """As estimated, on one process on the CPU."""
    found = memory_of(model, numbers, B, T, Conditions("cpu", **conditions), row)
    return found.activations(all_steps(model)).kept


def kept_copies(model: ModelConfig, recompute: RecomputeConfig = NOTHING) -> int:
    """Bytes of autocast's copies of weights on this machine's processor."""
    conditions = Conditions("cpu", recompute=recompute, has_bf16=way_of(torch.bfloat16) == "torch")
    return 2 * memory_of(model, Numbers(2, 4), B, T, conditions).low_precision_copies(all_steps(model))


def layout(*, zero: int = 0, data: int = 1, micro_size: int = 2) -> Layout:
    return Layout(data, data, 1, 1, 1, zero, micro_size, 1, data * micro_size, 16)


def of_layout(recompute: str = "none", every: int = 1, model: GPTConfig = GPT_1B, **sizes: Any) -> Memory:
    whole = {
        "data": 1,
        "tensor": 1,
        "pipeline": 1,
        "sequence": 1,
        "zero": 0,
        "micro_size": 1,
        "accumulation": 8,
    }
    at = {**whole, **sizes}
    world = at["data"] * at["tensor"] * at["pipeline"] * at["sequence"]
    batch = at["data"] * at["micro_size"] * at["accumulation"]
    return memory_per_process(
        model,
        row_of(model, 1024),
        Layout(world_size=world, global_size=batch, sequence_length=1024, **at),
        precision="bf16",
        optimizer=OptimizerConfig(),
        conditions=Conditions("cuda", recompute=RecomputeConfig(recompute, every)),  # type: ignore[arg-type]
    )


CONF = Path(__file__).parents[2] / "conf"

PRESETS = sorted(
    path
    for path in (CONF / "model").glob("*.yaml")
    if path.stem.startswith(("gpt", "llama", "bert", "roberta", "xlnet", "transformer", "t5", "bart"))
)
