"""The head of a fine-tuning task: hidden states → predictions of a text or of its tokens, or their loss.

Dim names: B texts, T tokens, D hidden width, C outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.labels import IGNORE_INDEX
from llmtrain.nn.dropout import HIDDEN, Dropout
from llmtrain.nn.initialize import Constant, Initializer, Normal
from llmtrain.nn.linear import Linear
from llmtrain.nn.task_config import TaskHeadConfig, variance_share

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

    def read(self, lengths_B: Tensor) -> Tensor | None:
        """Return the position of the token that stands for each text, (B, 1); None if the head reads all."""
        if self.config.kind in ("tags", "span") or self.config.pooling == "mean":
            return None
        last_B = (lengths_B - 1).clamp(min=0)
        return (last_B if self.config.pooling == "last" else torch.zeros_like(last_B))[:, None]

    def _pooled(self, x_BTD: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the hidden state that stands for each text, (B, D): the only one that the last layer gave,
        or that of its token, or their mean."""
        if x_BTD.shape[1] == 1:
            return x_BTD[:, 0]
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


class TaskLabels(NamedTuple):
    """The labels of a batch whose rows are of several tasks; a row has none for the tasks of others."""

    by_task: dict[str, Tensor]
    """Task → labels as its head takes them; of a task over masked tokens as the language model does."""
    counts: Tensor
    """Targets of each task in the batch, (K,) fp32."""
    factors: Tensor
    """Factor of each task's summed loss, (K,) fp32."""
    wants_logits: bool = False
    """Return TaskLogits."""


class TaskLogits(NamedTuple):
    """What the heads of several tasks say of all rows."""

    by_task: dict[str, Tensor]
    log_variances: Tensor | None
    """(K,) fp32; None: none are learned."""
    of_tokens: dict[str, Tensor] | None = None
    """Sums of the language model by name, if there were labels for it."""


LanguageModel = Callable[[Tensor, bool], "dict[str, Tensor]"]
"""(labels, whether with metrics) → sums by name, "loss" among them."""


class Uncertainty(nn.Module):
    """The logarithm of a learned variance for each task. It is a module of its own because ZeRO 3 gathers
    the weights of one module at a time."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.log_variances = nn.Parameter(torch.empty(count))

    def forward(self) -> Tensor:
        """Return (K,) fp32."""
        return self.log_variances.float()


class SeveralHeads(TaskHead):
    """A head for each of several tasks, all of which read every row.

    Each forward runs all of them, so that the ranks of a sharded model meet in the same order whatever rows
    they have.
    """

    def __init__(self, config: TaskHeadConfig, hidden_size: int) -> None:
        nn.Module.__init__(self)
        self.config = config
        of_tokens = [name for name, head in config.by_name.items() if head.kind == "tokens"]
        self._token_task = of_tokens[0] if of_tokens else ""
        heads = {
            name: TaskHead(head, hidden_size)
            for name, head in config.by_name.items()
            if name not in of_tokens
        }
        self.tasks = nn.ModuleDict(heads)
        self.uncertainty = Uncertainty(len(config.heads)) if config.uncertain else None

    def forward(  # type: ignore[override]
        self,
        x_BTD: Tensor,
        lengths_B: Tensor,
        labels: TaskLabels | None = None,
        dropout_keys_B: Tensor | None = None,
        language_model: LanguageModel | None = None,
    ) -> Tensor | TaskLogits:
        """Return the logits of each task with a head of its own; with labels, (1 + K,) fp32: the loss, which
        is Σ factor · S of the summed losses S of the tasks, and each S.

        language_model: the sums of a task over masked tokens.
        With learned variances σ² = exp(s), a task adds factor · (c · exp(−s) · S + targets · s / 2), where c
        is 1/2 for values and else 1 (Kendall et al., arXiv:1705.07115, equations 7 and 10).
        """

        if labels is None or labels.wants_logits:
            logits = {name: head(x_BTD, lengths_B, None, dropout_keys_B) for name, head in self.tasks.items()}
            variances = None if self.uncertainty is None else self.uncertainty()
            return TaskLogits(logits, variances, self._token_sums(labels, language_model, with_metrics=True))
        losses = {
            name: head(x_BTD, lengths_B, labels.by_task[name], dropout_keys_B)
            for name, head in self.tasks.items()
        }
        sums = self._token_sums(labels, language_model, with_metrics=False)
        if sums is not None:
            losses[self._token_task] = sums["loss"]
        losses_K = torch.stack([losses[name] for name in self.config.names])
        weighed_K = losses_K
        if self.uncertainty is not None:
            s_K = self.uncertainty()
            shares_K = losses_K.new_tensor([variance_share(head) for head in self.config.heads])
            weighed_K = shares_K * torch.exp(-s_K) * losses_K + labels.counts * s_K / 2
        return torch.cat([(labels.factors * weighed_K).sum()[None], losses_K])

    def read(self, lengths_B: Tensor) -> None:
        """Return None: each task reads other tokens."""

    def _token_sums(
        self, labels: TaskLabels | None, language_model: LanguageModel | None, with_metrics: bool
    ) -> dict[str, Tensor] | None:
        if labels is None or language_model is None or not self._token_task:
            return None
        return language_model(labels.by_task[self._token_task], with_metrics)

    def initializers(self, std: float, biases: bool = True) -> dict[str, Initializer]:
        """Return those of the heads, and variances of 1."""
        table: dict[str, Initializer] = {"head.*.weight": Normal(std)}
        own = [head for head in self.config.heads if head.kind != "tokens"]
        if biases and any(head.bias or head.dense for head in own):
            table["head.*.bias"] = Constant(0.0)
        if self.uncertainty is not None:
            table["head.uncertainty.log_variances"] = Constant(0.0)
        return table


def make_task_head(config: TaskHeadConfig, hidden_size: int) -> TaskHead:
    """Return the head of one task or of several."""
    return (SeveralHeads if config.heads else TaskHead)(config, hidden_size)


def tokens_read(head: nn.Module, lengths_B: Tensor | None) -> Tensor | None:
    """Return the positions of each row that a model's head reads, (B, M); None: all."""
    return head.read(lengths_B) if isinstance(head, TaskHead) and lengths_B is not None else None


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
