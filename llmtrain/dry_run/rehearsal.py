"""Rehearse one rank of a run: build its engine, and take one step."""

from __future__ import annotations

import re
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from llmtrain.data.loader import MicroBatch
from llmtrain.distributed import processes
from llmtrain.dry_run.imagined import Imagination, modules_stay
from llmtrain.dry_run.record import Rehearsal, Traffic
from llmtrain.errors import ConfigError, Problem
from llmtrain.standard_streams import print_note
from llmtrain.train.resolve import Resolved
from llmtrain.train.run_data import RunData
from llmtrain.train.starting import StartingPoint

LAYER = re.compile(r".*?\.\d+(?=\.)")
"""Beginning of a parameter's name that says its layer, such as blocks.3 or encoder.0."""
NAME_DATA = "give data.path=…, whose first rows are used"
FEWEST_WORDS = 5
"""Token ids below are special in most vocabularies."""


def rehearse(resolved: Resolved, rank: int) -> Rehearsal:
    """Act as the rank `rank` of the run for one step, alone and without memory for its model.

    A step of many micro-batches is cut to those that a pipeline holds at once and one more: later ones repeat
    these.

    Raise ConfigError for an objective whose rows cannot be made up."""
    from llmtrain.engine.build import build_engine

    resolved = _cut(resolved)
    config, layout = resolved.config, resolved.layout
    started, worked = time.perf_counter(), time.process_time()
    if layout.world_size > 1 or config.engine == "deepspeed":
        processes.imagine(rank, layout.world_size)
    if resolved.corpora is not None:
        objective = config.objective.build(config.model, config.data, resolved.corpora)
        batches = _read(resolved, objective)
    else:
        objective, batches = _made_up(resolved)
    device = torch.device("cpu")
    with ExitStack() as pretended:
        imagination = pretended.enter_context(Imagination(layout))
        pretended.enter_context(modules_stay())
        if config.engine == "deepspeed":
            from llmtrain.parallel import upstream

            upstream.import_deepspeed()
            pretended.enter_context(upstream.imagined_peers())
        engine = build_engine(config, layout, device, objective, None, lambda *_: None)
        if layout.pipeline > 1:
            engine.imagine_neighbours()  # type: ignore[attr-defined]
        if layout.zero == 3:  # its first step learns the order of modules, which all others go by
            engine.train_step(batches, lr=config.optimizer.lr)
        imagination.traffic = Traffic()
        imagination.peak_bytes = imagination.held_bytes
        built = time.perf_counter()
        engine.train_step(batches, lr=config.optimizer.lr)
        done = time.perf_counter()
        return Rehearsal(
            rank=rank,
            micro_batches=layout.accumulation,
            coordinates=layout.coordinates(rank),
            layers=len({found[0] for name in engine.setup.parameters if (found := LAYER.match(name))}),
            parameters=sum(shard.numel for shard in engine.setup.shards.values()),
            held_bytes=imagination.held_bytes,
            peak_bytes=imagination.peak_bytes,
            step=imagination.traffic,
            setup_seconds=built - started,
            step_seconds=done - built,
            processor_seconds=time.process_time() - worked,
        )


def prepare(resolved: Resolved) -> None:
    """Import what rehearsals need, for processes that are forked from this one."""
    from llmtrain.engine import build  # noqa: F401

    if resolved.config.engine == "deepspeed":
        from llmtrain.parallel import upstream

        upstream.import_deepspeed()


def _cut(resolved: Resolved) -> Resolved:
    layout = resolved.layout
    made = min(layout.accumulation, layout.pipeline + 1)
    size = made * layout.micro_size * layout.data
    batch = replace(resolved.config.batch, global_size=size)
    return replace(
        resolved,
        config=replace(resolved.config, batch=batch),
        layout=replace(layout, accumulation=made, global_size=size),
    )


def _read(resolved: Resolved, objective: Any) -> list[MicroBatch]:
    """Return the micro-batches of the rank's first step from its corpora."""
    data = RunData(resolved, print_note)
    stream = data.open_stream(data.open(), StartingPoint(None))
    rank = resolved.layout.coordinates(processes.rank()).data
    loader = data.open_loader(stream, objective, rank, pin_memory=False)
    return next(iter(loader.steps(0))).micro_batches


def _made_up(resolved: Resolved) -> tuple[Any, list[MicroBatch]]:
    """Return the objective, and micro-batches of random tokens, each row one document."""
    config, layout = resolved.config, resolved.layout
    B, W = layout.micro_size, config.batch.sequence_length + 1
    words = config.model.vocab_size or 0
    if (read := config.objective.data) != "tokens":
        has_rows = read in ("table", "tasks")
        got = f"objective={config.objective.kind} over {read}, whose rows cannot be made up"
        raise ConfigError(_not_made_up(got, NAME_DATA if has_rows else "leave dry_run out"))
    without = f"objective={config.objective.kind} without data"
    generator = np.random.default_rng(config.seed)
    found = []
    try:
        objective = config.objective.build(config.model, config.data, None)
    except ValueError:  # it needs ids that a tokenizer has
        raise ConfigError(_not_made_up(without, NAME_DATA)) from None
    for i in range(layout.accumulation):
        first = (layout.coordinates(processes.rank()).data * layout.accumulation + i) * B
        raw = {
            "tokens": generator.integers(FEWEST_WORDS, words, (B, W)),
            "documents": np.zeros((B, W), np.int64),
            "keys": generator.integers(0, 1 << 62, B),
        }
        try:
            batch = objective.collate(raw)
        except KeyError:  # it reads other arrays
            raise ConfigError(_not_made_up(without, NAME_DATA)) from None
        found.append(MicroBatch(batch, range(first, first + B), np.arange(first, first + B)))
    return objective, found


def _not_made_up(got: str, remedy: str) -> Problem:
    return Problem("dry_run", got, "an objective over rows of tokens alone, such as causal_lm", remedy)
