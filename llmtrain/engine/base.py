"""The interface between the training loop and the engines: one optimizer step over a list of micro-batches.

An engine implements sharding, the backward pass, gradient clipping and the optimizer step. It knows no
model family; the objective defines what a batch means.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from llmtrain.data.loader import MicroBatch
from llmtrain.distributed import processes
from llmtrain.engine.carried import with_lanes
from llmtrain.engine.counting import count, weighed
from llmtrain.engine.dropout import dropout_seed, seed_dropout
from llmtrain.engine.evaluation import NamedSums, Totals, sum_over_batches, with_terms
from llmtrain.engine.gate import Accepts, Gate, NonFiniteError, samples_of
from llmtrain.engine.modules import to_device
from llmtrain.engine.statistics import Statistics
from llmtrain.nn.dropout import sample_keys
from llmtrain.objectives.base import DROPOUT_KEYS, Batch, Objective, SharesSequences, Terms
from llmtrain.optim.config import OptimizerConfig
from llmtrain.optim.groups import Group, make_groups
from llmtrain.optim.optimizers import build_optimizer
from llmtrain.parallel.config import Precision
from llmtrain.parallel.layout import Layout
from llmtrain.parallel.materialize import Source
from llmtrain.parallel.mesh import Mesh
from llmtrain.tensor_boxes import Box, Shard
from llmtrain.watch import phases

_LOSS_AND_STOP = "/loss and stop"
"""Name under which a step's loss and stop request travel with the metrics, whose names have no slash."""


@dataclass(frozen=True)
class StepResult:
    """Result of one optimizer step, equal on all ranks.

    `loss`: mean over all targets of the global batch, in nats; `grad_norm`: Euclidean norm of the gradient
    before clipping; `metrics`: means; `skipped`: whether the weights were left unchanged, because fp16
    gradients overflowed, no sample had a target or the step was rejected; `stop`: whether a rank was asked to
    stop; `data_digest`: hash of the content and order of all samples; `num_skipped`: number of samples that
    were left empty; `rejected`: whether `accepts` refused the step.
    """

    loss: float
    num_targets: int
    grad_norm: float
    metrics: dict[str, float] = field(default_factory=dict)
    skipped: bool = False
    stop: bool = False
    data_digest: int = 0
    num_skipped: int = 0
    rejected: bool = False


@dataclass(frozen=True)
class Fragment:
    """Elements [start, stop) of the flattened `shard` of one parameter, as this rank owns them.

    `holder` is the fp32 tensor that the optimizer updates, or a frozen weight; the fragment begins at
    element `offset` of the flattened holder. Checkpoints read and write fragments by their boxes in the
    whole parameter, independently of the layout.
    """

    name: str
    shard: Shard
    start: int
    stop: int
    holder: torch.Tensor
    offset: int
    trains: bool = True
    """Whether the optimizer has state for it. The holder of a frozen weight is the weight itself, in its
    own dtype."""
    is_statistic: bool = False
    """Whether forward passes update it, in place of the optimizer, such as an average of batch norm."""

    def view_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this fragment's part, 1-D, of a tensor shaped like `holder`."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.stop - self.start]

    def pieces(self) -> Iterator[tuple[Box, slice]]:
        """Yield the fragment's boxes in the whole parameter, each with its slice of `view_of`; padding has
        none."""
        return self.shard.pieces(self.start, self.stop)


@dataclass(frozen=True)
class Setup:
    """The parts of an engine: the divided model and this rank's position in the layout."""

    model: nn.Module
    """This rank's part; parts of other pipeline stages are on the meta device."""
    objective: Objective
    mesh: Mesh
    parameters: Mapping[str, nn.Parameter]
    """The parameters that this rank holds, by canonical name, that of the whole model. Those without
    `requires_grad` are frozen: they have no gradient and no optimizer state."""
    shards: Mapping[str, Shard]
    """Which part of the whole parameter each of them is."""
    device: torch.device
    seed: int
    precision: Precision
    optimizer: OptimizerConfig
    exact_dropout: bool = True
    groups: Mapping[str, Group] | None = None
    """Optimizer group of each parameter of the whole model that trains, also of those that other ranks hold;
    None: of those that this rank holds, with one learning rate for all."""

    @property
    def groups_of(self) -> dict[str, Group]:
        """Return canonical name → optimizer group."""
        shapes = {name: shard.shape for name, shard in self.shards.items()}
        return make_groups(shapes, {}, {}) if self.groups is None else dict(self.groups)

    @property
    def layout(self) -> Layout:
        return self.mesh.layout


