"""Build an engine with weights from a resolved configuration.

Create an ordinary module on the meta device, divide it by tables, allocate this rank's part only, with
values from the seed or a checkpoint, wrap its forwards, and create the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

from llmtrain.models.skeleton import sharding_of, skeleton_of
from llmtrain.nn.model_config import ModelConfig
from llmtrain.nn.recompute_config import RecomputeConfig
from llmtrain.objectives.turns import TakesTurns
from llmtrain.optim.config import OptimizerConfig
from llmtrain.optim.freezing import freeze
from llmtrain.optim.groups import Group, Penalty, make_groups, rates
from llmtrain.parallel.config import Precision
from llmtrain.parallel.layout import Layout

if TYPE_CHECKING:
    import torch
    from torch import nn

    from llmtrain.engine.base import Engine
    from llmtrain.parallel.materialize import Source
    from llmtrain.parallel.mesh import Mesh
    from llmtrain.parallel.pipeline import SharedWeight
    from llmtrain.tensor_boxes import Shard


class _Freezes(Protocol):
    @property
    def freeze(self) -> tuple[str, ...]: ...


class Settings(Protocol):
    """The parts of a run's config that an engine depends on."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def recompute(self) -> RecomputeConfig: ...
    @property
    def train(self) -> _Freezes: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def engine(self) -> Literal["auto", "local", "deepspeed"]: ...
    @property
    def seed(self) -> int: ...
    @property
    def exact_dropout(self) -> bool: ...
    @property
    def carried_rows(self) -> int | None: ...


class Weights(Protocol):
    """Stored weights of which any part can be read."""

    def read_into(self, out: torch.Tensor, name: str, shard: Shard, start: int) -> None: ...


class Restorable(Protocol):
    """A checkpoint that can be restored into an engine."""

    @property
    def updates(self) -> Mapping[str, float]:
        """Return the optimizer steps that each parameter has had, of those whose steps are counted."""

    def weights(self) -> Weights: ...
    def restore(self, engine: Engine) -> None: ...


def build_engine(
    config: Settings,
    layout: Layout,
    device: torch.device,
    objective: Any,
    checkpoint: Restorable | None,
    weights: Source | None = None,
    penalties: Mapping[str, Penalty] | None = None,
) -> Engine:
    """Return the engine that `config` names, in the checkpoint's state, or at the start of training with
    `weights` or values from the seed. Called by all ranks together.

    penalties: by the names of the parameters that have one.
    """
    import torch

    from llmtrain.engine.base import Setup, fill_fragments
    from llmtrain.engine.modules import weight_dtype
    from llmtrain.optim.penalties import apply_penalties
    from llmtrain.parallel.materialize import materialize
    from llmtrain.parallel.mesh import Mesh
    from llmtrain.parallel.recompute import apply_recompute

    mesh = Mesh(layout)
    model = skeleton_of(config.model)
    freeze(model, config.train.freeze)
    updates = {} if checkpoint is None else checkpoint.updates
    groups = _groups(model, config.optimizer, updates, penalties or {})
    source = weights or seed_source(model, config.seed)
    if checkpoint is not None:
        source = checkpoint.weights().read_into
    shards = _divide(model, config.model, mesh)
    stage = None
    held: list[nn.Module] = [model]
    shared: dict[str, SharedWeight] = {}
    if layout.pipeline > 1:
        from llmtrain.parallel.pipeline import PipelineStage, shared_over_stages

        stage = PipelineStage(model, mesh)
        held = [module for step in stage.steps for module in step.modules.values()]
        shared = shared_over_stages(model, stage)

    dtype = weight_dtype(config.precision, layout.zero)
    partition = None
    if layout.zero == 3:
        from llmtrain.engine.deepspeed import config_of, zero_3_partitioner

        sizes = {name: shards.get(name, _whole(p)) for name, p in model.named_parameters()}
        settings = config_of(layout, config.precision, config.optimizer, sizes, device)
        partition = zero_3_partitioner(settings, mesh, dtype)
    parameters, shards = materialize(
        model,
        held,
        shards,
        device=device,
        dtype=dtype,
        source=None if layout.zero == 3 else source,
        then=partition,
    )
    if layout.tensor > 1:
        from llmtrain.parallel.tensor import mark_parameters

        mark_parameters(parameters, shards, sharding_of(config.model), mesh)
    apply_recompute(model, config.recompute)
    model.train()
    if config.carried_rows is not None:
        model.carry_states(config.carried_rows, device)  # type: ignore[operator]
    setup = Setup(
        model=model,
        objective=objective,
        mesh=mesh,
        parameters=parameters,
        shards=shards,
        device=device,
        seed=config.seed,
        precision=config.precision,
        optimizer=config.optimizer,
        exact_dropout=config.exact_dropout,
        groups=groups,
    )
    engine: Engine
    if stage is not None:
        from llmtrain.engine.pipeline import PipelineEngine

        engine = PipelineEngine(setup, stage, shared)
    elif config.engine == "deepspeed":
        from llmtrain.engine.deepspeed import DeepSpeedEngine

        engine = DeepSpeedEngine(setup)
    elif isinstance(objective, TakesTurns):
        from llmtrain.engine.turns import TurnsEngine

        engine = TurnsEngine(setup)
    else:
        from llmtrain.engine.local import LocalEngine

        engine = LocalEngine(setup)
    if checkpoint is not None:
        checkpoint.restore(engine)
    elif layout.zero == 3 or dtype != torch.float32:
        # Below ZeRO 3, DeepSpeed makes its fp32 masters from weights that are already rounded.
        fill_fragments(engine, source)
        engine.refresh_weights()
    if penalties:
        apply_penalties(engine.optimizer)
    return engine


