"""What a family of models is to the rest of the system. Free of torch: modules are imported when built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from llmtrain.nn.memory import ModelMemory
from llmtrain.nn.model_config import ModelConfig
from llmtrain.nn.sharding import Table

if TYPE_CHECKING:
    from torch import nn

    from llmtrain.models.huggingface.form import Form
    from llmtrain.tokenizers.base import Tokenizer

Kind = Literal["decoder", "encoder", "permuted_encoder", "encoder_decoder", "classifier"]
"""What a model's forward takes and gives, by which objectives find the models that they can teach:

- decoder: tokens → logits of each next token;
- encoder: tokens → logits of each token, seen from both sides;
- permuted_encoder: tokens in an order, and which to predict → logits of these;
- encoder_decoder: a source, and a target's beginning → logits of each next token of the target;
- classifier: images → logits of classes.
"""


class Filling(NamedTuple):
    """How a model that fills blanks reads a prompt."""

    mask_id: int | None
    """The id that stands for a blank; None: the model is told which positions to predict."""
    first_ids: list[int]
    last_ids: list[int]
    """Ids before and behind every prompt."""


@dataclass(frozen=True)
class Family:
    """One model with its config, and what can be done with it. Its name is its config's `family`."""

    config: type[ModelConfig]
    kind: Kind
    build: Callable[[Any], nn.Module]
    """Config → module."""
    objective: Callable[[Any], Mapping[str, Any]]
    """Config → the `objective` section where a run names none."""
    sharding: Callable[[Any], Table] | None = None
    """Config → what tensor parallelism divides; None: the model cannot be divided."""
    memory: type[ModelMemory] | None = None
    """Memory of activations and head, for plans; None: plans count neither."""
    has_stages: bool = False
    """Its forward is `stages()`, which pipelines divide, over `blocks`, which can be recomputed."""
    shares_sequences: bool = False
    """Attention alone mixes its tokens, and its head takes each by itself, so that ranks can share a
    sequence."""
    huggingface: Callable[[], tuple[Form, ...]] = tuple
    """→ the architectures of transformers that it reads and writes, the first that fits is written."""
    filling: Callable[[Any, Tokenizer], Filling] | None = None
    """(config, tokenizer) → how it fills blanks; None: it does not."""
    presets: Path | None = None
    """Of a family outside the package: a folder with `model/NAME.yaml`, which Hydra searches after conf/."""

    @property
    def name(self) -> str:
        return str(self.config.__dataclass_fields__["family"].default)  # type: ignore[attr-defined]

    @property
    def axes(self) -> frozenset[str]:
        """Axes besides data that the family can be divided over."""
        has = {
            "tensor": self.sharding is not None,
            "pipeline": self.has_stages,
            "sequence": self.shares_sequences,
        }
        return frozenset(axis for axis, can in has.items() if can)
