"""A family of models outside llmtrain, as another package would bring it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain.models.family import Family

from .config import ToyConfig

if TYPE_CHECKING:
    from torch import nn

    from llmtrain.models.huggingface.form import Form


def _build(config: ToyConfig) -> nn.Module:
    from .model import Toy

    return Toy(config)


def _huggingface() -> tuple[Form, ...]:
    from .huggingface import FORM

    return (FORM,)


TOY = Family(
    ToyConfig,
    "decoder",
    _build,
    lambda config: {"kind": "causal_lm"},
    huggingface=_huggingface,
    presets=Path(__file__).parent / "conf",
)
