"""The layers of an encoder-decoder, and the arguments that they share in a forward.

Layers pass on one tensor, with the positions of a row's sources before those of its targets: encoder layers
change the sources', decoder layers the targets'. Each layer is thus a function of the previous one's output,
as pipelines and recomputation need.

Dim names: B batch, S source tokens, T target tokens, U = S + T positions of both, D hidden width, N heads,
H head width, R rows selected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from llmtrain.models.encoder_decoder.config import Seq2SeqConfig
from llmtrain.nn.documents import CrossDocuments
from llmtrain.nn.dropout import HIDDEN, Dropout
from llmtrain.nn.norms import make_norm
from llmtrain.nn.relative import RelativePositions
from llmtrain.nn.transformer import (
    Block,
    Context,
    CrossAttention,
    KVCache,
)


@dataclass(frozen=True)
class PairContext(Context):
    """Arguments shared by all stages of a forward; those of Context refer to the targets."""

    sources: Tensor | None = None
    """Source ids, (B, S); None: the cache holds what is needed of them."""
    encoder: Context | None = None
    """Context of the sources."""
    crossing: CrossDocuments | None = None
    """Which sources each target sees; None: all of the row."""
    with_metrics: bool = False

    @property
    def num_sources(self) -> int:
        return 0 if self.sources is None else self.sources.shape[1]

    @property
    def num_states(self) -> int:
        """Return U."""
        return self.num_sources + self.positions.shape[1]


class SourceCache(KVCache):
    """Keys and values of the targets seen so far, and of the sources for each decoder layer, for
    generation."""

    def __init__(
        self,
        max_length: int,
        source_keys_values: list[tuple[Tensor, Tensor]],
        source_documents_BS: Tensor | None,
    ) -> None:
        super().__init__(len(source_keys_values), max_length)
        self.source_keys_values = source_keys_values
        """Keys and values of each layer, (B, N, S, H) each."""
        self.source_documents = source_documents_BS
        """0 for tokens, −1 for padding, (B, S); None: no padding."""

    def select(self, rows_R: Tensor) -> None:
        super().select(rows_R)
        self.source_keys_values = [(k[rows_R], v[rows_R]) for k, v in self.source_keys_values]
        if self.source_documents is not None:
            self.source_documents = self.source_documents[rows_R]


class EncoderBlock(Block):
    """A layer over the sources, which see each other."""

    def __init__(self, config: Seq2SeqConfig, layer: int, relative: RelativePositions | None) -> None:
        # Dropout masks depend on the layer number, so it must be unique: the decoder's layers come first.
        super().__init__(
            config.blocks,
            2 * config.decoder_layers + layer,
            norm_first=config.norm_first,
            causal=False,
            scale=_scale(config),
            relative=relative,
        )

    def forward(self, x_BUD: Tensor, context: Context) -> Tensor:
        context = cast(PairContext, context)
        if context.encoder is None:
            return x_BUD
        source_BSD, target_BTD = sides(x_BUD, context)
        return torch.cat((super().forward(source_BSD, context.encoder), target_BTD), dim=1)


class DecoderBlock(Block):
    """A layer over the targets, with cross-attention to the sources between self-attention and MLP."""

    def __init__(self, config: Seq2SeqConfig, layer: int, relative: RelativePositions | None) -> None:
        blocks, scale = config.blocks, _scale(config)
        super().__init__(blocks, layer, norm_first=config.norm_first, scale=scale, relative=relative)
        number = config.decoder_layers + layer
        self.layer = layer
        self.cross_attention_norm = make_norm(blocks)
        self.cross_attention = CrossAttention(blocks, number, scale=scale)
        self.cross_attention_dropout = Dropout(config.dropout, number, HIDDEN)

    def forward(self, x_BUD: Tensor, context: Context) -> Tensor:
        context = cast(PairContext, context)
        source_BSD, target_BTD = sides(x_BUD, context)
        target_BTD = self.with_attention(target_BTD, context)
        target_BTD = self.with_cross_attention(target_BTD, source_BSD, context)
        return torch.cat((source_BSD, self.with_mlp(target_BTD, context)), dim=1)

    def with_cross_attention(self, x_BTD: Tensor, source_BSD: Tensor, context: PairContext) -> Tensor:
        if isinstance(context.cache, SourceCache):
            keys_values = context.cache.source_keys_values[self.layer]
        else:
            keys_values = self.cross_attention.keys_and_values(source_BSD)
        return self.add(
            x_BTD,
            lambda x: self.cross_attention(x, keys_values, context.crossing, context.dropout_keys),
            self.cross_attention_norm,
            self.cross_attention_dropout,
            context,
        )


def sides(x_BUD: Tensor, context: PairContext) -> tuple[Tensor, Tensor]:
    """Split hidden states into those of sources and of targets, (B, S, D) and (B, T, D)."""
    S = context.num_sources
    source_BSD, target_BTD = x_BUD.split((S, x_BUD.shape[1] - S), dim=1)
    return source_BSD, target_BTD


def _scale(config: Seq2SeqConfig) -> float | None:
    return None if config.scale_attention else 1.0
