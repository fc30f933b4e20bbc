"""Pipeline parallelism: assign the steps of a model's forward pass to processes, and pass hidden states
between them.

A model lists the steps of its forward pass in `stages()`. Each process of a pipeline runs a contiguous run of
steps, balanced by parameters or time; the rest of the model stays on the meta device. All processes read the
same batches, so
that only hidden states are sent: positions, masks and labels are computed where they are needed.

Dim names: B batch, T sequence, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.nn.stages import Stage, ZeroSums
from llmtrain.nn.transformer import Context, KVCache
from llmtrain.parallel.balance import stage_runs
from llmtrain.parallel.mesh import Mesh
from llmtrain.parallel.tensor import VocabParallelEmbedding


def stage_weights(
    stages: Sequence[Stage], by: Literal["parameters", "time"], sequence_length: int
) -> list[float]:
    """Return the weight of each step for `balance`: its number of parameters, or of multiplications per
    token."""
    if by == "parameters":
        return [
            float(sum(p.numel() for module in stage.modules.values() for p in module.parameters()))
            for stage in stages
        ]
    weights = []
    for stage in stages:
        modules = [sub for module in stage.modules.values() for sub in module.modules()]
        matrices = [
            p
            for sub in modules
            for p in sub.parameters(recurse=False)
            # A look-up needs no multiplications.
            if p.ndim == 2 and not isinstance(sub, nn.Embedding | VocabParallelEmbedding)
        ]
        # Attention scores and weighted values: two products of head width times half the sequence.
        attention = [sub.num_heads * sub.head_dim for sub in modules if hasattr(sub, "first_head")]  # type: ignore[operator]
        weights.append(float(sum(p.numel() for p in matrices) + sequence_length * sum(attention)))
    return weights


class SharedWeight(NamedTuple):
    """A weight that several stages hold."""

    stages: tuple[int, ...]
    """Numbers of these stages, ascending."""
    module: str | None
    """Path of a module on this stage that has the weight; None if there is none."""


def shared_over_stages(model: nn.Module, here: PipelineStage) -> dict[str, SharedWeight]:
    """Return canonical name → shared weight, with the same names in the same order on every stage.

    Call this before `materialize`, which separates the weights of different stages.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    shared: dict[str, SharedWeight] = {}
    for name, *copies in names.values():
        holders: dict[int, str] = {}
        for path in (name, *copies):
            stage = next(s for module, s in here.stage_of.items() if path.startswith(f"{module}."))
            holders.setdefault(stage, path.removesuffix(".weight"))
        if len(holders) > 1:
            shared[name] = SharedWeight(tuple(sorted(holders)), holders.get(here.number))
    return shared


_MOST_DIMS = 4


class PipelineStage(nn.Module):
    """The steps of a model's forward pass that this process runs."""

    def __init__(self, model: nn.Module, mesh: Mesh) -> None:
        super().__init__()
        layout = mesh.layout
        stages: list[Stage] = model.stages()  # type: ignore[operator]
        weights = stage_weights(stages, layout.balance, layout.sequence_length)
        runs = stage_runs(weights, layout.pipeline)
        self.steps = [stages[i] for i in runs[mesh.coordinates.pipeline]]
        self.stage_of = {
            name: number for number, run in enumerate(runs) for i in run for name in stages[i].modules
        }
        """Canonical name of the module of each step → stage of the pipeline that runs it."""
        for step in self.steps:
            for name, module in step.modules.items():
                self.add_module(name.replace(".", "_"), module)
        self.config: Any = model.config
        self.new_cache: Callable[[int], KVCache] | None = getattr(model, "new_cache", None)
        self._make_context: Callable[..., Context] = model.context  # type: ignore[assignment]
        self._mesh = mesh
        self.number = mesh.coordinates.pipeline
        # With tensor_sequence, hidden states after the first block cover a part of the tokens.
        self._token_parts = layout.tensor if layout.tensor_sequence else 1

    def run(self, x: Tensor | None, *, tokens_BT: Tensor, **arguments: Any) -> Any:
        """Run these steps on one batch.

        x: output of the previous stage (B, T, D); None on the first stage.
        Return the hidden states (B, T, D); on the last stage the logits or, with labels, the summed loss.
        """
        return self._through(x, tokens_BT, self._make_context(tokens_BT, **arguments))

    def hidden_shape(self, *, tokens_BT: Tensor, **arguments: Any) -> tuple[int, int, int]:
        """Return the shape of the hidden states that stages pass on for one batch."""
        return self._hidden_shape(len(tokens_BT), self._make_context(tokens_BT, **arguments))

    def _hidden_shape(self, B: int, context: Context) -> tuple[int, int, int]:
        return B, context.num_states // self._token_parts, self.config.hidden_size

    def _through(self, x: Tensor | None, tokens_BT: Tensor, context: Context) -> Any:
        if x is None:
            x = tokens_BT
        for step in self.steps:
            x = step.run(x, context)
        return x

    @torch.no_grad()
    def forward(self, tokens_BT: Tensor, **arguments: Any) -> Any:
        """Run the forward pass of the whole model on all processes of the pipeline, for evaluation and
        generation.

        Return the summed loss on the last stage and 0 on others; without labels, the logits on all. A stage
        may start the next batch while later stages work on this one.
        """
        mesh, stage = self._mesh, self._mesh.coordinates.pipeline
        B = len(tokens_BT)
        context = self._make_context(tokens_BT, **arguments)
        weight = next(self.parameters())
        x: Tensor | None = None
        if not mesh.is_first_stage:
            x = weight.new_empty(self._hidden_shape(B, context))
            dist.recv(x, mesh.stage_rank(stage - 1))
        y = self._through(x, tokens_BT, context)
        cache: KVCache | None = arguments.get("cache")
        if cache is not None:
            cache.length += context.positions.shape[1]
        if not mesh.is_last_stage:
            dist.send(y.contiguous(), mesh.stage_rank(stage + 1))
        if context.labels is not None:
            if mesh.is_last_stage:
                return y
            sums = ZeroSums(y.device)
            return sums if arguments.get("with_metrics") else sums["loss"]
        return self._from_last_stage(y)

    def _from_last_stage(self, y: Tensor) -> Tensor:
        mesh = self._mesh
        last = mesh.stage_rank(mesh.layout.pipeline - 1)
        # The head of a task has other dims than hidden states, and may have another dtype.
        about = torch.tensor(
            [y.dtype == torch.float32, y.ndim, *y.shape, *[1] * (_MOST_DIMS - y.ndim)], device=y.device
        )
        dist.broadcast(about, last, group=mesh.pipeline_group)
        if not mesh.is_last_stage:
            is_fp32, dims, *shape = about.tolist()
            y = y.new_empty(shape[:dims], dtype=torch.float32 if is_fp32 else y.dtype)
        y = y.contiguous()
        dist.broadcast(y, last, group=mesh.pipeline_group)
        return y
