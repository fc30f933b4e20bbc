"""The head of a fine-tuning task: hidden states → predictions of a text or of its tokens, or their loss.

Dim names: B texts, T tokens, D hidden width, C outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.labels import IGNORE_INDEX
from llmtrain.nn.dropout import HIDDEN, Dropout
from llmtrain.nn.initialize import Constant, Initializer, Normal
from llmtrain.nn.linear import Linear
from llmtrain.nn.task_config import TaskHeadConfig

_LAYER = 4095
"""Number, beyond those of layers, that makes the masks of the head's dropout its own."""


class TaskHead(nn.Module):
    """`config.outputs` predictions for each text or token. The loss is a sum: over texts, or over tokens with
    a tag."""

    def __init__(self, config: TaskHeadConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.dense = Linear(hidden_size, hidden_size) if config.dense else None
        self.dropout = Dropout(config.dropout, _LAYER, HIDDEN)
        self.out = Linear(hidden_size, config.num_outputs, bias=config.bias)

    def forward(
        self,
        x_BTD: Tensor,
        lengths_B: Tensor,
        labels: Tensor | None = None,
        dropout_keys_B: Tensor | None = None,
    ) -> Tensor:
        """Return logits, fp32: (B, C) for a text, (B, T, C) for tokens. With labels, return the summed loss,
        0-d fp32: in nats; for values, the squared error.

        lengths_B: tokens of each text; later ones are padding.
        labels: classes (B), IGNORE_INDEX without a loss; labels (B, C) and values (B, C), NaN without a loss;
            tags (B, T), IGNORE_INDEX without a loss; first and last token of a span (B, 2), IGNORE_INDEX
            without a loss.
        """
        if self.config.kind not in ("tags", "span"):
            x_BTD = self._pooled(x_BTD, lengths_B)[:, None]
        if self.dense is not None:
            x_BTD = self.dense(x_BTD).tanh()
        logits_BTC = self.out(self.dropout(x_BTD, dropout_keys_B)).float()
        if self.config.kind == "span":
            is_padding_BT = torch.arange(logits_BTC.shape[1], device=lengths_B.device) >= lengths_B[:, None]
            logits_BTC = logits_BTC.masked_fill(is_padding_BT[..., None], torch.finfo(torch.float32).min)
        elif self.config.kind != "tags":
            logits_BTC = logits_BTC[:, 0]
        return logits_BTC if labels is None else task_loss(logits_BTC, labels, self.config)

    def _pooled(self, x_BTD: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the hidden state that stands for each text, (B, D)."""
        if self.config.pooling == "first":
            return x_BTD[:, 0]
        if self.config.pooling == "last":
            last_B = (lengths_B - 1).clamp(min=0)
            return x_BTD[torch.arange(len(x_BTD), device=x_BTD.device), last_B]
        is_token_BT = torch.arange(x_BTD.shape[1], device=x_BTD.device) < lengths_B[:, None]
        mask_BT1 = is_token_BT[..., None].to(x_BTD.dtype)
        return (x_BTD * mask_BT1).sum(1) / lengths_B.clamp(min=1)[:, None].to(x_BTD.dtype)

    def initializers(self, std: float, biases: bool = True) -> dict[str, Initializer]:
        """Return N(0, std) for weights and 0 for biases, by names within the model. biases: False if another
        pattern of the model covers them."""
        table: dict[str, Initializer] = {"head.*.weight": Normal(std)}
        if biases and (self.config.bias or self.config.dense):
            table["head.*.bias"] = Constant(0.0)
        return table


class TextVectors(TaskHead):
    """In place of a head: the vector that it would read of each text, (B, D)."""

    def __init__(self, config: TaskHeadConfig) -> None:
        nn.Module.__init__(self)
        self.config = config

    def forward(
        self,
        x_BTD: Tensor,
        lengths_B: Tensor,
        labels: Tensor | None = None,
        dropout_keys_B: Tensor | None = None,
    ) -> Tensor:
        return self._pooled(x_BTD, lengths_B)


def task_loss(logits: Tensor, labels: Tensor, config: TaskHeadConfig) -> Tensor:
    """Return the summed loss of logits, 0-d fp32; see TaskHead.forward."""
    if config.kind in ("classes", "tags"):
        weights = logits.new_tensor(config.class_weights) if config.class_weights else None
        return F.cross_entropy(
            logits.flatten(0, -2), labels.flatten(), weights, ignore_index=IGNORE_INDEX, reduction="sum"
        )
    if config.kind == "span":
        both = F.cross_entropy(
            logits.transpose(1, 2).flatten(0, 1),
            labels.flatten(),
            ignore_index=IGNORE_INDEX,
            reduction="sum",
        )
        return both / 2
    has_loss_BC = ~labels.isnan()
    targets = labels.nan_to_num()
    if config.kind == "labels":
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return (losses * has_loss_BC).sum() / logits.shape[-1]
    return ((logits - targets).square() * has_loss_BC).sum() / logits.shape[-1]
