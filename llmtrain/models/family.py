"""What the rest of the system needs to know of a model family. Free of torch: modules are imported when
built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from llmtrain.nn.memory import ModelMemory
from llmtrain.nn.model_config import ModelConfig
from llmtrain.nn.sharding import Table
from llmtrain.nn.task_config import Pooling

if TYPE_CHECKING:
    from torch import nn

    from llmtrain.models.huggingface.form import Form
    from llmtrain.tokenizers.base import Frame, Tokenizer

Kind = Literal["decoder", "encoder", "permuted_encoder", "encoder_decoder", "classifier", "generator"]
"""Inputs and outputs of a model's forward, by which objectives select the models that they can train:

- decoder: tokens → logits of each next token;
- encoder: tokens → logits of each token, with context from both sides;
- permuted_encoder: tokens in an order, and positions to predict → logits of these;
- encoder_decoder: a source, and the beginning of a target → logits of each next target token;
- classifier: images, or rows of numbers → logits of classes;
- generator: noise → images; it has a discriminator beside it.
"""


class PooledHead(NamedTuple):
    """The usual head of a family over a whole text."""

    pooling: Pooling = "last"
    dense: bool = False
    bias: bool = True


class Filling(NamedTuple):
    """How a model that fills in masked tokens reads a prompt."""

    mask_id: int | None
    """Id of a masked token; None: the model is given the positions to predict."""
    first_ids: list[int]
    last_ids: list[int]
    """Ids before and after each prompt."""


@dataclass(frozen=True)
class Family:
    """A model family: its config, its module, and what can be done with it. Its name is the `family` of
    its config."""

    config: type[ModelConfig]
    kind: Kind
    build: Callable[[Any], nn.Module]
    """Config → module."""
    objective: Callable[[Any], Mapping[str, Any]]
    """Config → the default `objective` section."""
    sharding: Callable[[Any], Table] | None = None
    """Config → how tensor parallelism divides the model; None: it cannot be divided."""
    memory: type[ModelMemory] | None = None
    """Memory estimate of activations and head; None: plans count neither."""
    has_stages: bool = False
    """Whether its forward is `stages()`, which pipelines divide, over `blocks`, which can be recomputed."""
    shares_sequences: bool = False
    """Whether tokens interact only in attention, so that ranks can share a sequence (sequence
    parallelism)."""
    huggingface: Callable[[], tuple[Form, ...]] = tuple
    """Return the architectures of transformers that it reads and writes; the first that fits is written."""
    filling: Callable[[Any, Tokenizer], Filling] | None = None
    """(config, tokenizer) → how it reads a prompt with masked tokens; None: it cannot fill them in."""
    frame: Callable[[Any, Tokenizer], Frame] | None = None
    """(config, tokenizer) → the special tokens around one text and two, where the tokenizer has none of its
    own; None: none but eos between two texts."""
    pooled: PooledHead = field(default_factory=PooledHead)
    """The head of a fine-tuning task over a whole text."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Module of a task head → the module of a pre-trained model that it starts from."""
    presets: Path | None = None
    """Of a family outside the package: a folder with `model/NAME.yaml`, which Hydra searches after conf/."""

    @property
    def name(self) -> str:
        return str(self.config.__dataclass_fields__["family"].default)  # type: ignore[attr-defined]

    @property
    def reads_tokens(self) -> bool:
        """Return whether its models read tokens of a vocabulary."""
        return self.kind not in ("classifier", "generator")

    @property
    def continues_texts(self) -> bool:
        """Return whether its models predict each next token of a text."""
        return self.kind == "decoder"

    @property
    def reads_sources(self) -> bool:
        """Return whether its models read a source and write a target."""
        return self.kind == "encoder_decoder"

    @property
    def axes(self) -> frozenset[str]:
        """Return the axes besides data that the model can be divided along."""
        has = {
            "tensor": self.sharding is not None,
            "pipeline": self.has_stages,
            "sequence": self.shares_sequences,
        }
        return frozenset(axis for axis, can in has.items() if can)
