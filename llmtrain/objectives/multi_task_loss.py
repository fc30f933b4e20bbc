"""The loss and the figures of several tasks over one trunk.

The loss is Σ_k w_k · L_k, where L_k is the mean over the targets of task k in the global batch, at every
layout. A task of which a global batch has no row adds nothing to it.

Dim names: B rows, T tokens of the longest row, K tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtrain.data.datasets.several import TASK, of_task, parts_of
from llmtrain.labels import IGNORE_INDEX
from llmtrain.nn.task_config import TaskHeadConfig, variance_share
from llmtrain.objectives.base import Batch, Shown, Terms, ratio, tensors
from llmtrain.objectives.masked_lm import MaskedLM
from llmtrain.objectives.task import Task

if TYPE_CHECKING:
    from torch import Tensor, nn

    from llmtrain.data.trace import Part
    from llmtrain.objectives.text import Spelling
    from llmtrain.scoring.figure import Figure
    from llmtrain.scoring.report import Report

_BEYOND = {"tokens": 0, "documents": -1, "segments": 0, "positions": 0, "lengths": 1}
"""Arrays of the model's inputs → what they hold beyond a row's own width."""
_WITHOUT = {"documents": 0, "segments": 0, "lengths": 1}
"""Inputs that a task may lack → what its rows then have."""
_NOTHING = np.zeros(0)


class MultiTask:
    """Weighted sum of the mean losses of several tasks."""

    def __init__(self, model: Any, tasks: Mapping[str, Task | MaskedLM], weights: Sequence[float]) -> None:
        """weights: the factor of each task's loss."""
        self.head: TaskHeadConfig = model.task
        self._tasks, self._weights = tasks, np.array(weights, np.float64)
        self._shares = [variance_share(head) for head in self.head.heads]
        self._labelled = {name: task for name, task in tasks.items() if isinstance(task, Task)}
        self._labels = next(iter(self._labelled.values())).labels_argument

    def collate(self, raw: dict[str, np.ndarray]) -> Batch:
        """Return "task" int64 (B), the inputs of all rows, and for each task NAME "labels/NAME" and what else
        its own batches have, over all rows; rows of other tasks have no labels."""
        of_tasks = {
            name: task.collate({**of_task(raw, name), "keys": raw["keys"]})
            for name, task in self._tasks.items()
        }
        width = max(batch["tokens"].shape[1] for batch in of_tasks.values())
        found: Batch = tensors({TASK: raw[TASK]})
        for name, batch in of_tasks.items():
            is_of_tokens = self.head.by_name[name].kind in ("tags", "tokens")
            for key, values in batch.items():
                if key not in _BEYOND:
                    is_wide = key == "labels" and is_of_tokens
                    found[f"{key}/{name}"] = _widened(values, width, IGNORE_INDEX) if is_wide else values
        for key in _BEYOND:
            if any(key in batch for batch in of_tasks.values()):
                found[key] = _merged(key, width, found[TASK], list(of_tasks.values()))
        return found

    def target_count(self, batch: Batch) -> int:
        return int(self.term_counts(batch).sum())

    def term_counts(self, batch: Batch) -> np.ndarray:
        """Return the number of targets of each task in the batch."""
        counts = [int(task.count(batch[f"labels/{name}"])) for name, task in self._tasks.items()]
        return np.array(counts, np.int64)

    def weighed(self, batch: Batch, counts: np.ndarray) -> Batch:
        """Add "factors" fp32 (2, K): w_k · N / n_k, of which the engine's division by N leaves w_k / n_k, and
        the targets of each task in this batch."""
        factors = np.where(counts > 0, self._weights * counts.sum() / np.maximum(counts, 1), 0.0)
        own = self.term_counts(batch)
        given = tensors({"factors": np.stack([factors, own]).astype(np.float32)})
        return {**batch, "factors": given["factors"].to(batch[TASK].device)}

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Return the arguments of the model's forward that give the logits of all tasks."""
        found = next(iter(self._labelled.values())).inputs(batch)
        return found | ({"positions_BT": batch["positions"]} if "positions" in batch else {})

    def arguments(self, batch: Batch, wants_logits: bool = False) -> dict[str, Any]:
        """Return the arguments of the model's forward that give the loss, or logits where they are wanted."""
        from llmtrain.nn.task_head import TaskLabels

        factors_K, counts_K = batch["factors"]
        by_task = {name: batch[f"labels/{name}"] for name in self._tasks}
        labels = TaskLabels(by_task, counts_K, factors_K, wants_logits)
        found = {**self.inputs(batch), self._labels: labels}
        for name, task in self._tasks.items():
            if isinstance(task, MaskedLM):
                of_text = task.arguments(self._batch_of(batch, name))
                found |= {key: of_text[key] for key in ("pair_labels_B", "pair_weight") if key in of_text}
        return found

    def __call__(self, model: nn.Module, batch: Batch) -> Terms:
        """Return the loss, and each task's own as a metric."""
        batch = self._with_factors(batch)
        found = model(**self.arguments(batch))
        counts_K = batch["factors"][1]
        metrics = {
            f"{name}/loss": ratio(found[1 + k].detach(), counts_K[k]) for k, name in enumerate(self._tasks)
        }
        return Terms(found[0], counts_K.sum().long(), metrics)

    def evaluate(self, model: nn.Module, batch: Batch) -> Terms:
        """Return the loss of each task, its learned weight, and what its head says of its own rows."""
        import torch

        from llmtrain.nn.task_head import task_loss

        found = model(**self.arguments(self._with_factors(batch), wants_logits=True))
        metrics: dict[str, Tensor] = {}
        rows: dict[int, np.ndarray] = {}
        for k, (name, task) in enumerate(self._tasks.items()):
            labels = batch[f"labels/{name}"]
            count = task.count(labels)
            own = (batch[TASK] == k).nonzero().squeeze(1)
            if isinstance(task, Task):
                logits = found.by_task[name].float()
                loss = task_loss(logits, labels, replace(task.head, class_weights=()))
                of_own = {key: values[own] for key, values in self._batch_of(batch, name).items()}
                rows |= zip(own.tolist(), task.predictions(logits[own], of_own), strict=True)
            else:
                terms = task.terms_of(found.of_tokens, count)
                loss = terms.loss_sum
                metrics |= {f"{name}/{metric}": values for metric, values in terms.metrics.items()}
                rows |= dict.fromkeys(own.tolist(), _NOTHING)
            metrics[f"{name}/loss"] = ratio(loss, count)
            if found.log_variances is not None:
                weight = self._shares[k] * torch.exp(-found.log_variances[k])
                metrics[f"{name}/weight"] = ratio(weight * count, count)
        total = torch.stack([metrics[f"{name}/loss"] for name in self._tasks]).sum(0)
        return Terms(total[0], total[1].long(), metrics, [rows[i] for i in range(len(batch[TASK]))])

    def loss_of(self, metrics: Mapping[str, float]) -> float:
        """Return Σ w_k · L_k over the tasks that a split has."""
        total = 0.0
        for name, weight, share in zip(self._tasks, self._weights, self._shares, strict=True):
            loss = metrics.get(f"{name}/loss", 0.0)
            learned = metrics.get(f"{name}/weight", 0.0)
            if learned > 0:
                total += weight * (learned * loss + math.log(share / learned) / 2)
            elif not self.head.uncertain:
                total += weight * loss
        return float(total)

    def figures(
        self, loss: float, num_targets: int, metrics: Mapping[str, float], num_bytes: int
    ) -> dict[str, float]:
        return {}

    def scores(
        self, dataset: Any, rows: Mapping[int, np.ndarray], intervals: bool = True
    ) -> dict[str, Figure]:
        """Return the figures of each task under NAME/figure, those of the first task first."""
        figures: dict[str, Figure] = {}
        for name, first, part in parts_of(dataset):
            own = {n - first: row for n, row in rows.items() if first <= n < first + len(part)}
            if own and name in self._labelled:
                found = self._labelled[name].scores(part, own, intervals)  # type: ignore[arg-type]
                figures |= {f"{name}/{figure}": value for figure, value in found.items()}
        return figures

    def report(self, dataset: Any, rows: Mapping[int, np.ndarray]) -> Report | None:
        """Return None: there are no pictures of several tasks."""
        return None

    def show(
        self,
        row: Mapping[str, np.ndarray],
        raw: Mapping[str, np.ndarray],
        text: Spelling,
        parts: Callable[[], Iterable[Part]],
    ) -> Shown:
        """Return the row as its task shows it, with the task's name."""
        name = list(self._tasks)[int(row[TASK])]
        own = {key.removesuffix(f"/{name}"): values for key, values in row.items()}
        shown = self._tasks[name].show(own, of_task(raw, name), text, parts)
        return Shown(f"task {name}, {shown.facts}", shown.lines)

    def _with_factors(self, batch: Batch) -> Batch:
        """Return the batch with factors; one without any is taken for the whole global batch."""
        return batch if "factors" in batch else self.weighed(batch, self.term_counts(batch))

    def _batch_of(self, batch: Batch, name: str) -> Batch:
        """Return the batch as the task knows it, over all rows."""
        inputs = {key: batch[key] for key in _BEYOND if key in batch}
        suffix = f"/{name}"
        return inputs | {k.removesuffix(suffix): v for k, v in batch.items() if k.endswith(suffix)}


def _merged(key: str, width: int, task_B: Tensor, of_tasks: Sequence[Batch]) -> Tensor:
    """Return an input of all rows: for each row that of its own task."""
    import torch

    found = []
    for batch in of_tasks:
        tokens_BT = batch["tokens"]
        values = batch.get(key)
        if values is None and key == "positions":
            values = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
        elif values is None:
            values = torch.full_like(tokens_BT[:, 0] if key == "lengths" else tokens_BT, _WITHOUT[key])
        found.append(values if values.ndim == 1 else _widened(values, width, _BEYOND[key]))
    merged = found[0].clone()
    for number, values in enumerate(found):
        is_own_B = task_B == number
        merged[is_own_B] = values[is_own_B].to(merged.dtype)
    return merged


def _widened(values: Tensor, width: int, filling: int) -> Tensor:
    """Return (B, width) with `filling` beyond the values."""
    import torch.nn.functional as F

    return F.pad(values, (0, width - values.shape[1]), value=filling)
