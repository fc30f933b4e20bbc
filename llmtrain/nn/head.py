"""The language-model head: hidden states → logits, or the summed cross-entropy without holding all logits.

Dim names: B batch, T sequence, M tokens that bear a loss, C tokens of a chunk, D hidden width, V
vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llmtrain.labels import IGNORE_INDEX
from llmtrain.nn.linear import add_product_, linear, product

if TYPE_CHECKING:
    from typing_extensions import Self

LOGITS_PER_CHUNK = 2**23
"""Number of logits held at once."""

CACHED_LOGITS = 2**20
"""Number of logits whose softmax a CPU computes at once, so that they stay in its cache."""


class LanguageModelHead(nn.Module):
    """Linear map to the vocabulary, including the loss."""

    def __init__(
        self, hidden_size: int, vocab_size: int, bias: bool = False, softcap: float | None = None
    ) -> None:
        """softcap: logits z become softcap · tanh(z / softcap) (Gemma 2, arXiv:2408.00118)."""
        super().__init__()
        self.softcap = softcap
        self.hidden_size, self.vocab_size = hidden_size, vocab_size
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(vocab_size)) if bias else None

    def forward(
        self, hidden_BTD: Tensor, labels_BT: Tensor | None = None, label_smoothing: float = 0.0
    ) -> Tensor:
        """Return logits (B, T, V); with labels, the SUM of cross-entropy in nats over labels other than
        IGNORE_INDEX, 0-d fp32.

        label_smoothing: share of each target that is spread evenly over the vocabulary (arXiv:1512.00567,
            section 7).
        """
        if labels_BT is None:
            return capped(linear(hidden_BTD, self.weight, self.bias), self.softcap)
        cross_entropy_ = functools.partial(_cross_entropy_, label_smoothing=label_smoothing)
        return summed_cross_entropy(
            hidden_BTD, self.weight, labels_BT, cross_entropy_, bias_V=self.bias, softcap=self.softcap
        )

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, vocab_size={self.vocab_size}"


class TiedHeadModel(nn.Module):
    """A language model whose head shares the embedding's weight if `config.tie_embeddings`. A model for a
    fine-tuning task, `config.task`, has a TaskHead instead, or besides, with the language model's as
    `token_head`.

    A subclass creates `config`, `embedding` and `head`, and then calls `_tie`.
    """

    config: Any
    embedding: nn.Embedding
    head: nn.Module
    token_head: nn.Module

    def _tie(self) -> None:
        if self.config.tie_embeddings and self.config.predicts_tokens:
            head = self.head if self.config.task is None else self.token_head
            head.weight = cast(nn.Parameter, self.embedding.weight)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # Leaving the meta device creates new Parameters, separate for each module.
        super()._apply(fn, recurse)
        self._tie()
        return self


def count_correct(head: nn.Module, hidden_BTD: Tensor, labels_BT: Tensor) -> Tensor:
    """Return how many labels other than IGNORE_INDEX are the likeliest token, 0-d int64. head: a
    LanguageModelHead, or one for a part of the vocabulary."""
    asked_BT = labels_BT != IGNORE_INDEX
    if hidden_BTD.shape[1] != labels_BT.shape[1]:  # this rank holds a part of the tokens
        return ((head(hidden_BTD).argmax(-1) == labels_BT) & asked_BT).sum()
    correct = torch.zeros((), dtype=torch.int64, device=labels_BT.device)
    size = max(1, LOGITS_PER_CHUNK // head.vocab_size)  # type: ignore[operator]
    hidden_MD, labels_M = hidden_BTD[asked_BT], labels_BT[asked_BT]
    for hidden, labels in zip(hidden_MD.split(size), labels_M.split(size), strict=True):
        correct += (head(hidden).argmax(-1) == labels).sum()
    return correct


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


CrossEntropy = Callable[[Tensor, Tensor], Tensor]
"""(logits_CV, labels_C1) → the summed loss, fp32; replaces the logits by the loss's gradient, in place."""


