"""A process that starts holds about its share, never the whole model: measured, as the peak of its memory
while the engine is built."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import pytest

from tests.support import ranks
from tests.support.training import compose

pytestmark = pytest.mark.slow

RANKS = 4
# 92 million parameters: 351 MiB in fp32.
MODEL = ("model=gpt2_124m", "model.vocab_size=8192", "batch.sequence_length=32", "batch.micro_size=1")
SMALL = ("model=gpt_tiny", *MODEL[1:])


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def start_peak(overrides: list[str]) -> tuple[int, int]:
    """(bytes that this rank grew by at most while its engine was built, parameters of the whole model)."""
    import torch

    from llmtrain.engine.build import build_engine
    from llmtrain.train.resolve import resolve

    resolved = resolve(compose([*overrides, "batch.global_size=8"]), data_optional=True)
    config = resolved.config
    objective = config.objective.build(config.model, config.data, resolved.corpora)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = status("VmRSS")
    build_engine(config, resolved.layout, torch.device("cpu"), objective, None)
    return status("VmHWM") - before, config.model.parameter_count()


@pytest.mark.in_turns(3)
@pytest.mark.parametrize(
    ("overrides", "bytes_per_parameter"),
    [
        (["parallel.tensor=4"], 4),
        # Weights, gradients, masters and Adam's two moments, which DeepSpeed makes at once.
        (["parallel.zero=3"], 20),
        (["parallel.zero=3", "precision=bf16"], 2 + 4 + 4 + 4 + 4),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_peak_is_the_share(overrides: list[str], bytes_per_parameter: int):
    ranks.run(RANKS, start_peak, [*SMALL, *overrides])  # imports are not the model's
    for peak, parameters in ranks.run(RANKS, start_peak, [*MODEL, *overrides]):
        share = bytes_per_parameter * parameters / RANKS
        # Allocators and gloo's buffers swing by tens of MiB; the whole would be four times the share.
        assert 0.7 * share < peak < 1.5 * share, (peak / 2**20, share / 2**20)
