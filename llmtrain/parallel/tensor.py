"""Tensor parallelism: an ordinary module's matrices divided over processes by a table, from outside
(Megatron-LM, arXiv:1909.08053; its sequence parallelism, arXiv:2205.05198).

    shards = shard_tensors(model, {"blocks.*.mlp.up": "column", "blocks.*.mlp.down": "row", …}, mesh)

| role      | module               | divided along            | forward                    | backward    |
|-----------|----------------------|--------------------------|----------------------------|-------------|
| column    | Linear               | outputs                  | input as it is             | sum inputs' |
| row       | Linear               | inputs                   | sum outputs, then the bias | as it is    |
| embedding | Embedding            | vocabulary               | sum of what each has       | as it is    |
| head      | LanguageModelHead    | vocabulary               | softmax over all parts     | sum inputs' |
| heads     | PerHead              | heads                    | what these heads have      | as it is    |
| all_heads | AllHeadsNorm         | heads                    | sum squares of all heads   | sum squares'|
| shared    | any, called by heads | nothing                  | as it is                   | as it is    |

The gradient of what is `shared` is summed over the tensor group, as each process calls it for its own heads.

The layers are thin and ours, over fairscale's groups, mappings and cross-entropy: fairscale's own make
each full weight first. A vocabulary that does not divide is padded; the padding never wins a softmax and
gets no gradient.

Dim names: B batch, T sequence, D hidden width, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel.cross_entropy import vocab_parallel_cross_entropy
from fairscale.nn.model_parallel.mappings import (
    copy_to_model_parallel_region,
    gather_from_model_parallel_region,
    reduce_from_model_parallel_region,
)
from torch import Tensor, nn

from llmtrain.nn.dropout import Dropout
from llmtrain.nn.head import LanguageModelHead, capped, summed_cross_entropy
from llmtrain.nn.linear import linear
from llmtrain.nn.norms import AllHeadsNorm
from llmtrain.nn.sharding import Role, Table
from llmtrain.parallel.mesh import Mesh, all_sum_over
from llmtrain.tensor_boxes import Shard

_DIVIDED_DIM: dict[Role, dict[str, int]] = {
    "column": {"weight": 0, "bias": 0},
    "row": {"weight": 1},
    "embedding": {"weight": 0},
    "head": {"weight": 0, "bias": 0},
    "heads": {"weight": 0},
    "all_heads": {"weight": 0},
    "shared": {},
}
"""Role → parameter → the dim that is divided; parameters left out stay whole."""


def shard_tensors(model: nn.Module, table: Table, mesh: Mesh) -> dict[str, Shard]:
    """Replace the modules that `table` names (name pattern → role) by their parts on this process.

    The model is best on the meta device, and its weights made afterwards: nothing is copied.
    → the shard of each divided parameter, by its canonical name.

    Raise ValueError for a pattern that matches no module.
    """
    layout = mesh.layout
    if layout.tensor == 1:
        return {}
    modules = dict(model.named_modules())
    parts: dict[nn.Parameter, nn.Parameter] = {}  # a tied weight is divided once
    shards: dict[str, Shard] = {}
    for pattern, role in table.items():
        names = [name for name in modules if fnmatchcase(name, pattern)]
        if not names:
            raise ValueError(f"tensor-parallel pattern {pattern} matches no module")
        for name in names if role != "shared" else []:
            module = modules[name]
            part = _LAYERS[role](module, layout.tensor_sequence)
            for key, parameter in module.named_parameters(recurse=False):
                dim = _DIVIDED_DIM[role].get(key)
                if dim is None:
                    part.register_parameter(key, parameter)
                    continue
                shard = Shard(tuple(parameter.shape), dim, mesh.coordinates.tensor, layout.tensor)
                if parameter not in parts:
                    local = torch.empty(shard.local_shape, dtype=parameter.dtype, device=parameter.device)
                    parts[parameter] = nn.Parameter(local, requires_grad=parameter.requires_grad)
                part.register_parameter(key, parts[parameter])
                shards[f"{name}.{key}"] = shard
            model.set_submodule(name, part)
    for module in model.modules():
        if hasattr(module, "first_head"):
            heads = cast(int, module.num_heads)
            module.first_head = cast(Any, mesh.coordinates.tensor * heads // layout.tensor)
    if layout.tensor_sequence:
        model.blocks[0].register_forward_pre_hook(_scatter_input)  # type: ignore[index,operator,union-attr]
    return shards


def share_sequence(model: nn.Module, mesh: Mesh) -> None:
    """Tell the dropouts which part of the sequence's tokens they see."""
    layout, place = mesh.layout, mesh.coordinates
    for name, module in model.named_modules():
        if isinstance(module, Dropout):
            module.sequence_part = place.sequence
            if layout.tensor_sequence and name.startswith("blocks."):
                module.sequence_part = place.sequence * layout.tensor + place.tensor