def summed_cross_entropy(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    labels_BT: Tensor,
    cross_entropy_: CrossEntropy | None = None,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return `F.cross_entropy(capped(F.linear(hidden, weight, bias), softcap), labels, reduction="sum")`,
    computed in chunks of tokens.

    The gradients of each chunk are computed while its logits exist (as in Liger Kernel, arXiv:2410.10989), so
    that memory is C·V instead of B·T·V and no logits are computed twice. Under autocast the matrix products
    have the autocast dtype; the softmax and the gradients of weight and bias are fp32.

    cross_entropy_: loss of one chunk; None: over these logits. If the weight is a part of the vocabulary,
        one that communicates with the ranks of the other parts.
    """
    device = hidden_BTD.device.type
    compute_dtype = hidden_BTD.dtype
    if torch.is_autocast_enabled(device):
        compute_dtype = torch.get_autocast_dtype(device)
    with_gradients = torch.is_grad_enabled()
    loss: Tensor = _LinearCrossEntropy.apply(
        hidden_BTD,
        weight_VD,
        bias_V,
        labels_BT,
        compute_dtype,
        with_gradients,
        cross_entropy_ or _cross_entropy_,
        softcap,
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_BTD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_BT: Tensor,
        compute_dtype: torch.dtype,
        with_gradients: bool,
        cross_entropy_: CrossEntropy,
        softcap: float | None,
    ) -> Tensor:
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            return _forward(
                ctx,
                hidden_BTD,
                weight_VD,
                bias_V,
                labels_BT,
                compute_dtype,
                with_gradients,
                cross_entropy_,
                softcap,
            )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * gradient).to(ctx.hidden_dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * gradient).to(ctx.weight_dtype)
        if grad_bias is not None:
            grad_bias = (grad_bias * gradient).to(ctx.bias_dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


def _forward(
    ctx: Any,
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_BT: Tensor,
    compute_dtype: torch.dtype,
    with_gradients: bool,
    cross_entropy_: CrossEntropy,
    softcap: float | None,
) -> Tensor:
    # Don't keep the weight itself: ZeRO-3 releases it between forward and backward.
    V, D = weight_VD.shape
    hidden_gradient_wanted = with_gradients and ctx.needs_input_grad[0]
    weight_gradient_wanted = with_gradients and ctx.needs_input_grad[1]
    ctx.hidden_dtype, ctx.weight_dtype = hidden_BTD.dtype, weight_VD.dtype
    ctx.bias_dtype = None if bias_V is None else bias_V.dtype

    labels = labels_BT.reshape(-1)
    counted = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    all_counted = counted.numel() == labels.numel()
    hidden_MD, labels_M = hidden_BTD.reshape(-1, D), labels
    if not all_counted:
        hidden_MD, labels_M = hidden_MD[counted], labels[counted]
    hidden_MD, weight = hidden_MD.to(compute_dtype), weight_VD.to(compute_dtype)

    loss = torch.zeros((), dtype=torch.float32, device=hidden_BTD.device)
    grad_hidden_MD = torch.empty_like(hidden_MD) if hidden_gradient_wanted else None
    grad_weight_VD = (
        torch.zeros(V, D, dtype=torch.float32, device=weight.device) if weight_gradient_wanted else None
    )
    bias = None if bias_V is None else bias_V.to(compute_dtype)
    grad_bias_V = None
    if bias is not None and with_gradients and ctx.needs_input_grad[2]:
        grad_bias_V = torch.zeros(V, dtype=torch.float32, device=weight.device)
    chunk = max(1, LOGITS_PER_CHUNK // V)
    for start in range(0, labels_M.numel(), chunk):
        hidden_CD = hidden_MD[start : start + chunk]
        labels_C1 = labels_M[start : start + chunk, None]
        logits_CV = product(hidden_CD, weight)
        if bias is not None:
            logits_CV += bias
        slopes_CV = None
        if softcap is not None:
            logits_CV.div_(softcap).tanh_()
            slopes_CV = 1.0 - logits_CV.square()
            logits_CV.mul_(softcap)
        loss += cross_entropy_(logits_CV, labels_C1)
        if not (hidden_gradient_wanted or weight_gradient_wanted or grad_bias_V is not None):
            continue
        grad_logits_CV = logits_CV if slopes_CV is None else logits_CV.mul_(slopes_CV)
        if grad_bias_V is not None:
            grad_bias_V += grad_logits_CV.sum(0, dtype=torch.float32)
        if grad_hidden_MD is not None:
            grad_hidden_MD[start : start + chunk] = product(grad_logits_CV, weight.T)
        if grad_weight_VD is not None:
            add_product_(grad_weight_VD, grad_logits_CV.T, hidden_CD.T)

    grad_hidden_BTD = grad_hidden_MD
    if grad_hidden_MD is not None and not all_counted:
        grad_hidden_BTD = torch.zeros(labels.numel(), D, dtype=compute_dtype, device=hidden_BTD.device)
        grad_hidden_BTD[counted] = grad_hidden_MD
    if grad_hidden_BTD is not None:
        grad_hidden_BTD = grad_hidden_BTD.view(hidden_BTD.shape)
    ctx.save_for_backward(grad_hidden_BTD, grad_weight_VD, grad_bias_V)
    return loss


def _cross_entropy_(logits_CV: Tensor, labels_C1: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the summed loss, fp32; replace the logits by its gradient, softmax − target, in place."""
    on_label, on_each = 1.0 - label_smoothing, label_smoothing / logits_CV.shape[1]
    loss = torch.zeros((), dtype=torch.float32, device=logits_CV.device)
    rows = logits_CV.shape[0]
    if logits_CV.device.type == "cpu":
        rows = max(1, CACHED_LOGITS // logits_CV.shape[1])
    for logits, labels in zip(logits_CV.split(rows), labels_C1.split(rows), strict=True):
        log_probs = torch.log_softmax(logits.float(), dim=-1)
        loss -= on_label * log_probs.gather(1, labels).sum()
        if label_smoothing > 0:
            loss -= on_each * log_probs.sum()
        grad = log_probs.exp_()
        if label_smoothing > 0:
            grad -= on_each
        grad.scatter_add_(1, labels, torch.full_like(labels, -on_label, dtype=torch.float32))
        logits.copy_(grad)
    return loss