class Engine(ABC):
    """Computes optimizer steps. Subclasses define how gradients are computed, reduced and applied."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.model = setup.model
        self.objective = setup.objective
        self.mesh = setup.mesh
        self.layout = setup.mesh.layout
        self.device = setup.device
        self.trainable = [(name, p) for name, p in setup.parameters.items() if p.requires_grad]
        self.frozen = [(name, p) for name, p in setup.parameters.items() if not p.requires_grad]
        self.statistics = Statistics(setup.model, setup.mesh)
        self._sums = NamedSums()

    def train_step(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        lr: float,
        stop_requested: Callable[[], bool] = lambda: False,
        between: Callable[[], None] = lambda: None,
        accepts: Accepts | None = None,
    ) -> StepResult:
        """Run one optimizer step over this rank's share of the global batch.

        Divide the loss once, by the number of targets in the whole global batch, so that padding,
        accumulation and the number of ranks don't change the gradient.

        stop_requested: called late in the step.
        between: called by all ranks alike between micro-batches, except in a pipeline, where several are in
            flight. If it raises, the step ends with weights and optimizer unchanged; the state can be saved,
            but training cannot go on.
        accepts: asked by all ranks alike about the loss and the gradient norm, finite or not, before anything
            changes. Where it says no, weights, optimizer, loss scale, statistics and carried states stay what
            they were, and training can go on.

        Without `accepts`, raise NonFiniteError on all ranks: for the loss before weights change; for the
        gradient norm possibly after, unless fp16's scaler skips the step.
        """
        assert len(micro_batches) == self.layout.accumulation
        batches = [self._prepared(micro) for micro in micro_batches]
        counted = self.mesh.contributes_loss
        counts = count(self.objective, micro_batches, batches, self.mesh, self.device)
        batches = weighed(self.objective, batches, counts)
        num_targets, data_digest, num_skipped, _ = counts
        if num_targets == 0:
            # Skip a step without targets: weight decay and momentum would change the weights.
            asked = torch.tensor(int(stop_requested()), device=self.device)
            stops = bool(processes.all_sum(asked).item())
            return StepResult(0.0, 0, 0.0, {}, True, stops, data_digest, num_skipped)
        scale = self.mesh.replicas / num_targets

        def run(i: int) -> Batch:
            phases.begin_micro_batch(i)
            if i and self.layout.pipeline == 1:
                between()
            stage = self.mesh.coordinates.pipeline
            seed_dropout(dropout_seed(self.setup.seed, micro_batches[i].first_sample, stage), self.device)
            return to_device(batches[i], self.device)

        losses: list[torch.Tensor] = []
        metrics: dict[str, torch.Tensor] = {}
        with self.statistics.kept_on_failure() as put_back:
            all_terms = self._accumulate(len(batches), run, scale)
            self.statistics.average()
        for terms in all_terms:
            losses.append(terms.loss_sum.detach().double() * counted)
            for name, value in terms.metrics.items():
                metrics[name] = metrics.get(name, torch.zeros_like(value)) + value * counted

        per_micro = torch.stack(losses)
        stop = torch.tensor(float(stop_requested()), dtype=torch.float64, device=self.device)
        sums = self._sums.over_ranks({_LOSS_AND_STOP: torch.stack([per_micro.sum(), stop]), **metrics})
        loss_sum, num_asked = sums.pop(_LOSS_AND_STOP)
        loss = loss_sum / num_targets
        gate = None if accepts is None else Gate(accepts, loss, self.device)
        if gate is None and not math.isfinite(loss):
            finite = per_micro.isfinite().tolist()
            bad = [micro for micro, ok in zip(micro_batches, finite, strict=True) if not ok]
            raise NonFiniteError(f"loss {loss}", samples_of(bad) or samples_of(micro_batches))
        scaler = self.scaler_state()
        with phases.OPTIMIZER:
            grad_norm, skipped = self._update(lr, gate)
        if gate is not None:
            grad_norm = gate.conclude(grad_norm, scales_loss=bool(scaler))
            if gate.rejected:
                put_back()
                self.load_scaler_state(scaler)
        elif not math.isfinite(grad_norm) and not scaler:
            raise NonFiniteError(f"gradient norm {grad_norm}", samples_of(micro_batches))
        return StepResult(
            loss=loss,
            num_targets=num_targets,
            grad_norm=grad_norm,
            metrics={name: total / max(1.0, count) for name, (total, count) in sums.items()},
            skipped=skipped,
            stop=num_asked > 0,
            data_digest=data_digest,
            num_skipped=num_skipped,
            rejected=gate is not None and gate.rejected,
        )

    def evaluate(self, micro_batches: Iterable[MicroBatch]) -> Totals:
        """Return loss and metric sums over all ranks' batches. All ranks must pass equally many batches."""
        module = self._module()
        # A pipeline stage lacks modules without parameters, such as the embeddings' dropout.
        for part in (module, self.model):
            part.eval()
        batches = ((to_device(self._part_of(micro.batch), self.device), micro) for micro in micro_batches)
        totals = sum_over_batches(lambda batch: Terms(*module(batch)), batches, self.mesh.contributes_loss)
        for part in (module, self.model):
            part.train()
        return with_terms(totals, self.objective)

    def _prepared(self, micro: MicroBatch) -> Batch:
        """Return this rank's part of a micro-batch, on the device and with dropout keys."""
        batch = micro.batch
        if self.setup.exact_dropout:
            batch = {**batch, DROPOUT_KEYS: sample_keys(self.setup.seed, list(micro.samples))}
        return self._part_of(with_lanes(batch, self.model, micro))

    def _part_of(self, batch: Batch) -> Batch:
        """Return this rank's tokens of the batch, if ranks share sequences."""
        parts = self.layout.sequence
        if parts == 1:
            return batch
        assert isinstance(self.objective, SharesSequences)
        return self.objective.part_of_sequences(batch, self.mesh.coordinates.sequence, parts)

    @abstractmethod
    def _module(self) -> nn.Module:
        """Return the ObjectiveModule, wrapped or not; in a pipeline, the module that runs all of it."""

    @abstractmethod
    def _accumulate(self, count: int, batch: Callable[[int], Batch], scale: float) -> list[Terms]:
        """Add to the gradients those of loss_sum · scale over `count` micro-batches, averaged over
        replicas at the end. `batch(i)` is called just before the forward pass of micro-batch i."""

    @abstractmethod
    def _update(self, lr: float, gate: Gate | None) -> tuple[float, bool]:
        """Clip, step the optimizer with `lr` unless `gate` refuses, and clear gradients. Return (gradient
        norm, whether the step was skipped). A step whose gradient is not finite may be skipped unasked."""

    def _optimized(self) -> tuple[list[tuple[str, nn.Parameter]], dict[str, Group]]:
        """Return the parameters that the optimizer updates, by name, and the group of each name."""
        return self.trainable, self.setup.groups_of

    def _make_optimizer(self) -> torch.optim.Optimizer:
        named, groups = self._optimized()
        return build_optimizer(self.setup.optimizer, named, self.device.type, groups)

    def _answers_for(self, name: str) -> bool:
        """Return whether this rank, among the ranks of one replica, is the one that counts the parameter."""
        return self.setup.shards[name].count > 1 or self.mesh.coordinates.tensor == 0

    def _clip(self, max_grad_norm: float) -> float:
        """Scale the gradients, already summed over replicas, down to norm `max_grad_norm` (0: don't).
        Return their norm over the whole model."""
        counted = [p for name, p in self.trainable if self._answers_for(name)]
        gradients = [p.grad for p in counted if p.grad is not None]
        norm = total_norm(gradients) if gradients else torch.zeros((), device=self.device)
        if self.layout.model > 1:
            square = norm.double().square() if self.mesh.replica == 0 else torch.zeros_like(norm).double()
            norm = processes.all_sum(square).sqrt().float()
        if max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_([p for _, p in self.trainable], max_grad_norm, norm)
        return float(norm)

    def _whole_fragments(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> list[Fragment]:
        """Return fragments of parameters that are not divided over replicas."""
        shards = self.setup.shards
        return [Fragment(n, shards[n], 0, p.numel(), p, 0, p.requires_grad) for n, p in parameters]

    def _each_replicas_share(self, fragments: list[Fragment]) -> list[Fragment]:
        """Return this replica's share (every n-th) of fragments that all replicas hold, so that each is
        written once."""
        owned = [fragment for fragment in fragments if self._answers_for(fragment.name)]
        return owned[self.mesh.replica :: self.mesh.replicas]

    @property
    @abstractmethod
    def optimizer(self) -> torch.optim.Optimizer:
        """Return the torch optimizer that holds the state of the fragments' holders."""

    @abstractmethod
    def fragments(self) -> list[Fragment]:
        """Return the fragments that this rank owns. Over all ranks, they hold each element of each
        parameter exactly once, frozen ones included."""

    def held_fragments(self) -> list[Fragment]:
        """Return the fragments to load on resume: this rank's own and its copies of other ranks'."""
        return self.fragments()

    @abstractmethod
    def release(self) -> None:
        """Let go of what would outlive the last reference to the engine, which cannot be used any more."""

    @abstractmethod
    def refresh_weights(self) -> None:
        """Update the weights of the forward pass after the fragments were changed."""

    @abstractmethod
    def scaler_state(self) -> dict[str, float]:
        """Return the loss scaler's state; empty without a loss scaler."""

    @abstractmethod
    def load_scaler_state(self, state: Mapping[str, float]) -> None:
        """Restore the result of `scaler_state`."""


def total_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the Euclidean norm of all gradients, 0-d fp32.

    On a CPU torch sums the squares of a tensor in few fp32 accumulators, with an error of 2e-4 of the norm
    over 4 million elements, so pass it smaller pieces.
    """
    pieces = [
        piece
        for gradient in gradients
        for piece in (gradient.reshape(-1).split(2**14) if gradient.device.type == "cpu" else (gradient,))
    ]
    return torch.nn.utils.get_total_norm(pieces)


def fill_fragments(engine: Engine, source: Source) -> None:
    """Copy values from `source` into the tensors that this rank's optimizer updates."""
    with torch.no_grad():
        for fragment in engine.held_fragments():
            out = fragment.view_of(fragment.holder)
            source(out, fragment.name, fragment.shard, fragment.start)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, fragment: Fragment
) -> Iterator[tuple[str, torch.Tensor | float]]:
    """Yield the fragment's optimizer state: (key, 1-D tensor) for state of the weight's size, (key,
    number) for counters that all elements share."""
    for key, value in optimizer.state.get(fragment.holder, {}).items():
        if isinstance(value, torch.Tensor) and value.numel() == fragment.holder.numel() and value.ndim > 0:
            yield key, fragment.view_of(value)
        elif isinstance(value, (torch.Tensor, int, float)):
            yield key, float(value)


def optimizer_slot(optimizer: torch.optim.Optimizer, fragment: Fragment, key: str) -> torch.Tensor:
    """Return the 1-D view of the fragment's part of optimizer state `key`; create zeros if there is none."""
    state = optimizer.state[fragment.holder]
    if not isinstance(state.get(key), torch.Tensor):
        state[key] = torch.zeros_like(fragment.holder, requires_grad=False)
    return fragment.view_of(state[key])


def set_optimizer_counter(
    optimizer: torch.optim.Optimizer, fragment: Fragment, key: str, value: float
) -> None:
    """Set a counter that all elements of the fragment's holder share (Adam's `step`)."""
    fused = bool(optimizer.defaults.get("fused"))
    device = fragment.holder.device if fused else torch.device("cpu")
    optimizer.state[fragment.holder][key] = torch.tensor(value, dtype=torch.float32, device=device)
