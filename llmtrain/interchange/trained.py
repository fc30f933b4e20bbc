"""A trained model for use: from a run folder, a checkpoint, an import, or a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from llmtrain.checkpoint import retention
from llmtrain.checkpoint.finite import FiniteCheck
from llmtrain.checkpoint.manifest import MANIFEST, WEIGHT, Base
from llmtrain.checkpoint.reader import Checkpoint, Weights, read_part
from llmtrain.config import decode, decode_json, short
from llmtrain.distributed import processes
from llmtrain.errors import CheckpointError, ConfigError, Problem, printable
from llmtrain.files import expand_home
from llmtrain.interchange import huggingface
from llmtrain.interchange.base import Given, base_of, with_base
from llmtrain.interchange.generation_settings import check_generation
from llmtrain.models.huggingface.form import Settings
from llmtrain.models.huggingface.origin import Origin
from llmtrain.models.registry import family_of, model_config_type
from llmtrain.models.skeleton import skeleton_of
from llmtrain.nn.model_config import ModelConfig
from llmtrain.nn.state import named_state
from llmtrain.objectives.base import ObjectiveConfig
from llmtrain.objectives.registry import objective_config_type, objective_of_head
from llmtrain.standard_streams import print_note
from llmtrain.tensor_boxes import Shard
from llmtrain.tokenizers.folder import find_tokenizer

if TYPE_CHECKING:
    from llmtrain.parallel.materialize import Source
    from llmtrain.parallel.mesh import Mesh
    from llmtrain.tokenizers.base import Tokenizer


NAMES_SHOWN = 20
"""Of a list in a note."""


@dataclass(frozen=True)
class TrainedModel:
    """Weights with what is needed to use them."""

    source: Path
    """The folder that they came from."""
    config: ModelConfig
    objective: ObjectiveConfig
    """What it learned by; of a folder that does not say, what models of its family learn by."""
    weights: Mapping[str, torch.Tensor]
    """Canonical name → fp32."""
    tokenizer_path: Path | None
    step: int | None
    """Optimizer steps done; None for a Hugging Face folder."""
    sequence_length: int | None
    """That it was trained on; None where it was trained elsewhere."""
    fresh: tuple[str, ...] = ()
    """Weights that no training has seen: heads that a folder lacked."""
    dtype: torch.dtype = torch.float32
    """Of all weights where they came from, as long as nothing was trained."""
    origin: Origin | None = None
    """The settings of the Hugging Face folder that it came from, also through training."""
    base: Base | None = None
    """The folder of the weights that its checkpoint leaves out."""
    left_out: frozenset[str] = frozenset()
    """Their names."""

    def learned_by(self, objective: ObjectiveConfig | None) -> TrainedModel:
        """Return the model as if it had learned by this objective; None: by its own. Raise ConfigError for
        one that needs another model."""
        if objective is None:
            return self
        kind, head = family_of(self.config).kind, "the head of a task" if self.config.task else "no such head"
        if not objective.trains(kind):
            got = f"{objective.kind} with a model of kind {kind}"
            raise ConfigError(Problem("objective", got, f"a model of kind {' or '.join(objective.teaches)}"))
        if objective.has_task_head != (self.config.task is not None):
            got = f"{objective.kind} with a model that has {head}"
            raise ConfigError(Problem("objective", got, "null: what the model learned by", "leave it out"))
        if problems := list(objective.length_problems(self.sequence_length or 1, self.config)):
            raise ConfigError(problems)
        return replace(self, objective=objective)

    def build(self, device: torch.device) -> nn.Module:
        """The module on `device`, fp32, in evaluation mode. Raises CheckpointError for weights that are not
        finite."""
        module = build_module(self.config, device)
        check = FiniteCheck()
        load_weights(module, self.weights, check.look)
        check.refuse(str(self.source))
        return module.eval()

    def build_over(self, mesh: Mesh, device: torch.device) -> nn.Module:
        """The part of it that this process of `mesh` holds, which is called as the whole is, by all
        processes together. Raises CheckpointError, on all of them, for weights that are not finite."""
        from llmtrain.engine.build import build_for_use

        if mesh.layout.world_size == 1:
            return self.build(device)
        check, read = FiniteCheck(), self.reader()

        def source(out: torch.Tensor, name: str, shard: Shard, start: int) -> None:
            read(out, name, shard, start)
            check.look(name, out)

        model = build_for_use(self.config, mesh, device, source)
        processes.agree(lambda: check.refuse(str(self.source)))
        return model

    def reader(self) -> Source:
        """What gives any part of any weight."""
        weights = self.weights
        if isinstance(weights, Weights):
            return weights.read_into
        return lambda out, name, shard, start: read_part(weights[name], out, name, shard, start)

    @property
    def own_end_id(self) -> int | None:
        """The id that ends the texts that it was trained on here; None where it was not."""
        if self.sequence_length is None or self.tokenizer_path is None:
            return None
        of_answers = self.objective.end_ids
        return of_answers[0] if of_answers else self.tokenizer().eos_id

    def tokenizer(self) -> Tokenizer:
        """Raises CheckpointError when there is none with the weights."""
        from llmtrain.tokenizers.folder import load_tokenizer

        if self.tokenizer_path is None:
            raise CheckpointError(
                Problem(str(self.source), "no tokenizer", "a language model's checkpoint or export")
            )
        return load_tokenizer(self.tokenizer_path)


def load_trained(path: Path, base: Given | None = None) -> TrainedModel:
    """What a user means by `path`. Raises CheckpointError when it is none of these or is damaged.

    base: where to look first for the weights that a checkpoint leaves out."""
    path = expand_home(path)
    if path.is_file():
        remedy = f"import it first: llmtrain import source={path} output=…"
        raise CheckpointError(Problem(str(path), "a file", "a run, checkpoint or model folder", remedy))
    if (path / "config.json").exists():
        imported = huggingface.import_folder(path)
        if imported.fresh:
            print_note(fresh_note(imported.fresh))
        if imported.unknown:
            print_note(unknown_note(imported.unknown))
        return TrainedModel(
            path,
            imported.config,
            _usual_objective(imported.config),
            imported.weights,
            find_tokenizer(path),
            None,
            None,
            imported.fresh,
            imported.dtype,
            imported.origin,
        )
    checkpoint = with_base(retention.find(path, print_note), base)
    _say_which(path, checkpoint)
    is_ours = not checkpoint.is_imported
    fresh = tuple(checkpoint.manifest.get("fresh", ()))
    if fresh:
        print_note(frozen_note(fresh) if is_ours else fresh_note(fresh))
    return TrainedModel(
        source=checkpoint.path,
        config=(config := config_of(checkpoint)),
        objective=objective_of(checkpoint, config),
        weights=checkpoint.weights(),
        tokenizer_path=checkpoint.tokenizer,
        step=checkpoint.step,
        sequence_length=(checkpoint.manifest["config"].get("batch") or {}).get("sequence_length")
        if is_ours
        else None,
        fresh=fresh,
        dtype=getattr(torch, checkpoint.manifest.get("dtype", "float32")),
        origin=_origin_of(checkpoint),
        base=base_of(checkpoint),
        left_out=checkpoint.left_out,
    )


def _say_which(path: Path, checkpoint: Checkpoint) -> None:
    """Say which step of a run is taken, where the run was asked to find its best one."""
    config = checkpoint.manifest.get("config") or {}
    asked = (config.get("checkpoint") or {}).get("best") or (config.get("early_stopping") or {}).get("metric")
    if not asked or path in (checkpoint.path, checkpoint.path.parent):
        return
    if path.name == retention.BEST and not path.exists():
        print_note(f"note: step {checkpoint.step:,}, the best of {path.parent}")
        return
    best = retention.best_of(path)
    if best is not None and best.path != checkpoint.path:
        print_note(
            f"note: step {checkpoint.step:,} is the newest of {path}; {path}/best is {best.path.name}, "
            f"which has the best {best.metric}"
        )


class Described(NamedTuple):
    """What a folder says of its model, without a look at the weights."""

    config: ModelConfig
    objective: ObjectiveConfig
    tokenizer: Path | None
    """Its file."""
    origin: Origin | None
    data: Mapping[str, Any] | None = None
    """The section `data` of the run that trained it."""


def describe(path: Path) -> Described:
    """Return what `load_trained` would find. Raise CheckpointError as it does."""
    path = expand_home(path)
    if (path / "config.json").exists():
        imported = huggingface.import_folder(path)
        usual = _usual_objective(imported.config)
        return Described(imported.config, usual, find_tokenizer(path), imported.origin)
    held = retention.list_held(path)
    if not held:
        got = "no checkpoint" if path.exists() else "no such folder"
        allowed = "a run, a checkpoint, an import or a Hugging Face folder"
        raise CheckpointError(Problem(str(path), got, allowed))
    return describe_checkpoint(Checkpoint.open(held[-1]))


def describe_checkpoint(checkpoint: Checkpoint) -> Described:
    """Return what a checkpoint says of its model."""
    config = config_of(checkpoint)
    objective = objective_of(checkpoint, config)
    data = (checkpoint.manifest.get("config") or {}).get("data")
    return Described(config, objective, checkpoint.tokenizer, _origin_of(checkpoint), data)


def objective_of(checkpoint: Checkpoint, config: ModelConfig) -> ObjectiveConfig:
    """Return what the model learned by; of an import, what models of its family learn by.

    Raise CheckpointError for an objective that is none."""
    section = (checkpoint.manifest.get("config") or {}).get("objective")
    if not section:
        return _usual_objective(config)
    where = str(checkpoint.path / MANIFEST)
    try:
        return decode(objective_config_type(section), section)
    except ConfigError as error:
        problems = (problem.of_file(where, "config.objective") for problem in error.problems)
        raise CheckpointError(problems) from error


def _usual_objective(config: ModelConfig) -> ObjectiveConfig:
    if config.task is not None:
        return objective_of_head(config.task)
    section = family_of(config).objective(config)
    return decode(objective_config_type(section), section)


def fresh_note(names: tuple[str, ...]) -> str:
    """What a user is told of heads that a folder lacked."""
    listed = ", ".join(names)
    return f"note: newly initialized, since the folder lacks them: {listed}; they are random until trained"


def frozen_note(names: tuple[str, ...]) -> str:
    """What a user is told of parameters that a run froze as the seed made them."""
    return f"note: frozen at their random initial values, which no training has changed: {listed(names)}"


def unknown_note(keys: tuple[str, ...]) -> str:
    """What a user is told of keys that nothing here knows, nor transformers where it has the model."""
    return f"note: unknown keys of config.json, which change nothing here: {listed(keys)}"


def listed(names: Sequence[str]) -> str:
    """Names from a file of others, as a note shows them."""
    more = f", and {len(names) - NAMES_SHOWN:,} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(printable(short(name)) for name in names[:NAMES_SHOWN]) + more


def config_of(checkpoint: Checkpoint) -> ModelConfig:
    """The model that a checkpoint says it holds. Raises CheckpointError for one that its weights are not."""
    checkpoint.require("model", *(() if checkpoint.is_imported else ("config",)))
    model = checkpoint.manifest["model"]
    where = str(checkpoint.path / MANIFEST)
    shapes = [entry["shape"] for entry in checkpoint.manifest["tensors"][WEIGHT].values()]
    is_whole = not checkpoint.left_out  # else what it left out is compared when it is read
    _check_layers(checkpoint, "model", model)
    try:
        config: ModelConfig = decode(model_config_type(model), model)
        expected = config.parameter_count() + config.statistics_count()
    except ConfigError as error:
        raise CheckpointError(problem.of_file(where, "model") for problem in error.problems) from error
    if is_whole and (stored := sum(map(prod, shapes))) != expected:
        got = f"a model of {expected:,} parameters"
        raise CheckpointError(Problem(f"{where}: model", got, f"{stored:,}, as many as are stored"))
    return config


def _check_layers(checkpoint: Checkpoint, name: str, model: Mapping[str, Any]) -> None:
    """Raise CheckpointError for more layers than there are weights, before anything is made of each."""
    most = len(checkpoint.weight_names)
    for key, value in model.items():
        if key.endswith("layers") and isinstance(value, (int, float)) and value > most:
            where = f"{checkpoint.path / MANIFEST}: {name}.{key}"
            allowed = f"no more than its {most:,} tensors, each layer's own"
            raise CheckpointError(Problem(where, f"{value:,}", allowed))


def _origin_of(checkpoint: Checkpoint) -> Origin | None:
    said = checkpoint.manifest.get("origin")
    if said is None:
        return None
    origin = decode_json(Origin, said)
    _check_layers(checkpoint, "origin.model", origin.model)
    where = checkpoint.path / MANIFEST
    check_generation(Settings(where, origin.generation, prefix="origin.generation."))
    return origin


def build_module(config: ModelConfig, device: torch.device) -> nn.Module:
    """The module with memory for its weights but no values in them."""
    # As to_empty does, which loads torch's compiler for a model on the meta device.
    return skeleton_of(config)._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))


@torch.no_grad()
def load_weights(
    module: nn.Module,
    weights: Mapping[str, torch.Tensor],
    look: Callable[[str, torch.Tensor], None] = lambda name, weight: None,
) -> None:
    """Copy `weights` into the module's parameters and statistics; `look` sees each. Raises CheckpointError
    when names or shapes differ."""
    parameters = named_state(module)
    if set(parameters) != set(weights):
        missing, extra = sorted(set(parameters) - set(weights)), sorted(set(weights) - set(parameters))
        raise CheckpointError(
            Problem(
                "weights",
                f"{len(missing)} missing {missing[:3]}, {len(extra)} unknown {extra[:3]}",
                "the model's",
            )
        )
    for name, parameter in parameters.items():
        weight = weights[name]
        if parameter.shape != weight.shape:
            raise CheckpointError(
                Problem(name, f"shape {tuple(weight.shape)}", f"shape {tuple(parameter.shape)}")
            )
        look(name, weight)
        parameter.copy_(weight)
