"""Several tasks over one trunk: the loss that is stated, the same in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.parity.matrix import TOLERANCES, deviation
from tests.parity.test_finetune import MODELS, rows
from tests.support.training import Trace, compose, open_loader, train

pytestmark = pytest.mark.slow

__all__ = ["rows"]
STEPS, SAVED = 4, 2
LAYOUTS = {
    "DDP": (2, ()),
    "ZeRO 1": (2, ("parallel.zero=1",)),
    "ZeRO 2": (2, ("parallel.zero=2",)),
    "ZeRO 3": (2, ("parallel.zero=3",)),
    "tensor": (2, ("parallel.tensor=2",)),
    "ZeRO 2, bf16": (2, ("parallel.zero=2", "precision=bf16")),
    "one process, larger micro-batches": (1, ("batch.micro_size=8",)),
}
KINDS = {
    "given": ("objective.weights.tags=0.5",),
    "uncertainty": ("objective.balance=uncertainty",),
    "text": (
        "objective.tasks.text.kind=mlm",
        "objective.tasks.text.pairs=next_sentence",
        "objective.tasks.text.pair_weight=0.5",
        "objective.weights.text=0.3",
        "data.shares.text=0.4",
    ),
}


def settings(kind: str, rows: Path, corpus: Path, cache: Path, model: str = "BERT") -> tuple[str, ...]:
    text = (f"data.corpora.text.path={corpus}",) if kind == "text" else ()
    return (
        *MODELS[model],
        "objective=multi_task",
        "objective.tasks.label.kind=classification",
        "objective.tasks.tags.kind=tagging",
        *KINDS[kind],
        "data=tasks",
        f"data.tasks.label.path={rows}",
        "data.tasks.label.split.validation=0.2",
        f"data.tasks.tags.path={rows}",
        "data.tasks.tags.text_field=words",
        "data.tasks.tags.label_field=tags",
        *text,
        f"data.tokenizer={corpus}",
        f"data.cache.dir={cache}",
        "batch.global_size=8",
        "batch.micro_size=2",
        "batch.sequence_length=48",
        "train.steps=20",
        "optimizer.lr=3e-3",
        "seed=7",
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


@pytest.fixture(scope="module")
def references() -> dict[tuple[str, ...], Trace]:
    return {}


def reference(words: tuple[str, ...], references: dict[tuple[str, ...], Trace]) -> Trace:
    if words not in references:
        [references[words]] = train(1, words, STEPS)
    return references[words]


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_loss_is_the_weighted_sum_of_means(
    kind: str, rows: Path, corpus: Path, cache: Path, references: dict[tuple[str, ...], Trace]
) -> None:
    """The first step by hand: each task's model of its own over its own rows of the whole global batch."""
    from llmtrain.distributed import processes
    from llmtrain.interchange.one_task import _config_of
    from llmtrain.interchange.trained import build_module
    from llmtrain.nn.dropout import sample_keys
    from llmtrain.objectives.base import DROPOUT_KEYS
    from llmtrain.train.resolve import resolve

    words = settings(kind, rows, corpus, cache)
    trace = reference(words, references)
    resolved = resolve(compose(words), world_size=1)
    config = resolved.config
    objective: Any = config.objective.build(config.model, config.data, resolved.corpora)
    batch = next(iter(open_loader(resolved).steps(0)))
    names = list(config.objective.tasks)  # type: ignore[attr-defined]
    sums, counts = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    for k, name in enumerate(names):
        labelled = config.objective.tasks[name].has_task_head  # type: ignore[attr-defined]
        own = _config_of(config.model, name) if labelled else _replaced(config.model)
        model = build_module(own, processes.pick_device("cpu"))
        with torch.no_grad():
            for each, parameter in model.named_parameters():
                parameter.copy_(torch.from_numpy(trace.initial_weights[_there(each, name, labelled)]))
        for micro in batch.micro_batches:
            chosen = micro.batch["task"] == k
            keys = torch.as_tensor(sample_keys(config.seed, list(micro.samples)))[chosen]
            of_task = {key: values[chosen] for key, values in objective._batch_of(micro.batch, name).items()}
            task = objective._tasks[name]
            if not len(keys):
                continue
            terms = task(model, {**of_task, DROPOUT_KEYS: keys})
            sums[name] += float(terms.loss_sum)
            counts[name] += int(terms.num_targets)
    assert all(counts.values()), "the first batch has rows of all tasks"
    weights = {"given": {"tags": 0.5}, "text": {"text": 0.3}}.get(kind, {})
    loss = sum(weights.get(name, 1.0) * sums[name] / counts[name] for name in names)
    assert trace.losses[0] == pytest.approx(loss, rel=1e-5)


def _replaced(model: Any) -> Any:
    from dataclasses import replace

    return replace(model, task=None)


def _there(name: str, task: str, labelled: bool) -> str:
    """The name of a parameter of one task's model in that of all."""
    if not name.startswith("head."):
        return name
    return name.replace("head.", f"head.tasks.{task}." if labelled else "token_head.", 1)


@pytest.mark.in_turns(3)
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("kind", list(KINDS))
def test_layouts(
    layout: str,
    kind: str,
    rows: Path,
    corpus: Path,
    cache: Path,
    references: dict[tuple[str, ...], Trace],
) -> None:
    words = settings(kind, rows, corpus, cache)
    one_process = reference(words, references)
    size, more = LAYOUTS[layout]
    for trace in train(size, (*words, *more), STEPS):
        found = deviation(trace, one_process)
        assert found.within(TOLERANCES["bf16" if "precision=bf16" in more else "fp32"]), found


@pytest.mark.parametrize("model", ["GPT", "XLNet"])
def test_other_families(model: str, rows: Path, corpus: Path, cache: Path) -> None:
    words = settings("given", rows, corpus, cache, model)
    [one] = train(1, words, 2)
    [two, _] = train(2, (*words, "parallel.zero=2"), 2)
    assert deviation(two, one).within(TOLERANCES["fp32"])


def test_a_resume_is_bit_exact(rows: Path, corpus: Path, cache: Path, tmp_path: Path) -> None:
    words = settings("text", rows, corpus, cache)
    [whole] = train(1, words, STEPS, save_to=tmp_path, save_at=SAVED)
    [rest] = train(1, words, STEPS, resume_from=tmp_path / f"step-{SAVED:08d}")
    assert rest.losses == whole.losses[SAVED:]
    assert all(np.array_equal(rest.weights[name], whole.weights[name]) for name in whole.weights)
