"""Every family on the device and on the CPU: the same weights, batch and masks of dropout."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llmtrain.engine.modules import ObjectiveModule, autocast, to_device
from llmtrain.interchange.trained import build_module
from llmtrain.models.convolutional.config import SimpleCNNConfig
from llmtrain.nn.dropout import sample_keys
from llmtrain.nn.initialize import initialize
from llmtrain.objectives.base import DROPOUT_KEYS, Batch
from llmtrain.objectives.image_classification import ImageClassification
from llmtrain.train.resolve import resolve
from tests.gpu.runs import distance, family_overrides, no_tf32, objective_of
from tests.gpu.table import Row, judged
from tests.parity.matrix import FAMILIES
from tests.support.training import compose, open_loader

TOLERANCES = {"fp32": (1e-5, 1e-4, 1e-3), "bf16": (5e-3, 2e-2, 0.15)}
"""Relative, of the loss, of logits and of gradients (norm of the difference), against fp32 on the CPU. fp32
adds up in another order; bf16 keeps three digits, and turns some ReLUs and pools another way."""

Outcome = tuple[float, list[torch.Tensor], list[torch.Tensor]]
"""Loss, logits, gradients."""


def check(device: str, folder: Path) -> Iterator[Row]:
    no_tf32()
    for family in FAMILIES:
        for dropout in (0.0, 0.1):
            settings = family_overrides(family, device, folder)
            resolved = resolve(compose([*settings, f"model.dropout={dropout}"]))
            model = build_module(resolved.config.model, torch.device("cpu"))
            initialize(model, seed=7)
            micro = next(iter(open_loader(resolved).steps(0))).micro_batches[0]
            batch = micro.batch
            if dropout > 0:
                batch = {**batch, DROPOUT_KEYS: sample_keys(7, list(micro.samples))}
            name = f"{family}, dropout {dropout}" if dropout else family
            yield from _rows(name, model, objective_of(resolved), batch, device)
    cnn = build_module(SimpleCNNConfig(dropout=0.0), torch.device("cpu"))
    initialize(cnn, seed=7)
    # Seeded: how many pools turn another way in bf16 depends on the images.
    drawn = torch.rand(16, 1, 28, 28, generator=torch.Generator().manual_seed(7))
    images = {"images": drawn, "labels": torch.arange(16) % 10}
    yield from _rows("CNN", cnn, ImageClassification(), images, device)


def _rows(name: str, model: Any, objective: Any, batch: Batch, device: str) -> Iterator[Row]:
    loss, logits, gradients = _outcome(model, objective, batch, "cpu", "fp32")
    for precision, tolerances in TOLERANCES.items():
        found = _outcome(copy.deepcopy(model).to(device), objective, batch, device, precision)
        apart = (abs(found[0] / loss - 1), distance(found[1], logits), distance(found[2], gradients))
        good = all(a <= most for a, most in zip(apart, tolerances, strict=True))
        named = zip(("loss", "logits", "gradients"), apart, tolerances, strict=True)
        detail = ", ".join(f"{what} {a:.1e} (at most {most:g})" for what, a, most in named)
        yield judged("parity", f"{name}, {precision}", good, detail)


def _outcome(model: Any, objective: Any, batch: Batch, device: str, precision: Any) -> Outcome:
    place = torch.device(device)
    there = to_device(batch, place)
    model.zero_grad(set_to_none=True)
    model.train()
    loss_sum, num_targets, *_ = ObjectiveModule(model, objective, autocast(precision, place))(there)
    loss = loss_sum / num_targets
    loss.backward()
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    model.eval()
    with torch.no_grad(), autocast(precision, place):
        if "images" in there:
            logits = model(there["images"])
        else:
            arguments = objective.arguments(there)
            logits = model(**{name: value for name, value in arguments.items() if "labels" not in name})
    return float(loss.detach()), [logits], gradients
