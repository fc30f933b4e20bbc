"""Recomputation changes what is kept, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmtrain.config import decode
from llmtrain.errors import ConfigError
from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.gpt.model import GPT
from llmtrain.nn.attention_blocks import BlockwiseAttention
from llmtrain.nn.dropout import sample_keys
from llmtrain.nn.initialize import initialize
from llmtrain.nn.recompute_config import RecomputeConfig
from llmtrain.parallel.recompute import apply_recompute
from llmtrain.train.resolve import resolve
from tests.support import ranks
from tests.support.memory import Allocated, allocated
from tests.support.training import TINY_GPT, compose

B, T, V = 3, 160, 61
"""160 tokens are two blocks of attention."""
GPT2_FORM: dict[str, Any] = {
    "vocab_size": V,
    "max_sequence_length": T,
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 4,
}
LLAMA_FORM: dict[str, Any] = {
    **GPT2_FORM,
    "num_kv_heads": 2,
    "mlp_hidden_size": 72,
    "norm": "rmsnorm",
    "positions": "rope",
    "activation": "silu",
    "gated_mlp": True,
    "bias": False,
    "tie_embeddings": False,
}
FORMS = {"gpt2": GPT2_FORM, "llama": LLAMA_FORM}
MODES = ("selective", "full", "offload")


def built(form: dict[str, Any], mode: str = "none", every: int = 1) -> GPT:
    model = GPT(GPTConfig(**form))
    initialize(model, 0)
    apply_recompute(model, RecomputeConfig(mode, every))  # type: ignore[arg-type]
    return model.train()


def autocast(precision: str) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()


def inputs(documents: bool = False, keyed: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(V, (B, T), generator=generator)
    arguments = {"tokens_BT": tokens_BT, "labels_BT": tokens_BT.roll(-1, 1)}
    if documents:
        arguments["documents_BT"] = (torch.arange(T) // 45).expand(B, T)
    if keyed:
        arguments["dropout_keys_B"] = sample_keys(0, range(B))
    return arguments


def loss_and_gradients(
    model: nn.Module, arguments: dict[str, Tensor], precision: str = "fp32"
) -> tuple[Tensor, dict[str, Tensor]]:
    """And one draw from torch's generator afterwards: recomputing must leave it where it was."""
    torch.manual_seed(5)
    with autocast(precision):
        loss = model(**arguments)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), {**gradients, "draw": torch.rand(2)}


@pytest.mark.in_turns(3)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("dropout", ["none", "keyed", "generator"])
@pytest.mark.parametrize("form", FORMS)
def test_losses_and_gradients_are_equal_bit_by_bit(
    form: str, dropout: str, documents: bool, precision: str
) -> None:
    settings = {**FORMS[form], "dropout": 0.0 if dropout == "none" else 0.2}
    arguments = inputs(documents, keyed=dropout == "keyed")
    loss, gradients = loss_and_gradients(built(settings), arguments, precision)
    for mode in MODES:
        found_loss, found = loss_and_gradients(built(settings, mode), arguments, precision)
        assert torch.equal(found_loss, loss), mode
        assert found.keys() == gradients.keys()
        different = [name for name in gradients if not torch.equal(found[name], gradients[name])]
        assert not different, mode


def test_backward_inside_autocast() -> None:
    """Weights that autocast cached without gradients must not be taken for those with."""
    found = []
    for mode in ("none", *MODES):
        model = built(GPT2_FORM, mode)
        with autocast("bf16"):
            model(**inputs()).backward()
        found.append(model.blocks[1].mlp.up.weight.grad)
    assert all(torch.equal(gradient, found[0]) for gradient in found)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("every", "recomputed"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (4, [0, 4])])
def test_every_kth_block_is_recomputed(mode: str, every: int, recomputed: list[int]) -> None:
    model = built({**GPT2_FORM, "num_layers": 5}, mode, every)
    calls = [0] * 5
    for number, block in enumerate(model.blocks):
        block.mlp_norm.register_forward_hook(
            lambda *_, number=number: calls.__setitem__(number, calls[number] + 1)
        )
    model(**inputs()).backward()
    assert calls == [2 if number in recomputed else 1 for number in range(5)]