def mark_parameters(
    parameters: Mapping[str, nn.Parameter], shards: Mapping[str, Shard], table: Table, mesh: Mesh
) -> None:
    """Tell DeepSpeed which weights are parts, and sum over the tensor group the gradients of whole weights
    that saw a part of the tokens or of the heads alone."""
    shared = [pattern for pattern, role in table.items() if role == "shared"]
    for name, parameter in parameters.items():
        sees_a_part = mesh.layout.tensor_sequence and name.startswith(("blocks.", "norm."))
        sees_a_part |= any(fnmatchcase(name.rpartition(".")[0], pattern) for pattern in shared)
        if shards[name].count > 1:
            parameter.model_parallel = True  # type: ignore[attr-defined]
        elif sees_a_part and parameter.requires_grad:
            parameter.register_hook(lambda grad: all_sum_over(grad.clone(), mesh.tensor_group))


class _TensorParallel(nn.Module):
    """Base of the layers: how activations enter and leave, which sequence parallelism changes.

    Between layers the activations are whole on each process, (B, T, D); with sequence parallelism each
    has its part of the tokens, (B, T / tensor, D), which is gathered before and summed and cut after.
    """

    def __init__(self, module: nn.Module, shares_sequence: bool) -> None:
        super().__init__()
        self.shares_sequence = shares_sequence
        self.register_parameter("bias", None)

    def _enter(self, x_BTD: Tensor) -> Tensor:
        x: Tensor = (
            _GatherSequence.apply(x_BTD) if self.shares_sequence else copy_to_model_parallel_region(x_BTD)
        )
        return x

    def _leave(self, x_BTD: Tensor) -> Tensor:
        x: Tensor = (
            _SumScatterSequence.apply(x_BTD)
            if self.shares_sequence
            else reduce_from_model_parallel_region(x_BTD)
        )
        return x


class ColumnParallelLinear(_TensorParallel):
    """Some of a Linear's outputs."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, x_BTD: Tensor) -> Tensor:
        return linear(self._enter(x_BTD), self.weight, self.bias)


class RowParallelLinear(_TensorParallel):
    """A Linear over some of its inputs."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTD = self._leave(linear(x_BTD, self.weight))
        return y_BTD if self.bias is None else y_BTD + self.bias


class VocabParallelEmbedding(_TensorParallel):
    """The vectors of some of the vocabulary."""

    weight: Tensor

    def forward(self, tokens_BT: Tensor) -> Tensor:
        V = self.weight.shape[0]
        local_BT = tokens_BT - _tensor_rank() * V
        elsewhere_BT = (local_BT < 0) | (local_BT >= V)
        x_BTD = F.embedding(local_BT.masked_fill(elsewhere_BT, 0), self.weight)
        # Whole on each process also under sequence parallelism: positions are added before it begins.
        x: Tensor = reduce_from_model_parallel_region(x_BTD.masked_fill(elsewhere_BT[..., None], 0.0))
        return x