def build_for_use(config: ModelConfig, mesh: Mesh, device: torch.device, source: Source) -> nn.Module:
    """Return this rank's part of an fp32 model for evaluation and generation, divided over the mesh.
    Called by all ranks together; call its forward like that of the whole model, also on all ranks."""
    import torch

    from llmtrain.parallel.materialize import materialize

    model = skeleton_of(config)
    shards = _divide(model, config, mesh)
    used: nn.Module = model
    if mesh.layout.pipeline > 1:
        from llmtrain.parallel.pipeline import PipelineStage

        used = PipelineStage(model, mesh)
    model.eval()
    materialize(model, [used], shards, device=device, dtype=torch.float32, source=source)
    return used.eval()


def seed_source(model: nn.Module, seed: int) -> Source:
    """Return the initial values, given by the seed and the model's tables."""
    from llmtrain.nn.initialize import fill, initializers_of

    table = initializers_of(model)

    def source(out: torch.Tensor, name: str, shard: Shard, start: int) -> None:
        fill(out, name, table[name], seed, shard, start)

    return source


def _groups(
    model: nn.Module,
    optimizer: OptimizerConfig,
    updates: Mapping[str, float],
    penalties: Mapping[str, Penalty],
) -> dict[str, Group]:
    """Return the optimizer group of each parameter of the whole model that trains."""
    from llmtrain.nn.stages import HasLevels

    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    levels = model.levels() if isinstance(model, HasLevels) else []
    return make_groups(shapes, rates(shapes, levels, optimizer), updates, penalties)


def _divide(model: nn.Module, config: ModelConfig, mesh: Mesh) -> dict[str, Shard]:
    """Divide the model by tables along the tensor and sequence axes, and return the divided weights; let its
    batch norms share their statistics."""
    from llmtrain.parallel.batch_norm import share_norms

    shards: dict[str, Shard] = {}
    share_norms(model, mesh)
    if mesh.layout.tensor > 1:
        from llmtrain.parallel.tensor import shard_tensors

        shards = shard_tensors(model, sharding_of(config), mesh)
    if mesh.layout.sequence > 1:
        from llmtrain.parallel.sequence import share_attention

        share_attention(model, mesh)
    if mesh.layout.sequence > 1 or mesh.layout.tensor_sequence:
        from llmtrain.parallel.tensor import share_sequence

        share_sequence(model, mesh)
    return shards


def _whole(parameter: nn.Parameter) -> Shard:
    from llmtrain.tensor_boxes import Shard

    return Shard(tuple(parameter.shape))
