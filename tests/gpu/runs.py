"""Models, data and engines as the parts want them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.parity.matrix import FAMILIES, TRANSFORMER
from tests.support.corpora import prepare_small_corpus, prepare_small_pairs
from tests.support.training import compose, open_loader

WIDER = ("model.hidden_size=256", "batch.sequence_length=256")
"""On a GPU: large enough that its kernels are those of large models."""


def no_tf32() -> None:
    """fp32 with all its bits, also where a GPU would round what it multiplies."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def corpus(folder: Path, *, paired: bool = False) -> Path:
    """A small corpus that `llmtrain prepare` makes, once for all parts."""
    made = folder / "data" / ("paired" if paired else "prepared")
    if not (made / "manifest.json").exists():
        made.parent.mkdir(exist_ok=True)
        return prepare_small_pairs(made.parent) if paired else prepare_small_corpus(made.parent)
    return made


def family_overrides(family: str, device: str, folder: Path) -> tuple[str, ...]:
    """What `llmtrain train` is told for a small model of `family`."""
    path = corpus(folder, paired=family == TRANSFORMER)
    settings = FAMILIES[family] if device == "cpu" else (*FAMILIES[family], *WIDER)
    return (*settings, f"data.path={path}", "seed=7", "train.steps=20", f"device={device}")


def objective_of(resolved: Any) -> Any:
    from llmtrain.families import family_of

    return family_of(resolved.config.model).objective(resolved.config.model, resolved.config.data)


def engine_of(overrides: Sequence[str]) -> tuple[Any, Any]:
    """(engine, loader) as `llmtrain train` makes them."""
    from llmtrain.commands.build import build_engine
    from llmtrain.commands.resolve import resolve
    from llmtrain.distributed import processes

    resolved = resolve(compose(overrides))
    device = processes.pick_device(resolved.config.device)
    processes.start(device, single_process_group=resolved.config.engine == "deepspeed")
    engine = build_engine(resolved.config, resolved.layout, device, objective_of(resolved), None)
    return engine, open_loader(resolved)


def distance(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Of all numbers together, as a share of the expected ones' norm."""
    apart, norm = 0.0, 0.0
    for ours, theirs in zip(found, expected, strict=True):
        a, b = ours.detach().double().cpu(), theirs.detach().double().cpu()
        apart += float((a - b).square().sum())
        norm += float(b.square().sum())
    return float((apart / norm) ** 0.5)
