"""The estimated weights, gradients and optimizer states, at the start and in training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from llmtrain.engine import deepspeed as deepspeed_engine
from llmtrain.engine import local as local_engine
from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.gpt.model import GPT
from llmtrain.nn import head
from llmtrain.nn import memory as nn_memory
from llmtrain.nn.memory import Conditions, Numbers
from llmtrain.nn.model_config import ModelConfig
from llmtrain.optim.config import OptimizerConfig
from llmtrain.optim.freezing import freeze
from llmtrain.optim.optimizers import build_optimizer
from llmtrain.parallel.layout import Layout
from llmtrain.plan import memory, moments
from llmtrain.plan.memory import (
    Memory,
    Trainable,
    memory_per_process,
    optimizer_slots,
    start_bytes,
)
from tests.support.planned_memory import (
    GPT2_FORM,
    PRESETS,
    B,
    T,
    V,
    all_steps,
    built,
    kept_bytes,
    layout,
    memory_of,
)
from tests.support.presets import preset, row_of


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
    assert nn_memory.LOGITS_PER_CHUNK == head.LOGITS_PER_CHUNK
    assert nn_memory.CACHED_LOGITS == head.CACHED_LOGITS
    assert moments.LOCAL_BUCKET_BYTES == local_engine.BUCKET_BYTES
    assert moments.DEEPSPEED_BUCKET_ELEMENTS == deepspeed_engine.MAX_BUCKET_ELEMENTS
    config = deepspeed_engine.deepspeed_config(
        layout(zero=3, data=4), "bf16", OptimizerConfig(), 10**12, "cuda"
    )
    zero = config["zero_optimization"]
    assert zero["reduce_bucket_size"] == moments.DEEPSPEED_BUCKET_ELEMENTS
    assert zero["stage3_max_live_parameters"] == moments.DEEPSPEED_LIVE_ELEMENTS
    assert zero["stage3_prefetch_bucket_size"] == moments.DEEPSPEED_PREFETCH_ELEMENTS


def planned(model: ModelConfig, precision: str = "bf16", **settings: int) -> Memory:
    return memory_per_process(
        model,
        row_of(model, 16),
        layout(**settings),
        precision=precision,  # type: ignore[arg-type]
        optimizer=OptimizerConfig(),
        conditions=Conditions("cuda"),
    )


def test_zero_shards_term_by_term() -> None:
    model = GPTConfig(vocab_size=50257)
    P = model.parameter_count()
    plans = [planned(model, zero=zero, data=8) for zero in range(4)]
    terms = [(m.weights, m.gradients, m.optimizer) for m in plans]
    copies = 2 * memory_of(model, Numbers(2, 4), 1, 16, Conditions("cuda")).low_precision_copies(
        all_steps(model)
    )
    assert terms[0] == (4 * P + copies, 4 * P, 8 * P)
    assert terms[1] == (2 * P, 6 * P, 12 * P // 8)
    assert terms[2] == (2 * P, 4 * P // 8, 12 * P // 8)
    assert terms[3] == (2 * P // 8, 4 * P // 8, 12 * P // 8)


def test_copies_of_weights_are_divided_with_the_optimizer_state() -> None:
    model = GPTConfig(vocab_size=50257)
    P = model.parameter_count()

    def optimizer(copies: int, zero: int, data: int) -> int:
        return memory_per_process(
            model,
            row_of(model, 16),
            layout(zero=zero, data=data),
            precision="bf16",
            optimizer=OptimizerConfig(),
            conditions=Conditions("cuda"),
            weight_copies=copies,
        ).optimizer

    assert optimizer(1, 0, 1) - optimizer(0, 0, 1) == 4 * P
    assert optimizer(1, 3, 8) - optimizer(0, 3, 8) == 4 * P // 8


def test_fp32_and_fp16() -> None:
    model = GPTConfig(vocab_size=50257)
    P = model.parameter_count()
    fp32, fp16 = planned(model, "fp32", zero=2, data=2), planned(model, "fp16", zero=2, data=2)
    assert (fp32.weights, fp32.gradients, fp32.optimizer) == (4 * P, 2 * P, 6 * P)
    assert (fp16.weights, fp16.gradients, fp16.optimizer) == (2 * P, P, 6 * P)


def test_total_is_the_sum_and_largest_its_greatest() -> None:
    m = Memory(
        weights=1, gradients=2, optimizer=9, activations=3, logits=4, buffers=5, checkpoint_copy=0, runtime=6,
        not_at_once=-4,
    )  # fmt: skip
    assert m.total == 26
    assert m.largest == "optimizer"
    assert list(m.terms) == [
        "weights", "gradients", "optimizer", "activations", "logits", "buffers", "checkpoint copy", "runtime",
        "allocator", "not at once",
    ]  # fmt: skip


def test_activations_grow_with_the_micro_batch_alone() -> None:
    model = GPTConfig(vocab_size=50257)
    one, two = planned(model, micro_size=1), planned(model, micro_size=2)
    assert two.activations == 2 * one.activations
    assert (one.weights, one.gradients, one.optimizer) == (two.weights, two.gradients, two.optimizer)


def test_gradients_and_the_optimizer_are_of_what_trains() -> None:
    model, shape = GPTConfig(vocab_size=50257), layout(zero=2, data=8)
    P, steps = model.parameter_count(), model.num_layers + 2
    nothing_frozen = Trainable(P, (1.0,) * steps)
    embedding = model.vocab_size * model.hidden_size

    def plan(trainable: Trainable | None) -> Memory:
        return memory_per_process(
            model,
            row_of(model, 16),
            shape,
            precision="bf16",
            optimizer=OptimizerConfig(),
            conditions=Conditions("cuda"),
            trainable=trainable,
        )

    assert plan(nothing_frozen) == plan(None)
    frozen_blocks = plan(Trainable(embedding, (1.0, *(0.0,) * model.num_layers, 1.0)))
    assert frozen_blocks.weights == plan(None).weights
    share = pytest.approx(embedding / P, rel=1e-3)
    assert frozen_blocks.optimizer / plan(None).optimizer == share
    assert frozen_blocks.gradients / plan(None).gradients == share


def test_frozen_layers_below_what_trains_keep_no_activations() -> None:
    """As torch keeps them of a model whose lower layers are frozen."""
    model = GPTConfig(**GPT2_FORM, dropout=0.1)
    frozen = 2
    module = built(GPT(model), "fp32")
    freeze(module, ["embedding.*", "positions.*", "blocks.0.*"])
    labels = torch.randint(V, (B, T))

    def logits() -> torch.Tensor:
        context = module.context(labels, dropout_keys_B=torch.arange(B))
        x = labels
        for stage in module.stages()[:-1]:
            x = stage.run(x, context)
        return x

    shares = tuple(0.0 if step < frozen else 1.0 for step in all_steps(model))
    kept = Trainable(1, shares).kept(all_steps(model))
    assert kept == range(frozen, model.num_layers + 2)
    whole = memory_of(model, Numbers(4, 4), B, T, Conditions("cpu"))
    planned = whole.activations(kept).kept - whole.activations(range(kept.stop - 1, kept.stop)).kept
    assert kept_bytes(module, logits) == pytest.approx(planned, rel=0.05)
    assert Trainable(1, (1.0,)).kept(range(1)) == range(1)

    def activations(shares: tuple[float, ...]) -> int:
        return memory_per_process(
            model,
            row_of(model, 16),
            layout(),
            precision="fp32",
            optimizer=OptimizerConfig(),
            conditions=Conditions("cpu"),
            trainable=Trainable(1, shares),
        ).activations

    everything = activations((1.0,) * 5)
    head_alone, two_layers = (activations((0.0,) * lowest + (1.0,) * (5 - lowest)) for lowest in (4, 2))
    assert activations((1.0, 0.0, 0.0, 0.0, 1.0)) == everything, "gradients pass through"
    assert 0 < head_alone < two_layers < everything


@pytest.mark.in_turns(3)
@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_process_starts_with_its_own_part(path: Path) -> None:
    """Never more than it holds later, so that a plan need not ask for the start."""
    config = preset(path)
    if config.vocab_size is None:
        config = replace(config, vocab_size=8192)
    for zero, data, tensor, pipeline in (
        (0, 2, 1, 1),
        (1, 2, 2, 2),
        (2, 4, 1, 1),
        (3, 512, 1, 1),
        (3, 64, 4, 1),
    ):
        shape = Layout(data * tensor * pipeline, data, tensor, pipeline, 1, zero, 1, 1, data, 16)
        for precision in ("fp32", "bf16"):
            start = start_bytes(config, shape, precision, "cuda")  # type: ignore[arg-type]
            later = memory_per_process(
                config,
                row_of(config, 16),
                shape,
                precision=precision,  # type: ignore[arg-type]
                optimizer=OptimizerConfig(),
                conditions=Conditions("cuda"),
            )
            assert memory.RUNTIME_BYTES["cuda"] < start <= later.total
    sharded = Layout(512, 512, 1, 1, 1, 3, 1, 1, 512, 16)
    mine = start_bytes(config, sharded, "bf16", "cuda") - memory.RUNTIME_BYTES["cuda"]
    share = 2 * config.parameter_count() / 512
    assert mine == pytest.approx(share + 2 * config.largest_parameter_count(), abs=4)
