"""method=features: a run whose one step is to solve the head over the vectors of a frozen trunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmtrain import files
from llmtrain.checkpoint.finite import FiniteCheck
from llmtrain.data.loader import Reading
from llmtrain.distributed import processes
from llmtrain.engine.base import Engine
from llmtrain.engine.build import build_engine
from llmtrain.errors import DataError, Problem
from llmtrain.features.path import SolvedHead, facts, solve_head, table
from llmtrain.features.vectors import Vectorizer, build_trunk
from llmtrain.objectives.base import Objective
from llmtrain.parallel.materialize import Source
from llmtrain.parallel.mesh import Mesh
from llmtrain.tensor_boxes import Shard
from llmtrain.train.loop import Hooks, Observer, Outcome, Schedule, train
from llmtrain.train.resolve import Resolved
from llmtrain.train.starting import Say, open_starting_weights, refuse_infinite
from llmtrain.train.weight_record import WeightRecord, record_weights

FACTS = "features.json"
"""File of the run folder: the strengths that were tried, with their losses."""


def build_solved_engine(
    resolved: Resolved, device: torch.device, objective: Objective, say: Say
) -> tuple[Engine, WeightRecord]:
    """Return an engine of the model with a solved head. All ranks call it together.

    Raise DataError without rows to choose the strength of regularization by.
    """
    config, pretrained = resolved.config, resolved.pretrained
    assert pretrained is not None, "it was checked"
    _refuse_blind_choice(resolved)
    check = FiniteCheck()
    starting = open_starting_weights(pretrained, config.model, say)
    source = starting.source(config.seed)
    solved = _solve(resolved, device, objective, check.watching(source), say)
    refuse_infinite(check, pretrained)
    for line in table(solved):
        say(line)
    processes.on_main(lambda: _write_facts(config.run.dir / FACTS, solved))
    engine = build_engine(config, resolved.layout, device, objective, None, _replaced(source, solved))
    return engine, record_weights(config, pretrained, None, starting)


def conclude(
    engine: Engine,
    reading: Reading,
    hooks: Hooks,
    observer: Observer,
    steps: int,
    asked_to_stop: Callable[[], bool],
) -> Outcome:
    """Evaluate and save after the solve, as the loop does after the last step."""
    schedule = Schedule(
        start_step=steps,
        steps=steps,
        evaluate_every=None,
        evaluate_at_start=False,
        save_every=None,
        evaluation_owed=True,
    )
    saving = replace(hooks, evaluated_late=lambda loss: hooks.save(steps, loss, False))
    return train(engine, reading, saving, observer, schedule, asked_to_stop)


def _refuse_blind_choice(resolved: Resolved) -> None:
    count, corpora = len(resolved.config.features.strengths), resolved.corpora
    if count > 1 and corpora is not None and corpora.without("validation"):
        got = f"no rows, by which to choose among {count} strengths of regularization"
        remedy = "give data.validation=…, or one strength: features.strengths=[0.01]"
        raise DataError(Problem("data.validation", got, "a validation split", remedy))


def _solve(resolved: Resolved, device: torch.device, objective: Any, source: Source, say: Say) -> SolvedHead:
    config = resolved.config
    vectorizer = Vectorizer(
        build_trunk(config.model, Mesh(resolved.layout), device, source),
        config.model,
        objective,
        device=device,
        precision=config.precision,
        cache=files.expand_home(config.data.cache.dir),  # type: ignore[union-attr]
        say=say,
    )
    splits = ["train"] if len(config.features.strengths) == 1 else ["train", "validation"]
    examples = {split: _examples(resolved, split) for split in splits}
    vectors = {split: vectorizer.vectors(split, of_split) for split, of_split in examples.items()}

    def solve() -> Any:
        if not processes.is_main():
            return None
        rows = {split: (vectors[split], np.array(examples[split].split.array("label"))) for split in splits}
        model: Any = config.model
        return solve_head(model.task, config.features, rows["train"], rows.get("validation"))  # type: ignore[arg-type]

    solved: SolvedHead = processes.from_main(processes.agree(solve))
    return solved


def _examples(resolved: Resolved, split: str) -> Any:
    config = resolved.config
    length = config.batch.sequence_length
    return config.objective.open(config.model, config.data, resolved.corpora, split, length)[""]


def _replaced(source: Source, solved: SolvedHead) -> Source:
    """Return the source with the solved head in place of its own."""

    def replaced(out: Tensor, name: str, shard: Shard, start: int) -> None:
        if name not in solved.weights:
            source(out, name, shard, start)
        else:
            out.copy_(solved.weights[name].reshape(-1)[start : start + out.numel()])

    return replaced


def _write_facts(path: Path, solved: SolvedHead) -> None:
    try:
        files.write_json_atomically(path, facts(solved))
    except OSError as error:
        raise DataError(files.disk_problem(error, path, key="run.dir")) from error
