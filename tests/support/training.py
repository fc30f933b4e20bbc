"""Real training in this process or in a pool's ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """The verb's configuration as the command line would compose it."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    from llmtrain.cli.main import conf_folder
    from llmtrain.cli.overrides import quote, text_keys

    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        quoted = [quote(override, text_keys(verb)) for override in overrides]
        config = hydra_compose(config_name=verb, overrides=quoted)
    mapping = OmegaConf.to_container(config, resolve=True)
    assert isinstance(mapping, dict)
    mapping.pop("experiment", None)
    return mapping  # type: ignore[return-value]


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


def open_loader(resolved: Any, before: Any = None, start_step: int = 0) -> Any:
    """What this process' rank reads of a run's training data; `before`: the encoded timeline of a checkpoint
    at `start_step`."""
    from llmtrain.data.loader import Loader
    from llmtrain.distributed import processes
    from llmtrain.families import family_of, open_sources
    from llmtrain.train.streaming import open_stream, plan_timeline

    config, layout = resolved.config, resolved.layout
    length = config.batch.sequence_length
    sources = open_sources(config.model, config.data, resolved.corpora, "train", length)
    timeline = plan_timeline(config, sources, before, start_step, print)
    return Loader(
        open_stream(config.data, sources, timeline, seed=config.seed),
        family_of(config.model).objective(config.model, config.data).collate,
        micro_size=layout.micro_size,
        data_rank=layout.coordinates(processes.rank()).data,
        data_size=layout.data,
    )


def train_steps(
    overrides: Sequence[str],
    stop: int,
    save_to: str | None = None,
    resume_from: str | None = None,
    device: str = "cpu",
) -> Trace:
    """Train to step `stop` with the engine that `overrides` name, in this process' rank.

    save_to: write a checkpoint under this folder at the end. resume_from: a checkpoint to go on from.
    """
    import tempfile

    from llmtrain.checkpoint import store
    from llmtrain.checkpoint.reader import Checkpoint
    from llmtrain.commands.build import build_engine
    from llmtrain.commands.loading import build_module
    from llmtrain.commands.pretrained import open_weights
    from llmtrain.commands.resolve import resolve
    from llmtrain.config import encode
    from llmtrain.distributed import processes
    from llmtrain.families import family_of, open_dataset
    from llmtrain.nn.initialize import initialize
    from llmtrain.optim.schedules import multiplier
    from llmtrain.tensor_boxes import Shard
    from llmtrain.train.evaluation import evaluate_dataset

    resolved = resolve(compose(overrides))
    config, layout = resolved.config, resolved.layout
    place = processes.pick_device(device)
    processes.start(place, single_process_group=config.engine == "deepspeed")
    objective = family_of(config.model).objective(config.model, config.data)
    checkpoint = Checkpoint.open(Path(resume_from)) if resume_from else None
    fresh = build_module(config.model, place)
    initialize(fresh, config.seed)
    source = None
    if resolved.pretrained is not None:
        source = open_weights(resolved.pretrained, config.model).source(config.seed)
        for name, parameter in fresh.named_parameters():
            source(parameter.detach().view(-1), name, Shard(tuple(parameter.shape)), 0)
    initial_weights = {name: p.detach().cpu().numpy() for name, p in fresh.named_parameters()}
    engine = build_engine(config, layout, place, objective, checkpoint, source)
    length = config.batch.sequence_length
    validation = open_dataset(config.model, config.data, resolved.corpora, "validation", length)
    data_rank = layout.coordinates(processes.rank()).data
    start = checkpoint.step if checkpoint else 0
    before = checkpoint.manifest["timeline"] if checkpoint else None
    loader = open_loader(resolved, before, start)
    losses, grad_norms = [], []
    for step, batch in zip(range(start, stop), loader.steps(start), strict=False):
        lr = config.optimizer.lr * multiplier(config.schedule, step, config.train.steps)
        result = engine.train_step(batch.micro_batches, lr=lr)
        losses.append(result.loss)
        grad_norms.append(result.grad_norm)
    validation_loss = evaluate_dataset(engine, validation, layout, data_rank, 0, 13).loss
    description = {
        "model": encode(config.model),
        "config": encode(config),
        "timeline": loader.stream.timeline.encode(),
    }
    folder = save_to or processes.from_main(tempfile.mkdtemp())
    saved = store.save(Path(folder), stop, engine, description, None)
    weights = {name: weight.numpy() for name, weight in Checkpoint.open(saved).weights().items()}
    processes.barrier()
    return Trace(losses, grad_norms, weights, initial_weights, validation_loss)