class VocabParallelHead(_TensorParallel):
    """A LanguageModelHead for some of the vocabulary, with the softmax over all of it."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, module: LanguageModelHead, shares_sequence: bool) -> None:
        super().__init__(module, shares_sequence)
        self.vocab_size = module.weight.shape[0]
        self.softcap = module.softcap

    def forward(
        self, hidden_BTD: Tensor, labels_BT: Tensor | None = None, label_smoothing: float = 0.0
    ) -> Tensor:
        hidden_BTD = self._enter(hidden_BTD)
        if labels_BT is None:
            logits: Tensor = gather_from_model_parallel_region(linear(hidden_BTD, self.weight, self.bias))
            return capped(logits[..., : self.vocab_size], self.softcap)
        cross_entropy_ = functools.partial(self._cross_entropy_, label_smoothing=label_smoothing)
        return summed_cross_entropy(
            hidden_BTD, self.weight, labels_BT, cross_entropy_, bias_V=self.bias, softcap=self.softcap
        )

    def _cross_entropy_(self, logits_CV: Tensor, labels_C1: Tensor, label_smoothing: float) -> Tensor:
        """The summed loss over all processes' logits; turns these here into its gradient by them."""
        V = logits_CV.shape[1]
        smoothing = None
        if label_smoothing > 0:
            smoothing = self._smoothing(logits_CV.float(), labels_C1, label_smoothing)
        with torch.enable_grad():
            logits = logits_CV.float()
            if logits is logits_CV:
                logits = logits.clone()
            logits[:, max(0, self.vocab_size - _tensor_rank() * V) :] = -torch.inf  # padding
            logits.requires_grad_()
            loss: Tensor = vocab_parallel_cross_entropy(logits, labels_C1[:, 0]).sum()
            (grad,) = torch.autograd.grad(loss, logits)
        loss = loss.detach()
        if smoothing is not None:
            loss += smoothing[0]
            grad += smoothing[1]
        logits_CV.copy_(grad)
        return loss

    def _smoothing(self, logits_CV: Tensor, labels_C1: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """What smoothing adds to the loss, share · Σ (logit of the label − mean logit), and to its gradient
        by the logits here."""
        first, V = _tensor_rank() * logits_CV.shape[1], logits_CV.shape[1]
        number_V = first + torch.arange(V, device=logits_CV.device)
        target_CV = (number_V == labels_C1).float() - (number_V < self.vocab_size).float() / self.vocab_size
        added = share * (logits_CV * target_CV).sum()
        dist.all_reduce(added, group=_tensor_group())
        return added, share * target_CV


class PartOfHeads(_TensorParallel):
    """What a PerHead has for some of the heads."""

    weight: Tensor

    def forward(self) -> Tensor:
        return self.weight


class PartOfAllHeadsNorm(AllHeadsNorm):
    """An AllHeadsNorm for some of the heads."""

    def __init__(self, module: AllHeadsNorm, shares_sequence: bool) -> None:
        nn.Module.__init__(self)
        self.eps, self.width = module.eps, module.width

    def sum_over_heads(self, x: Tensor) -> Tensor:
        # Each process' heads depend on the sum: its gradient is summed as well.
        total: Tensor = copy_to_model_parallel_region(reduce_from_model_parallel_region(x))
        return total


_LAYERS: dict[Role, Callable[[Any, bool], nn.Module]] = {
    "column": ColumnParallelLinear,
    "row": RowParallelLinear,
    "embedding": VocabParallelEmbedding,
    "head": VocabParallelHead,
    "heads": PartOfHeads,
    "all_heads": PartOfAllHeadsNorm,
}


def _scatter_input(_block: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    x_BTD, *others = arguments
    return (_ScatterSequence.apply(x_BTD), *others)


class _GatherSequence(torch.autograd.Function):
    """(B, T / tensor, D) → (B, T, D); backward sums what the processes have for each token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _gather_tokens(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _sum_and_cut_tokens(gradients[0])


class _SumScatterSequence(torch.autograd.Function):
    """(B, T, D) summed over the processes → each its tokens, (B, T / tensor, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _sum_and_cut_tokens(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _gather_tokens(gradients[0])


class _ScatterSequence(torch.autograd.Function):
    """(B, T, D), the same on each process → each its tokens, (B, T / tensor, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _own_tokens(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _gather_tokens(gradients[0])


def _tensor_group() -> Any:
    from fairscale.nn.model_parallel.initialize import get_model_parallel_group

    return get_model_parallel_group()


def _tensor_rank() -> int:
    return dist.get_rank(_tensor_group())


def _gather_tokens(x: Tensor) -> Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(_tensor_size())]
    dist.all_gather(parts, x.contiguous(), group=_tensor_group())
    return torch.cat(parts, dim=1)


def _sum_and_cut_tokens(x: Tensor) -> Tensor:
    x = x.contiguous().clone()
    if dist.get_backend(_tensor_group()) == "nccl":
        parts = [part.contiguous() for part in x.chunk(_tensor_size(), dim=1)]
        out = torch.empty_like(parts[0])
        dist.reduce_scatter(out, parts, group=_tensor_group())
        return out
    dist.all_reduce(x, group=_tensor_group())  # gloo has no reduce-scatter
    return _own_tokens(x)


def _own_tokens(x: Tensor) -> Tensor:
    return x.chunk(_tensor_size(), dim=1)[_tensor_rank()].contiguous()


def _tensor_size() -> int:
    return dist.get_world_size(_tensor_group())
