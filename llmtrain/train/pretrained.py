"""`model=pretrained model.path=…`: start training from the weights of a folder, with a fresh optimizer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.config import MISSING, encode
from llmtrain.corpus.text_source import TextSource
from llmtrain.data.config import DataConfig
from llmtrain.errors import CheckpointError, ConfigError, Problem
from llmtrain.files import expand_home
from llmtrain.models.registry import family_of
from llmtrain.models.skeleton import of_vocabulary, skeleton_of
from llmtrain.nn.state import named_state
from llmtrain.objectives.reading import other_tokenizer
from llmtrain.tokenizers.folder import load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from llmtrain.checkpoint.reader import Checkpoint
    from llmtrain.interchange.trained import TrainedModel
    from llmtrain.models.huggingface.origin import Origin
    from llmtrain.nn.model_config import ModelConfig
    from llmtrain.parallel.materialize import Source
    from llmtrain.tensor_boxes import Shard

FAMILY = "pretrained"
"""The value of `model.family` that stands for the family of the model in the folder."""

LEAST_MATCHED = 0.5
"""The smallest share of a model's numbers that a folder must hold, so that the model can start from it."""
NAMES_SHOWN = 6
_OF_SEVERAL = re.compile(r"^head\.tasks\.[^.]+\.")
"""What the names of one of several heads begin with."""


@dataclass(frozen=True)
class Pretrained:
    """The folder that weights come from."""

    path: Path
    tokenizer: Path | None
    """File of the tokenizer that came with the weights."""
    origin: Origin | None = None
    """Settings of the Hugging Face folder that the weights were imported from."""
    keeps_head: bool = True
    """Whether training goes on with the head of the folder's model; False: with a new one from the seed."""
    grows: bool = False
    """Whether the vocabulary may be larger than the folder's."""

    def problems(self, corpora: TextSource, data: DataConfig | None = None) -> list[Problem]:
        """Return a problem if the corpora were prepared with another tokenizer than the model's."""
        if self.tokenizer is None:
            return []
        theirs = load_tokenizer(self.tokenizer).sha256
        if theirs in (corpora.tokenizer_sha256, getattr(corpora, "grown_from", None)):
            return []
        return [other_tokenizer(data, corpora.tokenizer_sha256, theirs, str(self.path), self.tokenizer)]


@dataclass(frozen=True)
class ModelPath:
    """The key of the section `model` that `expand` removes."""

    path: Path


@dataclass(frozen=True)
class PretrainedKeys:
    """The keys of a configuration with `model=pretrained` that no other dataclass holds."""

    model: ModelPath


def expand(mapping: Mapping[str, Any]) -> tuple[Mapping[str, Any], Pretrained | None]:
    """Return the composed configuration with the model that `model.path` holds, changed by the other keys of
    the section, and where its weights are. Return any other configuration unchanged, and None.

    Raise ConfigError without a path, CheckpointError for a folder that holds no model.
    """
    section = mapping.get("model") or {}
    if section.get("family") != FAMILY:
        return mapping, None
    changes = {key: value for key, value in section.items() if key not in ("family", "path")}
    path = section.get("path", MISSING)
    if path in (None, MISSING):
        allowed = "an import, a run, a checkpoint or a Hugging Face folder"
        raise ConfigError(Problem("model.path", "nothing", allowed, "set model.path=…"))
    from llmtrain.interchange.trained import describe, describe_checkpoint

    folder = expand_home(path)
    try:
        found = describe(folder)
    except CheckpointError:
        begun = _begun(mapping, folder)
        if begun is None:
            raise
        found = describe_checkpoint(begun)
    model = _merged(encode(found.config), changes)
    objective = mapping.get("objective") or encode(found.objective)
    expanded = {**mapping, "model": model, "objective": objective}
    return expanded, Pretrained(folder, found.tokenizer, found.origin)


