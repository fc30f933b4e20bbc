"""Memory that is saved, moved to the host, or copied: recomputation, offload, checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llmtrain.checkpoint.config import MemoryConfig
from llmtrain.nn.memory import Conditions
from llmtrain.optim.config import OptimizerConfig
from llmtrain.plan.memory import memory_per_process, saved_bytes
from tests.support.planned_memory import (
    GPT_1B,
    layout,
    of_layout,
)
from tests.support.presets import row_of


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
    def copied(device: str, zero: int, asynchronous: bool = True, in_memory: int = 0) -> int:
        return memory_per_process(
            GPT_1B,
            row_of(GPT_1B, 16),
            layout(zero=zero, data=4),
            precision="bf16",
            optimizer=OptimizerConfig(),
            conditions=Conditions(device),
            asynchronous_checkpoints=asynchronous,
            state_copies=in_memory,
        ).checkpoint_copy

    of_rank = saved_bytes(GPT_1B, layout(zero=1, data=4), 2, None)
    copies = MemoryConfig(every=5).copies
    assert copied("cpu", 1, in_memory=copies) == (1 + 5) * of_rank
    assert MemoryConfig(every=5, dir=Path("/nvme")).copies == 1, "the buffer alone"
    assert MemoryConfig().copies == copied("cuda", 1, in_memory=copies) == 0
    assert copied("cpu", 1) == of_rank
    assert copied("cpu", 1) == 12 * GPT_1B.parameter_count() // 4
    assert copied("cpu", 0) == 12 * GPT_1B.parameter_count() // 4
    assert copied("cuda", 1) == copied("cpu", 1, asynchronous=False) == 0
