"""A toy language model.

Dim names: B batch, T sequence, D hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.nn.dropout import HIDDEN, Dropout
from llmtrain.nn.head import LanguageModelHead, TiedHeadModel, count_correct
from llmtrain.nn.initialize import Initializer, Normal

from .config import ToyConfig


class ToyCache:
    """The sum of the embeddings of the tokens seen so far, for generation."""

    def __init__(self) -> None:
        self.length = 0
        self.sum_BD: Tensor | None = None

    def select(self, rows_R: Tensor) -> None:
        if self.sum_BD is not None:
            self.sum_BD = self.sum_BD[rows_R]

    reorder = select


class Toy(TiedHeadModel):
    """Token ids → logits, or → the summed loss. `config.vocab_size` must be resolved."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("vocab_size is not resolved yet")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = Dropout(config.dropout, -1, HIDDEN)
        self.mix = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.head = LanguageModelHead(config.hidden_size, config.vocab_size)
        self._tie()

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        labels_BT: Tensor | None = None,
        cache: ToyCache | None = None,
        dropout_keys_B: Tensor | None = None,
        last_only: bool = False,
        with_metrics: bool = False,
    ) -> Any:
        """Logits (B, T, V); with labels the sum of cross-entropy in nats, 0-d fp32, and if with_metrics
        sums by name: "loss" and "correct" predictions."""
        x_BTD = self.dropout(self.embedding(tokens_BT), dropout_keys_B)
        before = 0 if cache is None else cache.length
        sums_BTD = x_BTD.cumsum(1)
        if cache is not None:
            if cache.sum_BD is not None:
                sums_BTD = sums_BTD + cache.sum_BD[:, None]
            cache.sum_BD, cache.length = sums_BTD[:, -1], before + tokens_BT.shape[1]
        counts_T = torch.arange(before + 1, before + tokens_BT.shape[1] + 1, device=tokens_BT.device)
        x_BTD = x_BTD + self.mix(sums_BTD / counts_T[:, None])
        logits_or_loss = self.head(x_BTD[:, -1:] if last_only else x_BTD, labels_BT)
        if labels_BT is None or not with_metrics:
            return logits_or_loss
        return {"loss": logits_or_loss, "correct": count_correct(self.head, x_BTD, labels_BT)}

    def new_cache(self, max_length: int) -> ToyCache:
        return ToyCache()

    def initializers(self) -> dict[str, Initializer]:
        normal = Normal(self.config.init_std)
        table: dict[str, Initializer] = {"embedding.weight": normal, "mix.weight": normal}
        if not self.config.tie_embeddings:
            table["head.weight"] = normal
        return table