def _begun(mapping: Mapping[str, Any], folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint of a resumed run that began with `folder`, which may be gone by now.

    Raise CheckpointError if the run began with another folder."""
    from llmtrain.checkpoint import retention
    from llmtrain.checkpoint.reader import Checkpoint

    resume = mapping["checkpoint"]["resume"]
    own = expand_home(mapping["run"]["dir"]) / "checkpoints"
    if resume == "never":
        return None
    held = retention.list_steps(own)
    if not held and resume != "auto":
        held = retention.list_held(expand_home(resume))
    if not held:
        return None
    checkpoint = Checkpoint.open(held[-1])
    before = checkpoint.manifest.get("started_from")
    if before is None or Path(before).name != folder.name:
        got = f"{folder}, which holds no model, over a run that began with {before or 'weights of the seed'}"
        raise CheckpointError(
            Problem("model.path", got, remedy="give the folder that the run began with, or another run.dir")
        )
    return checkpoint


def _merged(section: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(section)
    for key, value in changes.items():
        before = merged.get(key)
        both = isinstance(before, Mapping) and isinstance(value, Mapping)
        merged[key] = _merged(before, value) if both else value  # type: ignore[arg-type]
    return merged


@dataclass(frozen=True)
class StartingWeights:
    """The source of each parameter: the folder, or, for a parameter that it lacks, the seed."""

    trained: TrainedModel
    model: ModelConfig
    renamed: Mapping[str, str]
    """Canonical name → the name that the folder has for it, where they differ."""
    new: Mapping[str, tuple[int, ...]]
    """Canonical name → shape of the parameters that the folder lacks."""
    unused: Mapping[str, tuple[int, ...]]
    """The same of the parameters of the folder that the model lacks."""
    grown: Mapping[str, int] = field(default_factory=dict)
    """Canonical name → rows that a larger vocabulary adds to the folder's."""

    @property
    def untrained(self) -> frozenset[str]:
        """Names of the model's parameters that have never been trained when the run starts."""
        return frozenset(self.new) | (frozenset(self.trained.fresh) - frozenset(self.unused))

    def source(self, seed: int) -> Source:
        """Return a function that reads or creates any part of any parameter."""
        from llmtrain.checkpoint.reader import read_part
        from llmtrain.engine.build import seed_source

        read, make = self.trained.reader(), seed_source(skeleton_of(self.model), seed)

        def source(out: Tensor, name: str, shard: Shard, start: int) -> None:
            if name in self.new:
                make(out, name, shard, start)
            elif name in self.grown:
                read_part(self._larger(name), out, name, shard, start)
            else:
                read(out, self.renamed.get(name, name), shard, start)

        return source

    def _larger(self, name: str) -> Tensor:
        """Return a weight with the rows that a larger vocabulary adds, each the mean of the others."""
        import torch

        weight = self.trained.weights[self.renamed.get(name, name)].float()
        mean = weight.double().mean(0, keepdim=True).float()
        return torch.cat([weight, mean.expand(self.grown[name], *weight.shape[1:])])

    def notes(self) -> list[str]:
        """Return one line for the new parameters and one for the unused, if there are any."""
        lines = {
            "new, started from the seed": self.new,
            f"unused of {self.trained.source}": self.unused,
        }
        said = [f"{what}: {_listed(shapes)}" for what, shapes in lines.items() if shapes]
        if self.grown:
            named = ", ".join(f"{name} (+ {rows})" for name, rows in self.grown.items())
            said.append(f"rows of new tokens, each the mean of the others: {named}")
        return said


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return the names and shapes of the first, and the counts of all."""
    named = [
        f"{name} ({' × '.join(map(str, shape)) or 'one number'})"
        for name, shape in list(shapes.items())[:NAMES_SHOWN]
    ]
    rest = len(shapes) - len(named)
    more = f" and {rest:,} more, which environment.json of the run lists" if rest else ""
    count = f"{len(shapes):,} parameter{'s' if len(shapes) > 1 else ''}"
    return f"{', '.join(named)}{more}; {sum(map(prod, shapes.values())):,} numbers in {count}"


def open_weights(pretrained: Pretrained, model: ModelConfig) -> StartingWeights:
    """Return the weights that `model` starts from.

    Raise CheckpointError, one line each, for parameters that the folder holds in another shape, and for a
    folder that has less than LEAST_MATCHED of the model: it belongs to another model.
    """
    from llmtrain.interchange.trained import load_trained

    trained = load_trained(pretrained.path)
    held, ours = _shapes(trained.config), _shapes(model)
    theirs = held
    if not pretrained.keeps_head:
        theirs = {name: shape for name, shape in held.items() if not name.startswith("head.")}
    renamed = _renamed(model, ours, theirs)
    theirs = {**theirs, **{name: theirs[known] for name, known in renamed.items()}}
    where = f"model.path={pretrained.path}"
    grown = _grown(trained.config, model, ours, theirs) if pretrained.grows else {}
    theirs = {**theirs, **{name: ours[name] for name in grown}}
    problems = [
        Problem(
            where,
            f"{name} of shape {theirs[name]}",
            f"{name} of shape {shape}",
            "do not set the keys of the model that change its size",
        )
        for name, shape in ours.items()
        if theirs.get(name, shape) != shape
    ]
    if problems:
        raise CheckpointError(problems[:8])
    new = {name: shape for name, shape in ours.items() if name not in theirs}
    total = sum(map(prod, ours.values()))
    matched = total - sum(map(prod, new.values()))
    if matched < LEAST_MATCHED * total:
        raise CheckpointError(
            Problem(
                where,
                f"weights for {matched / total:.1%} of the model, {len(ours) - len(new):,} of "
                f"{len(ours):,} parameters (none for {next(iter(new))})",
                f"{LEAST_MATCHED:.0%} or more",
                "leave the keys of the model as the folder has them, or train from the seed",
            )
        )
    used = {*renamed.values(), *(ours.keys() & theirs.keys())}
    unused = {name: shape for name, shape in held.items() if name not in used}
    return StartingWeights(trained, model, renamed, new, unused, grown)


def _grown(
    before: Any, model: Any, ours: Mapping[str, tuple[int, ...]], theirs: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
    """Return the parameters with a row for each token of a vocabulary that is larger than the folder's, and
    the number of new rows."""
    size, needed = before.vocab_size, model.vocab_size
    if size is None or needed is None or needed <= size:
        return {}
    return {
        name: needed - size
        for name in of_vocabulary(model, skeleton_of(model))
        if theirs.get(name) == (size, *ours[name][1:])
    }


def _renamed(
    model: ModelConfig, ours: Mapping[str, tuple[int, ...]], theirs: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """Return the parameters of a task head that start from others of the folder, and their names there."""
    found = {}
    for module, known in family_of(model).aliases.items():
        for name, shape in ours.items():
            of_one = _OF_SEVERAL.sub("head.", name)
            other = f"{known}.{of_one.removeprefix(f'{module}.')}"
            if of_one.startswith(f"{module}.") and name not in theirs and theirs.get(other) == shape:
                found[name] = other
    return found


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(values.shape) for name, values in named_state(skeleton_of(model)).items()}
