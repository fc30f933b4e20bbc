"""fp16: an overflow skips the step and halves the scale, and training then goes on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from llmtrain.engine.local import LocalEngine
from tests.gpu.runs import engine_of, family_overrides
from tests.gpu.table import Row, judged

TOO_LARGE = 2.0**60
"""A scale with which no gradient fits into fp16."""


def check(device: str, folder: Path) -> Iterator[Row]:
    plain, loader = engine_of(family_overrides("GPT-2 form", device, folder))
    # Past the layout, which refuses fp16 on a CPU.
    engine = LocalEngine(replace(plain.setup, precision="fp16"))
    steps = loader.steps(0)
    first = engine.train_step(next(steps).micro_batches, lr=1e-3)
    usual = engine.scaler_state()
    detail = f"loss {first.loss:.3f}, gradient norm {first.grad_norm:.3f}, scale {usual['scale']:g}"
    yield judged("scaler", "a step in fp16", not first.skipped, detail)

    before = [p.detach().clone() for p in engine.model.parameters()]
    refused = engine.train_step(next(steps).micro_batches, lr=1e-3, accepts=lambda loss, norm: False)
    kept = all(torch.equal(p, was) for p, was in zip(engine.model.parameters(), before, strict=True))
    good = refused.rejected and kept and engine.scaler_state() == usual
    yield judged("scaler", "a step that is refused", good, f"weights and scale as they were: {good}")

    engine.load_scaler_state({**usual, "scale": TOO_LARGE})
    asked: list[float] = []
    overflowed = engine.train_step(
        next(steps).micro_batches, lr=1e-3, accepts=lambda loss, norm: bool(asked.append(norm))
    )
    kept = all(torch.equal(p, was) for p, was in zip(engine.model.parameters(), before, strict=True))
    scale = engine.scaler_state()["scale"]
    # An overflow is part of finding the scale: no one is asked about it.
    good = overflowed.skipped and not asked and kept and scale == TOO_LARGE / 2
    detail = f"skipped: {overflowed.skipped}, weights as they were: {kept}, scale times {scale / TOO_LARGE:g}"
    yield judged("scaler", "an overflow", good, detail)

    engine.load_scaler_state(usual)
    losses = [engine.train_step(next(steps).micro_batches, lr=1e-3) for _ in range(3)]
    good = not any(result.skipped for result in losses) and losses[-1].loss < first.loss
    yield judged("scaler", "training goes on", good, f"loss {first.loss:.3f} to {losses[-1].loss:.3f}")
