"""Real training in this process or in a pool's ranks."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import ranks

REPOSITORY = Path(__file__).resolve().parents[2]

TINY_GPT = (
    "model=gpt_tiny",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_heads=4",
    "batch.global_size=8",
    "batch.micro_size=2",
    "batch.sequence_length=32",
)


def compose(overrides: Sequence[str], verb: str = "train") -> dict[str, Any]:
    """The verb's configuration as the command line would compose it.

    Hydra takes 0.2 s to read the presets: what they come to is kept, and the keys of sections (a.b=c), which
    come after them in any order of the overrides, are set as Hydra sets them.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    from llmtrain.cli.overrides import SECTION_KEY, quote, text_keys

    texts = text_keys(verb)
    quoted = [quote(override, texts) for override in overrides]
    of_sections = [override for override in quoted if SECTION_KEY.match(override)]
    config = copy.deepcopy(_presets(verb, tuple(o for o in quoted if o not in of_sections)))
    for override in OverridesParser.create().parse_overrides(of_sections):
        OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
    mapping = OmegaConf.to_container(config, resolve=True)
    assert isinstance(mapping, dict)
    mapping.pop("experiment", None)
    return mapping  # type: ignore[return-value]


@functools.cache
def _presets(verb: str, overrides: tuple[str, ...]) -> Any:
    """What Hydra composes of them, interpolations unresolved."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    from llmtrain.cli.explain import conf_folder

    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        return hydra_compose(config_name=verb, overrides=list(overrides))


@dataclass
class Trace:
    """What a stretch of training came to, comparable bit by bit."""

    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, Any]
    """Canonical name → whole fp32 weight, as numpy."""
    initial_weights: dict[str, Any]
    """What the seed gives, or the folder of model=pretrained, before any step."""
    validation_loss: float


def open_loader(resolved: Any, before: Any = None, start_step: int = 0, objective: Any = None) -> Any:
    """What this process' rank reads of a run's training data; `before`: the encoded timeline of a checkpoint
    at `start_step`."""
    from llmtrain.data.loader import Loader
    from llmtrain.data.streaming import open_stream, plan_timeline
    from llmtrain.distributed import processes

    config, layout = resolved.config, resolved.layout
    length = config.batch.sequence_length
    sources = config.objective.open(config.model, config.data, resolved.corpora, "train", length)
    timeline = plan_timeline(config, sources, before, start_step, print)
    return Loader(
        open_stream(config.data, sources, timeline, seed=config.seed),
        (objective or config.objective.build(config.model, config.data, resolved.corpora)).collate,
        micro_size=layout.micro_size,
        data_rank=layout.coordinates(processes.rank()).data,
        data_size=layout.data,
    )


def train(
    size: int,
    overrides: Sequence[str],
    stop: int,
    save_to: Path | None = None,
    resume_from: Path | None = None,
    save_at: int | None = None,
) -> list[Trace]:
    """`train_steps` on each of the pool's `size` ranks; → their traces in rank order.

    The configuration is composed here, once: Hydra takes a good part of what a rank's few steps take.
    """
    paths = [None if path is None else str(path) for path in (save_to, resume_from)]
    return ranks.run(size, train_composed, composed(tuple(overrides)), stop, *paths, "cpu", save_at)


composed = functools.cache(compose)


def train_steps(overrides: Sequence[str], stop: int, device: str = "cpu") -> Trace:
    """Train to step `stop` with the engine that `overrides` name, in this process' rank."""
    return train_composed(compose(overrides), stop, device=device)


def train_composed(
    mapping: dict[str, Any],
    stop: int,
    save_to: str | None = None,
    resume_from: str | None = None,
    device: str = "cpu",
    save_at: int | None = None,
) -> Trace:
    """Train to step `stop` as the configuration says, in this process' rank.

    save_to: write a checkpoint under this folder after step `save_at`, or at the end if that is None.
    resume_from: a checkpoint to go on from.
    """
    import tempfile

    from llmtrain.checkpoint import store
    from llmtrain.checkpoint.reader import Checkpoint
    from llmtrain.config import encode
    from llmtrain.distributed import processes
    from llmtrain.engine.build import build_engine
    from llmtrain.interchange.trained import build_module
    from llmtrain.nn.initialize import initialize
    from llmtrain.objectives.reading import open_dataset
    from llmtrain.optim.schedules import multiplier
    from llmtrain.tensor_boxes import Shard
    from llmtrain.train.evaluation import evaluate_dataset
    from llmtrain.train.pretrained import open_weights
    from llmtrain.train.resolve import resolve
    from llmtrain.train.starting import penalties_of

    resolved = resolve(mapping)
    config, layout = resolved.config, resolved.layout
    place = processes.pick_device(device)
    processes.start(place, single_process_group=config.engine == "deepspeed")
    objective = config.objective.build(config.model, config.data, resolved.corpora)
    checkpoint = Checkpoint.open(Path(resume_from)) if resume_from else None
    fresh = build_module(config.model, place)
    initialize(fresh, config.seed)
    source, new = None, []
    if resolved.pretrained is not None:
        starting = open_weights(resolved.pretrained, config.model)
        source, new = starting.source(config.seed), list(starting.new)
        for name, parameter in fresh.named_parameters():
            source(parameter.detach().view(-1), name, Shard(tuple(parameter.shape)), 0)
    initial_weights = {name: p.detach().cpu().numpy() for name, p in fresh.named_parameters()}
    penalties = penalties_of(config, new)
    engine = build_engine(config, layout, place, objective, checkpoint, source, penalties)
    length = config.batch.sequence_length
    validation = open_dataset(
        config.objective, config.model, config.data, resolved.corpora, "validation", length
    )
    data_rank = layout.coordinates(processes.rank()).data
    start = checkpoint.step if checkpoint else 0
    before = checkpoint.manifest["timeline"] if checkpoint else None
    loader = open_loader(resolved, before, start, objective)
    description = {
        "model": encode(config.model),
        "config": encode(config),
        "timeline": loader.stream.timeline.encode(),
    }
    losses, grad_norms = [], []
    for step, batch in zip(range(start, stop), loader.steps(start), strict=False):
        lr = config.optimizer.lr * multiplier(config.schedule, step, config.train.steps)
        result = engine.train_step(batch.micro_batches, lr=lr)
        losses.append(result.loss)
        grad_norms.append(result.grad_norm)
        if step + 1 == save_at:
            assert save_to is not None
            store.save(Path(save_to), save_at, engine, description, None)
    validation_loss = evaluate_dataset(engine, validation, layout, data_rank, 0, 13).loss
    own = save_to if save_to and save_at is None else processes.from_main(tempfile.mkdtemp())
    saved = store.save(Path(own), stop, engine, description, None)
    weights = {name: weight.numpy() for name, weight in Checkpoint.open(saved).weights().items()}
    processes.barrier()
    return Trace(losses, grad_norms, weights, initial_weights, validation_loss)