@pytest.mark.parametrize("mode", MODES)
def test_names_and_types_stay(mode: str) -> None:
    plain, model = built(GPT2_FORM), built(GPT2_FORM, mode)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_recomputed_without_gradients_or_with_a_cache(mode: str) -> None:
    model = built(GPT2_FORM, mode)
    tokens_BT = inputs()["tokens_BT"]
    calls: list[int] = []
    model.blocks[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        whole = model(tokens_BT)
    cache = model.new_cache(T)
    with_cache = model(tokens_BT, cache=cache)
    with_cache.sum().backward()  # a second run would find the cache full
    assert torch.equal(with_cache, whole)
    assert len(calls) == 2


@pytest.mark.parametrize("mode", MODES)
def test_attention_keeps_nothing(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own autograd function saves probabilities; recomputed, they are not there between the passes."""
    alive: list[Any] = []
    original = BlockwiseAttention.forward

    def forward(ctx: Any, *arguments: Any) -> Tensor:
        y = original(ctx, *arguments)
        alive.extend(
            torch.multiprocessing.reductions.StorageWeakRef(p.untyped_storage()) for p in ctx.to_save or ()
        )
        return y

    monkeypatch.setattr(BlockwiseAttention, "forward", staticmethod(forward))
    for name, expected in (("none", 3 * 5), (mode, 0)):
        alive.clear()
        loss = built(GPT2_FORM, name)(**inputs())
        assert len(alive) == (0 if name == "offload" else 3 * 5), "offload runs without gradients first"
        assert sum(not storage.expired() for storage in alive) == expected
        loss.backward()


class ChangesInPlace(nn.Linear):
    """As DeepSpeed's linear layer under ZeRO 3, and as a sum over a tensor group after a product."""

    def forward(self, x: Tensor) -> Tensor:
        return _ChangesInPlace.apply(x, self.weight, self.bias)


class _ChangesInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = x.matmul(weight.t())
        y += bias
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        (gradient,) = gradients
        return gradient @ weight, gradient.flatten(0, 1).T @ x.flatten(0, 1), gradient.sum((0, 1))


def test_outputs_that_are_changed_in_place() -> None:
    def model(mode: str) -> GPT:
        model = built(GPT2_FORM)
        for block in model.blocks:
            for linear in (block.attention.qkv, block.mlp.up, block.mlp.down):
                linear.__class__ = ChangesInPlace
                nn.init.constant_(linear.bias, 0.3)
        apply_recompute(model, RecomputeConfig(mode))  # type: ignore[arg-type]
        return model

    loss, gradients = loss_and_gradients(model("none"), inputs())
    for mode in MODES:
        found_loss, found = loss_and_gradients(model(mode), inputs())
        assert torch.equal(found_loss, loss)
        assert all(torch.equal(found[name], gradients[name]) for name in gradients), mode


@pytest.mark.in_turns(4)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_kept_gets_less_and_less(form: str, precision: str) -> None:
    def measured(mode: str, every: int = 1) -> Allocated:
        model = built({**FORMS[form], "num_layers": 6}, mode, every)

        def loss() -> Tensor:
            with autocast(precision):
                return model(**inputs(documents=True))

        return allocated(loss)

    none, selective, full, offload = (measured(mode) for mode in ("none", *MODES))
    half = measured("full", every=2)
    assert none.kept > 1.5 * selective.kept
    assert selective.kept > 1.5 * full.kept
    assert full.kept < half.kept < none.kept
    assert offload.kept <= 1.01 * full.kept
    assert none.peak > selective.peak > full.peak


PEAKS_OF_PROCESSES = """
import os
import sys
from pathlib import Path

import torch

from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.gpt.model import GPT
from llmtrain.nn.initialize import initialize
from llmtrain.nn.recompute_config import RecomputeConfig
from llmtrain.parallel.recompute import apply_recompute

def resident(line):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(line + ":")[1].split()[0])

def peak(mode):
    model = GPT(GPTConfig(vocab_size=64, max_sequence_length=256, hidden_size=64, num_layers=12, num_heads=4))
    initialize(model, 0)
    apply_recompute(model, RecomputeConfig(mode))
    tokens = torch.zeros(8, 256, dtype=torch.long)
    model(tokens[:1, :8], labels_BT=tokens[:1, :8]).backward()  # libraries are loaded by the first use
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    model(tokens, labels_BT=tokens).backward()
    return resident("VmHWM") - before

torch.set_num_threads(1)
for mode in sys.argv[1:]:
    if os.fork() == 0:  # each has a heap that nothing was freed from, and what was imported is shared
        print(mode, peak(mode), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.slow
def test_memory_of_a_process() -> None:
    """About 175 MB of activations."""
    # Large blocks go back to the kernel at once: the allocator's own fragments are not the subject.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", PEAKS_OF_PROCESSES, "none", *MODES]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    peaks = {mode: int(peak) for mode, peak in map(str.split, done.stdout.splitlines())}
    assert set(peaks) == {"none", *MODES}
    assert peaks["none"] > 125 * 2**20
    assert peaks["selective"] < 0.7 * peaks["none"]
    assert peaks["full"] < 0.7 * peaks["selective"]
    assert peaks["offload"] < 0.7 * peaks["selective"]


def zero_3_losses(mode: str) -> list[tuple[float, float]]:
    """Loss and gradient norm of steps under DeepSpeed, every weight sharded."""
    from llmtrain.parallel.upstream import import_deepspeed

    model = built({**GPT2_FORM, "dropout": 0.1}, mode)
    nn.init.constant_(model.blocks[0].mlp.up.bias, 0.3)
    engine, *_ = import_deepspeed().initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
        config={
            "train_micro_batch_size_per_gpu": B,
            "gradient_clipping": 1.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        },
        dist_init_required=False,
    )
    found = []
    for _ in range(2):
        loss = engine(**inputs(documents=True, keyed=True))
        engine.backward(loss)
        engine.step()
        found.append((loss.item(), float(engine.get_global_grad_norm())))
    return found


@pytest.mark.slow
def test_under_zero_3() -> None:
    expected = ranks.run(2, zero_3_losses, "none")
    for mode in MODES:
        assert ranks.run(2, zero_3_losses, mode) == expected, mode


LAYOUTS = (
    "parallel.tensor=2",
    "parallel.tensor=2 parallel.tensor_sequence=true precision=bf16",
    "parallel.sequence=2",
    "parallel.pipeline=2 parallel.zero=1",
    "parallel.zero=3 precision=bf16",
)


def steps_of_layout(mapping: dict[str, Any]) -> list[tuple[float, float]]:
    """Loss and gradient norm of steps, made as `llmtrain train` makes them of a composed configuration."""
    import numpy as np

    from llmtrain.data.loader import MicroBatch
    from llmtrain.distributed import processes
    from llmtrain.engine.build import build_engine
    from llmtrain.objectives.causal_lm import CausalLM

    resolved = resolve(mapping, processes.world_size(), data_optional=True)
    engine = build_engine(resolved.config, resolved.layout, torch.device("cpu"), CausalLM(), None)
    generator = torch.Generator().manual_seed(engine.mesh.coordinates.data)
    found = []
    for step in range(2):
        micro_batches = []
        for i in range(resolved.layout.accumulation):
            tokens = torch.randint(60, (2, 32), generator=generator)
            samples = np.array([20 * step + 2 * i, 20 * step + 2 * i + 1])
            micro_batches.append(MicroBatch({"tokens": tokens, "labels": tokens}, range(2), samples))
        result = engine.train_step(micro_batches, lr=1e-3)
        found.append((result.loss, result.grad_norm))
    return found


@pytest.mark.in_turns(4)
@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_every_layout(layout: str) -> None:
    settings = [*TINY_GPT, "model.vocab_size=60", "model.dropout=0.1", *layout.split()]
    found = {
        mode: ranks.run(2, steps_of_layout, compose([*settings, f"recompute={mode}"]))
        for mode in ("none", *MODES)
    }
    for mode in MODES:
        assert found[mode] == found["none"], mode


def test_config() -> None:
    assert decode(RecomputeConfig, {"mode": "full", "every": 2}) == RecomputeConfig("full", 2)
    with pytest.raises(ConfigError, match=r"every: got 0; allowed: 1 or more"):
        decode(RecomputeConfig, {"mode": "full", "every": 0})
    with pytest.raises(ConfigError, match=r"mode: got 'ful'"):
        decode(RecomputeConfig, {"mode": "ful"})


@pytest.mark.parametrize("mode", ["none", *MODES])
def test_groups_compose(mode: str) -> None:
    mapping = compose([f"recompute={mode}", "data.path=nowhere"])
    assert decode(RecomputeConfig, mapping["recompute"]) == RecomputeConfig(mode)  # type: ignore[arg-type]


def test_a_family_without_blocks_is_refused() -> None:
    mapping = compose(["model=lstm", "recompute=full", "data.path=nowhere"])
    with pytest.raises(ConfigError, match=r"recompute\.mode: got full with model\.family=lstm"):
        resolve(mapping, 1, data_optional=True)
