"""Tensor parallelism: divide the matrices of an ordinary model over processes, according to a table
(Megatron-LM, arXiv:1909.08053; its sequence parallelism, arXiv:2205.05198).

    shards = shard_tensors(model, {"blocks.*.mlp.up": "column", "blocks.*.mlp.down": "row", …}, mesh)

| role      | module               | divided along | all-reduce in forward      | all-reduce in backward |
|-----------|----------------------|---------------|----------------------------|------------------------|
| column    | Linear               | outputs       | none                       | gradient of the input  |
| row       | Linear               | inputs        | output, before the bias    | none                   |
| embedding | Embedding            | vocabulary    | output                     | none                   |
| head      | LanguageModelHead    | vocabulary    | maxima and sums of softmax | gradient of the input  |
| heads     | PerHead              | heads         | none                       | none                   |
| all_heads | AllHeadsNorm         | heads         | sums of squares            | gradient of the sums   |
| added_heads | Prefix             | heads         | none                       | none                   |
| shared    | any, called by heads | nothing       | none                       | none                   |
| one_input | around column layers | nothing       | none                       | gradient of the input  |

The gradients of `shared` parameters are summed over the tensor group, since each process uses them for its
own heads. The column layers right inside a module with `one_input`, such as the two of a gated MLP, read that
module's input, which is communicated once for all of them.

The layers here are thin wrappers of fairscale's groups, mappings and cross-entropy; fairscale's own layers
allocate each full weight first. A vocabulary that is not divisible is padded; padding gets no probability and
no gradient.

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
)
from torch import Tensor, nn

from llmtrain.adapt.modules import Bottleneck, LowRank
from llmtrain.adapt.virtual import SoftPrompt
from llmtrain.nn.dropout import Dropout
from llmtrain.nn.head import LanguageModelHead, capped, summed_cross_entropy
from llmtrain.nn.linear import linear
from llmtrain.nn.norms import AllHeadsNorm
from llmtrain.nn.sharding import Role, Table
from llmtrain.parallel import tensor_group
from llmtrain.parallel.mesh import Mesh, all_sum_over
from llmtrain.parallel.tensor_group import CutTokens, GatherTokens, Sum, SumAndCutTokens
from llmtrain.tensor_boxes import Shard

_DIVIDED_DIM: dict[Role, dict[str, int]] = {
    "column": {"weight": 0, "bias": 0, "lora.b": 0},
    "row": {"weight": 1, "lora.a": 1},
    "embedding": {"weight": 0},
    "head": {"weight": 0, "bias": 0},
    "heads": {"weight": 0},
    "all_heads": {"weight": 0},
    "added_heads": {"weight": 0},
    "shared": {},
    "one_input": {},
}
"""Role → parameter → divided dim; other parameters stay whole."""


def shard_tensors(model: nn.Module, table: Table, mesh: Mesh) -> dict[str, Shard]:
    """Replace the modules selected by `table` (name pattern → role) by their parts on this process.

    Weights are not copied, so the model should be on the meta device and its weights created afterwards.
    Return the shard of each divided parameter by canonical name.
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
        for name in names if role in _LAYERS else []:
            module = modules[name]
            part = _LAYERS[role](module, layout.tensor_sequence)
            for key, child in module.named_children():
                setattr(part, key, child)  # what an adaptation added
            for key, parameter in list(module.named_parameters()):
                dim = _DIVIDED_DIM[role].get(key)
                if dim is None:
                    _register(part, key, parameter)
                    continue
                shard = Shard(tuple(parameter.shape), dim, mesh.coordinates.tensor, layout.tensor)
                if parameter not in parts:
                    local = torch.empty(shard.local_shape, dtype=parameter.dtype, device=parameter.device)
                    parts[parameter] = nn.Parameter(local, requires_grad=parameter.requires_grad)
                _register(part, key, parts[parameter])
                shards[f"{name}.{key}"] = shard
            model.set_submodule(name, part)
            if role == "row" and isinstance(product := getattr(part, "lora", None), LowRank):
                product.dropout.first_column = mesh.coordinates.tensor * product.a.shape[1]
    for pattern in (pattern for pattern, role in table.items() if role == "one_input"):
        for name, module in modules.items():
            if fnmatchcase(name, pattern):
                _enter_once(module, layout.tensor_sequence)
    for module in model.modules():
        if hasattr(module, "first_head"):
            heads = cast(int, module.num_heads)
            module.first_head = cast(Any, mesh.coordinates.tensor * heads // layout.tensor)
    if layout.tensor_sequence:
        model.blocks[0].register_forward_pre_hook(_scatter_input)  # type: ignore[index,operator,union-attr]
        for block in cast(Any, model.blocks):
            block.gives_what_is_read = False  # each process has other tokens
    return shards


def _register(module: nn.Module, key: str, parameter: nn.Parameter) -> None:
    """Give a module, or one in it, a parameter by its name."""
    path, _, name = key.rpartition(".")
    module.get_submodule(path).register_parameter(name, parameter)


def share_sequence(model: nn.Module, mesh: Mesh) -> None:
    """Set in all dropout layers which part of the tokens of a sequence they process."""
    layout, coordinates = mesh.layout, mesh.coordinates
    for name, module in model.named_modules():
        if isinstance(module, Dropout):
            module.sequence_part = coordinates.sequence
            if layout.tensor_sequence and name.startswith("blocks.") and ".lora." not in name:
                module.sequence_part = coordinates.sequence * layout.tensor + coordinates.tensor


def mark_parameters(
    parameters: Mapping[str, nn.Parameter], shards: Mapping[str, Shard], table: Table, mesh: Mesh
) -> None:
    """Mark divided weights for DeepSpeed, and sum the gradients of whole weights that process only a part of
    the tokens or heads over the tensor group."""
    shared = [pattern for pattern, role in table.items() if role == "shared"]
    # Of a product beside a divided layer, A or B is whole, and each process has a part of its gradient.
    divided = [f"{pattern}.lora" for pattern, role in table.items() if role in ("column", "row")]
    for name, parameter in parameters.items():
        sees_a_part = mesh.layout.tensor_sequence and name.startswith(("blocks.", "norm."))
        sees_a_part |= any(fnmatchcase(name.rpartition(".")[0], pattern) for pattern in shared + divided)
        if shards[name].count > 1:
            parameter.model_parallel = True  # type: ignore[attr-defined]
        elif sees_a_part and parameter.requires_grad:
            parameter.register_hook(lambda grad: all_sum_over(grad.clone(), mesh.tensor_group))


class _TensorParallel(nn.Module):
    """Base class of the layers: communication of activations before and after a layer.

    Between layers each process holds the whole activations, (B, T, D). With Megatron's sequence parallelism
    it holds its part of the tokens, (B, T / tensor, D): they are all-gathered before a layer and
    reduce-scattered after it.
    """

    def __init__(self, module: nn.Module, shares_sequence: bool) -> None:
        super().__init__()
        self.shares_sequence = shares_sequence
        self.register_parameter("bias", None)
        self.lora: LowRank | None = None
        self.adapter: Bottleneck | None = None
        self.prompt: SoftPrompt | None = None

    def _enter(self, x_BTD: Tensor) -> Tensor:
        return _entered(x_BTD, self.shares_sequence)

    def _leave(self, x_BTD: Tensor) -> Tensor:
        x: Tensor = SumAndCutTokens.apply(x_BTD) if self.shares_sequence else Sum.apply(x_BTD)
        return x


class ColumnParallelLinear(_TensorParallel):
    """A slice of the outputs of a Linear, and of a product beside it: A is whole, B divided."""

    weight: Tensor
    bias: Tensor | None
    enters = True
    """Whether it communicates its input itself: with `one_input` the module around it does."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.enters:
            x_BTD = self._enter(x_BTD)
        y_BTD = linear(x_BTD, self.weight, self.bias)
        return y_BTD if self.lora is None else y_BTD + self.lora(x_BTD)


class RowParallelLinear(_TensorParallel):
    """A Linear over a slice of its inputs, and a product beside it: A is divided, B whole. A bottleneck
    behind it is whole."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTD = linear(x_BTD, self.weight)
        if self.lora is not None:
            y_BTD = y_BTD + self.lora(x_BTD)
        y_BTD = self._leave(y_BTD)
        if self.bias is not None:
            y_BTD = y_BTD + self.bias
        return y_BTD if self.adapter is None else y_BTD + self.adapter(y_BTD)


class VocabParallelEmbedding(_TensorParallel):
    """The embeddings of a slice of the vocabulary."""

    weight: Tensor

    def forward(self, tokens_BT: Tensor) -> Tensor:
        V = self.weight.shape[0]
        local_BT = tokens_BT - tensor_group.rank() * V
        elsewhere_BT = (local_BT < 0) | (local_BT >= V)
        x_BTD = F.embedding(local_BT.masked_fill(elsewhere_BT, 0), self.weight)
        # Also whole with sequence parallelism, because positions are added before the sequence is divided.
        x: Tensor = Sum.apply(x_BTD.masked_fill(elsewhere_BT[..., None], 0.0))
        return x if self.prompt is None else self.prompt(x, tokens_BT)


class VocabParallelHead(_TensorParallel):
    """A LanguageModelHead for a slice of the vocabulary, with the softmax over the whole vocabulary."""

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
        """Return the summed loss over the logits of all processes; replace the local logits by their
        gradient."""
        V = logits_CV.shape[1]
        smoothing = None
        if label_smoothing > 0:
            smoothing = self._smoothing(logits_CV.float(), labels_C1, label_smoothing)
        with torch.enable_grad():
            logits = logits_CV.float()
            if logits is logits_CV:
                logits = logits.clone()
            logits[:, max(0, self.vocab_size - tensor_group.rank() * V) :] = -torch.inf  # padding
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
        """Return the term that label smoothing adds to the loss, share · Σ (logit of the label − mean logit),
        and its gradient with respect to the local logits."""
        first, V = tensor_group.rank() * logits_CV.shape[1], logits_CV.shape[1]
        number_V = first + torch.arange(V, device=logits_CV.device)
        target_CV = (number_V == labels_C1).float() - (number_V < self.vocab_size).float() / self.vocab_size
        added = share * (logits_CV * target_CV).sum()
        dist.all_reduce(added, group=tensor_group.group())
        return added, share * target_CV


class PartOfHeads(_TensorParallel):
    """A PerHead for a part of the heads."""

    weight: Tensor

    def forward(self) -> Tensor:
        return self.weight


class PartOfAllHeadsNorm(AllHeadsNorm):
    """An AllHeadsNorm for a part of the heads."""

    def __init__(self, module: AllHeadsNorm, shares_sequence: bool) -> None:
        nn.Module.__init__(self)
        self.eps, self.width = module.eps, module.width

    def sum_over_heads(self, x: Tensor) -> Tensor:
        # The heads of all processes depend on the sum, so its gradient is summed as well.
        total: Tensor = copy_to_model_parallel_region(Sum.apply(x))
        return total


_LAYERS: dict[Role, Callable[[Any, bool], nn.Module]] = {
    "column": ColumnParallelLinear,
    "row": RowParallelLinear,
    "embedding": VocabParallelEmbedding,
    "head": VocabParallelHead,
    "heads": PartOfHeads,
    "all_heads": PartOfAllHeadsNorm,
    "added_heads": lambda module, _: module,
}


def _scatter_input(_block: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    x_BTD, *others = arguments
    return (CutTokens.apply(x_BTD), *others)


def _enter_once(module: nn.Module, shares_sequence: bool) -> None:
    """Let a module communicate its input, in place of each of the column layers in it that read it."""

    def enter(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x_BTD, *others = arguments
        return (_entered(x_BTD, shares_sequence), *others)

    for child in module.children():
        if isinstance(child, ColumnParallelLinear):
            child.enters = False
    module.register_forward_pre_hook(enter)


def _entered(x_BTD: Tensor, shares_sequence: bool) -> Tensor:
    x: Tensor = GatherTokens.apply(x_BTD) if shares_sequence else copy_to_model_parallel_region(x_BTD)
    return x
