"""Estimates against what torch really keeps."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from llmtrain.engine import deepspeed as deepspeed_engine
from llmtrain.models.bert.config import BertConfig
from llmtrain.models.bert.model import Bert
from llmtrain.models.convolutional.config import SimpleCNNConfig
from llmtrain.models.convolutional.model import SimpleCNN
from llmtrain.models.encoder_decoder.config import Seq2SeqConfig
from llmtrain.models.encoder_decoder.model import EncoderDecoder
from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.gpt.model import GPT
from llmtrain.models.recurrent import model as recurrent
from llmtrain.models.recurrent.config import LSTMConfig
from llmtrain.models.registry import family_of
from llmtrain.models.xlnet.config import XLNetConfig
from llmtrain.models.xlnet.model import XLNet
from llmtrain.nn import attention_choice, head
from llmtrain.nn import memory as nn_memory
from llmtrain.nn.initialize import initialize
from llmtrain.nn.linear import way_of
from llmtrain.nn.memory import Conditions, ModelMemory, Numbers
from llmtrain.nn.model_config import ModelConfig, Row
from llmtrain.nn.recompute_config import RecomputeConfig
from llmtrain.objectives.permuted_lm import PermutedLM, PermutedLMConfig
from llmtrain.objectives.seq2seq import PairedTextConfig
from llmtrain.optim.config import OptimizerConfig
from llmtrain.optim.optimizers import build_optimizer
from llmtrain.parallel.layout import Layout
from llmtrain.parallel.pipeline import PipelineStage
from llmtrain.parallel.recompute import apply_recompute
from llmtrain.parallel.tensor import shard_tensors
from llmtrain.plan import machine, memory
from llmtrain.plan.memory import (
    Memory,
    Trainable,
    held_parameter_count,
    memory_per_process,
    model_memory,
    optimizer_slots,
    stage_steps,
    start_bytes,
)
from tests.support.memory import allocated
from tests.support.presets import preset, row_of

CONF = Path(__file__).parents[3] / "conf"
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
QWEN3_FORM = {**LLAMA_FORM, "qk_norm": True, "head_dim": 32}
GEMMA2_FORM = {
    **LLAMA_FORM,
    "norm_place": "both",
    "norm_adds_one": True,
    "scale_embedding": True,
    "sliding_window": 20,
    "full_attention_layers": (1,),
    "attention_softcap": 50.0,
    "logit_softcap": 30.0,
}
GEMMA3_FORM = {
    **QWEN3_FORM,
    "norm_place": "both",
    "norm_adds_one": True,
    "scale_embedding": True,
    "sliding_window": 20,
    "full_attention_layers": (2,),
    "local_rope_theta": 1000.0,
}
OLMO2_FORM = {**QWEN3_FORM, "norm_place": "after", "qk_norm_over": "all_heads"}


NOTHING = RecomputeConfig()


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


NUMBERS = {"fp32": Numbers(4, 4), "autocast": Numbers(2, 4), "bf16": Numbers(2, 2)}
CASES = {
    "gpt2": (GPT2_FORM, False),
    "gpt2 documents": (GPT2_FORM, True),
    "gpt2 dropout": ({**GPT2_FORM, "dropout": 0.1}, False),
    "gpt2 no bias": ({**GPT2_FORM, "bias": False, "tie_embeddings": False}, False),
    "llama": (LLAMA_FORM, False),
    "llama dropout": ({**LLAMA_FORM, "dropout": 0.1}, False),
    "llama documents": (LLAMA_FORM, True),
    "qwen3": (QWEN3_FORM, False),
    "qwen3 dropout": ({**QWEN3_FORM, "dropout": 0.1}, False),
    "gemma2": (GEMMA2_FORM, False),
    "gemma2 dropout": ({**GEMMA2_FORM, "dropout": 0.1}, False),
    "gemma3": (GEMMA3_FORM, False),
    "olmo2": (OLMO2_FORM, False),
    "olmo2 dropout": ({**OLMO2_FORM, "dropout": 0.1}, False),
}


@pytest.mark.in_turns(3)
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
    expected = kept_by(config, numbers, B, T, document_mask=with_documents, exact_dropout=False)
    expected += B * T * config.hidden_size * numbers.compute + 4 * V * config.hidden_size
    if precision == "autocast":
        expected += kept_copies(config)
    assert kept_bytes(model, loss) == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.in_turns(3)
@pytest.mark.parametrize("precision", NUMBERS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_bert_activations(precision: str, dropout: float) -> None:
    """Up to its heads, which work on the asked tokens alone."""
    settings = {
        "vocab_size": V,
        "max_sequence_length": 160,
        "hidden_size": 96,
        "num_layers": 3,
        "num_heads": 6,
    }
    config = BertConfig(**settings, dropout=dropout)  # type: ignore[arg-type]
    model = built(Bert(config), precision)
    tokens_BT = torch.randint(V, (B, 160))
    labels_BT = torch.full_like(tokens_BT, -100)

    def loss() -> torch.Tensor:
        with autocast(precision):
            return model(tokens_BT, labels_BT=labels_BT)

    expected = kept_by(config, NUMBERS[precision], B, 160, document_mask=False, exact_dropout=False)
    if precision == "autocast":
        expected += kept_copies(config)
    # The head's gradients lie there already.
    expected += 4 * V * config.hidden_size
    assert kept_bytes(model, loss) == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.in_turns(3)
@pytest.mark.parametrize("precision", NUMBERS)
@pytest.mark.parametrize(("dropout", "has_segments"), [(0.0, False), (0.1, True)])
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_xlnet_activations(mode: str, dropout: float, has_segments: bool, precision: str) -> None:
    """Up to its head, of a batch as its objective makes it."""
    T = 100
    config = XLNetConfig(
        vocab_size=V, hidden_size=96, num_layers=3, num_heads=6, dropout=dropout, has_segments=has_segments
    )
    recompute = RecomputeConfig(mode)  # type: ignore[arg-type]
    model = built(XLNet(config), precision)
    apply_recompute(model, recompute)
    learned = PermutedLM(PermutedLMConfig(), has_segments=has_segments)
    raw = {"tokens": np.zeros((B, T + 1), np.int64), "documents": np.zeros((B, T + 1), np.int32)}
    batch = learned.collate(raw | {"keys": np.arange(B)})
    batch["labels"][:] = -100
    batch["dropout_keys"] = torch.arange(B)

    def loss() -> torch.Tensor:
        with autocast(precision):
            return learned(model, batch).loss_sum

    expected = kept_by(config, NUMBERS[precision], B, T, recompute=recompute) + 4 * V * config.hidden_size
    if precision == "autocast":
        expected += kept_copies(config, recompute)
        if mode != "none":  # no block is at work between the passes
            expected -= kept_copies(replace(config, num_layers=1))
    assert allocated(loss).kept == pytest.approx(expected, rel=0.05)


PAIRS = Seq2SeqConfig(
    vocab_size=V,
    hidden_size=96,
    num_layers=2,
    num_decoder_layers=3,
    num_heads=6,
)
T5_FORM = replace(
    PAIRS,
    norm="rmsnorm",
    norm_first=True,
    positions="relative",
    scale_attention=False,
    bias=False,
    gated_mlp=True,
    activation="gelu_tanh",
)
BART_FORM = replace(
    PAIRS, positions="learned", max_sequence_length=160, embedding_norm=True, activation="gelu"
)


@pytest.mark.in_turns(3)
@pytest.mark.parametrize("precision", NUMBERS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("form", [PAIRS, T5_FORM, BART_FORM], ids=["transformer", "t5", "bart"])
def test_seq2seq_activations(form: Seq2SeqConfig, mode: Any, dropout: float, precision: str) -> None:
    config, S, targets = replace(form, dropout=dropout), 160, 72
    recompute = RecomputeConfig(mode)
    model = built(EncoderDecoder(config), precision)
    apply_recompute(model, recompute)
    sources_BS, tokens_BT = torch.randint(V, (B, S)), torch.randint(V, (B, targets))

    def loss() -> torch.Tensor:
        keys_B = torch.arange(B)
        with autocast(precision):
            return model(tokens_BT, sources_BS=sources_BS, labels_BT=tokens_BT, dropout_keys_B=keys_B)

    numbers = NUMBERS[precision]
    row = PairedTextConfig(target_length=targets).row(S)
    expected = kept_by(config, numbers, B, S, row, document_mask=False, recompute=recompute)
    expected += B * targets * config.hidden_size * numbers.compute + 4 * V * config.hidden_size
    if precision == "autocast" and mode == "none":
        expected += kept_copies(config)
    assert kept_bytes(model, loss) == pytest.approx(expected, rel=0.05)


@pytest.mark.in_turns(3)
@pytest.mark.parametrize(
    "form",
    [GPT2_FORM, LLAMA_FORM, QWEN3_FORM, {**LLAMA_FORM, "sliding_window": 40}],
    ids=["gpt2", "llama", "qwen3", "window"],
)
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("longest", [100, 4096])
def test_gpt_activations_of_longer_sequences(
    longest: int, with_documents: bool, form: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 tokens are two blocks of attention, or past the longest that is done in blocks. Documents as long
    as these leave no key out of a block: the estimate is of the most."""
    monkeypatch.setattr(attention_choice, "LONGEST_BLOCKWISE", longest)
    config = GPTConfig(**{**form, "max_sequence_length": 200})
    model = built(GPT(config), "fp32")
    tokens_BT = torch.randint(V, (2, 200))
    documents_BT = (torch.arange(200) // 150).expand(2, 200) if with_documents else None
    expected = kept_by(config, NUMBERS["fp32"], 2, 200, document_mask=with_documents)
    expected += 400 * config.hidden_size * 4 + 4 * V * config.hidden_size
    found = kept_bytes(model, lambda: model(tokens_BT, labels_BT=tokens_BT, documents_BT=documents_BT))
    assert found == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.in_turns(3)
@pytest.mark.parametrize("precision", ["fp32", "autocast"])
@pytest.mark.parametrize(("hidden_size", "num_layers"), [(96, 1), (96, 3), (256, 2)])
@pytest.mark.parametrize("has_bf16", [True, False])
def test_lstm_activations(
    has_bf16: bool, hidden_size: int, num_layers: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On processors with and without bf16; what has it can do without."""
    assert machine.has_bf16() == recurrent.has_low_precision_kernel()
    if has_bf16 and not machine.has_bf16():
        pytest.skip("this processor has no LSTM in bf16")
    monkeypatch.setattr(recurrent, "has_low_precision_kernel", lambda: has_bf16)
    config = LSTMConfig(vocab_size=V, hidden_size=hidden_size, num_layers=num_layers)
    model = built(recurrent.LSTMLanguageModel(config), precision)
    tokens_BT = torch.randint(V, (B, T))

    def loss() -> torch.Tensor:
        with autocast(precision):
            return model(tokens_BT, labels_BT=tokens_BT)

    numbers, conditions = NUMBERS[precision], Conditions("cpu", has_bf16=has_bf16)
    planned = memory_of(config, numbers, B, T, conditions)
    expected = planned.activations(range(1)).kept
    expected += B * T * hidden_size * numbers.compute + 4 * V * hidden_size
    if precision == "autocast":
        expected += 2 * planned.low_precision_copies(range(1))
    assert kept_bytes(model, loss) == pytest.approx(expected, rel=0.1)


@pytest.mark.in_turns(3)
@pytest.mark.parametrize("precision", ["fp32", "autocast"])
@pytest.mark.parametrize(
    ("tokens", "hidden_size", "vocab_size"), [(512, 64, 2000), (512, 256, 2000), (64, 64, 500)]
)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_peak_of_the_head(
    tokens: int,
    hidden_size: int,
    vocab_size: int,
    precision: str,
    softcap: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (head, nn_memory):
        monkeypatch.setattr(module, "LOGITS_PER_CHUNK", 2**18)
    model = head.LanguageModelHead(hidden_size, vocab_size, softcap=softcap)
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
    config = GPTConfig(vocab_size=vocab_size, hidden_size=hidden_size, logit_softcap=softcap)
    expected = memory_of(config, NUMBERS[precision], 1, tokens, Conditions("cpu")).head_bytes()
    assert 0.4 * expected <= peak <= 1.05 * expected, "an upper estimate"


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_cnn_activations(dropout: float) -> None:
    config = SimpleCNNConfig(dropout=dropout)
    model = built(SimpleCNN(config), "fp32")
    images, labels = torch.randn(16, 1, 28, 28), torch.zeros(16, dtype=torch.long)
    expected = kept_by(config, NUMBERS["fp32"], 16, 1)
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
    assert nn_memory.LOGITS_PER_CHUNK == head.LOGITS_PER_CHUNK
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


def test_fp32_and_fp16() -> None:
    model = GPTConfig(vocab_size=50257)
    P = model.parameter_count()
    fp32, fp16 = planned(model, "fp32", zero=2, data=2), planned(model, "fp16", zero=2, data=2)
    assert (fp32.weights, fp32.gradients, fp32.optimizer) == (4 * P, 2 * P, 6 * P)
    assert (fp16.weights, fp16.gradients, fp16.optimizer) == (2 * P, P, 6 * P)


def test_total_is_the_sum_and_largest_its_greatest() -> None:
    m = Memory(
        weights=1, gradients=2, optimizer=9, activations=3, logits=4, buffers=5, checkpoint_copy=0, runtime=6
    )
    assert m.total == 30
    assert m.largest == "optimizer"
    assert list(m.terms) == [
        "weights", "gradients", "optimizer", "activations", "logits", "buffers", "checkpoint copy", "runtime",
    ]  # fmt: skip


def test_activations_grow_with_the_micro_batch_alone() -> None:
    model = GPTConfig(vocab_size=50257)
    one, two = planned(model, micro_size=1), planned(model, micro_size=2)
    assert two.activations == 2 * one.activations
    assert (one.weights, one.gradients, one.optimizer) == (two.weights, two.gradients, two.optimizer)


FORMS = {"gpt2": GPT2_FORM, "llama": LLAMA_FORM}


@pytest.mark.in_turns(3)
@pytest.mark.parametrize(("mode", "every"), [("none", 1), ("selective", 1), ("full", 1), ("full", 2)])
@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
@pytest.mark.parametrize(("dropout", "with_documents"), [(0.0, False), (0.1, True)])
@pytest.mark.parametrize("form", FORMS)
def test_what_recomputation_keeps(
    form: str, dropout: float, with_documents: bool, precision: str, every: int, mode: str
) -> None:
    config = GPTConfig(**{**FORMS[form], "num_layers": 5, "dropout": dropout})
    recompute = RecomputeConfig(mode, every)  # type: ignore[arg-type]
    model = built(GPT(config), precision)
    apply_recompute(model, recompute)
    tokens_BT = torch.randint(V, (B, T))
    arguments = {"tokens_BT": tokens_BT, "labels_BT": tokens_BT, "dropout_keys_B": torch.arange(B)}
    if with_documents:
        arguments["documents_BT"] = (torch.arange(T) // 20).expand(B, T)

    def loss() -> torch.Tensor:
        with autocast(precision):
            return model(**arguments)

    numbers = NUMBERS[precision]
    expected = kept_by(config, numbers, B, T, document_mask=with_documents, recompute=recompute)
    expected += B * T * config.hidden_size * numbers.compute + 4 * V * config.hidden_size
    if precision == "autocast":
        expected += kept_copies(config, recompute)
        if mode != "none":  # no block is at work between the passes
            expected -= kept_copies(replace(config, num_layers=1))
    assert allocated(loss).kept == pytest.approx(expected, rel=0.05)


PRESETS = sorted(
    path
    for path in (CONF / "model").glob("*.yaml")
    if path.stem.startswith(("gpt", "llama", "bert", "roberta", "xlnet", "transformer", "t5", "bart"))
)


@pytest.mark.in_turns(3)
@pytest.mark.parametrize(
    ("path", "tensor"),
    [(path, tensor) for path in PRESETS for tensor in (1, 2, 4) if preset(path).kv_heads % tensor == 0],
    ids=lambda value: value.stem if isinstance(value, Path) else str(value),
)
def test_parameters_of_each_step_and_stage(path: Path, tensor: int) -> None:
    """Against real modules on the meta device, divided by the family's table; every preset, so that heads,
    vocabularies and biases of all kinds are met."""
    config = replace(preset(path), num_layers=5)
    if config.vocab_size is None:
        config = replace(config, vocab_size=8191)
    with torch.device("meta"):
        model: Any = family_of(config).build(config)
    shape = Layout(tensor, 1, tensor, 1, 1, 0, 1, 1, 1, 16)
    mesh: Any = SimpleNamespace(layout=shape, coordinates=shape.coordinates(tensor - 1))
    table = family_of(config).sharding
    assert table is not None
    shard_tensors(model, table(config), mesh)
    counts = [
        sum(p.numel() for module in stage.modules.values() for p in module.parameters())
        for stage in model.stages()
    ]
    assert config.step_parameter_counts(tensor) == counts
    assert config.largest_parameter_count(tensor) == max(p.numel() for p in model.parameters())
    steps = range(len(counts))
    assert held_parameter_count(config, shape, steps) == sum(p.numel() for p in model.parameters())
    for by in ("parameters", "time"):
        pipelined = replace(shape, world_size=3 * tensor, pipeline=3, balance=by)
        for run, stage in built_and_planned(model, pipelined):
            assert len(run) == len(stage.steps)
            assert held_parameter_count(config, pipelined, run) == parameter_count(stage)


def built_and_planned(model: Any, layout: Layout) -> list[tuple[range, PipelineStage]]:
    """Of each stage, the steps that the plan counts and what the engine would build."""
    stages = []
    for number in range(layout.pipeline):
        rank = number * layout.world_size // layout.pipeline
        mesh: Any = SimpleNamespace(layout=layout, coordinates=layout.coordinates(rank))
        stages.append(PipelineStage(model, mesh))
    return list(zip(stage_steps(model.config, layout), stages, strict=True))


def parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_largest_of_16_stages_of_llama_3() -> None:
    """Embedding and head share their stages with blocks."""
    config = preset(CONF / "model" / "llama3_8b.yaml")
    with torch.device("meta"):
        model = family_of(config).build(config)
    shape = Layout(16, 1, 1, 16, 1, 1, 1, 1, 1, 8192)
    stages = built_and_planned(model, shape)
    counts = [held_parameter_count(config, shape, run) for run, _ in stages]
    assert counts == [parameter_count(stage) for _, stage in stages]
    assert max(counts) == 128_256 * 4096 + 218_112_000 + 4096


@pytest.mark.parametrize("config", [LSTMConfig(vocab_size=300, hidden_size=32), SimpleCNNConfig()])
def test_largest_parameter_of_other_families(config: Any) -> None:
    with torch.device("meta"):
        model = family_of(config).build(config)
    assert config.largest_parameter_count() == max(p.numel() for p in model.parameters())


GPT_1B = GPTConfig(vocab_size=50257, hidden_size=2048, num_layers=24, num_heads=16)


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


def test_tensor_parallelism_divides_matrices_and_what_they_make() -> None:
    one, four = of_layout(), of_layout(tensor=4)
    assert one.optimizer / 4 < four.optimizer < 1.01 * one.optimizer / 4
    assert one.activations / 4 < four.activations < 0.55 * one.activations
    shared = of_layout(tensor=4, tensor_sequence=True)
    assert shared.activations < four.activations
    assert shared.optimizer == four.optimizer


def test_sequence_parallelism_divides_tokens_and_zero_shards_over_it() -> None:
    one, four = of_layout(zero=3, data=2), of_layout(zero=3, data=2, sequence=4)
    assert four.optimizer == pytest.approx(one.optimizer / 4, rel=1e-6)
    assert of_layout(zero=3, data=8).optimizer == four.optimizer
    assert four.activations == one.activations / 4


def test_only_documents_that_no_kernel_takes_one_by_one_have_a_mask() -> None:
    """On a GPU, where the kernel is: each layer keeps the mask in its own type, T numbers a token."""

    def kept(compute: int, document_mask: bool, **settings: Any) -> int:
        model = GPTConfig(**{**GPT2_FORM, "hidden_size": 96, "num_heads": 4, **settings})
        conditions = Conditions("cuda", document_mask, exact_dropout=False)
        return memory_of(model, Numbers(compute, 4), B, T, conditions).activations(all_steps(model)).kept

    def mask(compute: int, **settings: Any) -> int:
        return kept(compute, True, **settings) - kept(compute, False, **settings)

    layers = GPT2_FORM["num_layers"] * B * T * T
    assert mask(2) == 0
    assert mask(4) == layers * 4
    assert mask(2, dropout=0.1) == layers * 2
    assert mask(2, num_heads=8) == layers * 2  # heads of 12


def test_the_stage_that_holds_most_is_planned() -> None:
    """The first has most micro-batches in flight; where activations are few, the last has the head."""
    one, four = of_layout(zero=1), of_layout(zero=1, pipeline=4)
    assert 0.7 * one.activations < four.activations < one.activations, (
        "4 micro-batches of 5 or 6 blocks of 24"
    )
    assert four.logits == 0
    fewer = of_layout(zero=1, pipeline=4, accumulation=2)
    assert fewer.activations < 0.6 * four.activations
    recomputing = of_layout("full", zero=1, pipeline=4, accumulation=1)
    assert recomputing.logits > 0


def test_recomputation_modes_in_order() -> None:
    none, selective, full, offload = (
        of_layout(mode).activations for mode in ("none", "selective", "full", "offload")
    )
    assert none > selective > full > offload
    assert full < of_layout("full", every=4).activations < none
    inputs = 24 * 1024 * 2048 * 4
    assert full - offload == inputs, "on a GPU the inputs of blocks are elsewhere"
    assert of_layout("full").weights < of_layout().weights, "weights in the low precision, block by block"


def test_what_is_offloaded_takes_no_memory_of_a_gpu() -> None:
    at_hand = of_layout(zero=3, data=4)
    optimizer = of_layout(zero=3, data=4, offload_optimizer="cpu")
    assert (optimizer.optimizer, optimizer.gradients, optimizer.weights) == (0, 0, at_hand.weights)
    assert of_layout(zero=3, data=4, offload_parameters="cpu").weights == 0
    on_cpu = memory_per_process(
        GPT_1B,
        row_of(GPT_1B, 16),
        replace(layout(zero=3, data=4), offload_optimizer="cpu"),
        precision="bf16",
        optimizer=OptimizerConfig(),
        conditions=Conditions("cpu"),
    )
    assert on_cpu.optimizer == at_hand.optimizer, "a cpu's memory is the host's"
    copied = of_layout(zero=3, data=4, hierarchical_partition=2)
    assert copied.weights == at_hand.weights + GPT_1B.parameter_count()


def test_copy_of_an_asynchronous_checkpoint() -> None:
    def copied(device: str, zero: int, asynchronous: bool = True) -> int:
        return memory_per_process(
            GPT_1B,
            row_of(GPT_1B, 16),
            layout(zero=zero, data=4),
            precision="bf16",
            optimizer=OptimizerConfig(),
            conditions=Conditions(device),
            asynchronous_checkpoints=asynchronous,
        ).checkpoint_copy

    assert copied("cpu", 1) == 12 * GPT_1B.parameter_count() // 4
    assert copied("cpu", 0) == 12 * GPT_1B.parameter_count() // 4
    assert copied("cuda", 1) == copied("cpu", 1, asynchronous=False) == 0


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
