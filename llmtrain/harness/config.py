"""Config of the tasks of EleutherAI's lm-evaluation-harness that evaluate a run. Free of torch and of the
harness."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmtrain.config import require
from llmtrain.errors import Problem


@dataclass(frozen=True)
class HarnessConfig:
    """Tasks of the lm-evaluation-harness that a decoder does at evaluations during training."""

    tasks: tuple[str, ...] = ()
    """Names of tasks, groups or tags, or patterns of them, such as `mmlu_*`; empty: none."""
    tasks_path: Path | None = None
    """A folder of further tasks, with a .yaml file for each, as --include_path of the harness."""
    every: int | None = None
    """Steps between evaluations on the tasks, a multiple of evaluation.every; null: at each evaluation. The
    last
    step is always followed by one."""
    limit: int | None = 100
    """Number of documents of each task, from the first; null: all."""
    num_fewshot: int | None = None
    """Solved examples before each document; null: as the task says."""

    def problems(self) -> Iterator[Problem]:
        yield from require(self.every is None or self.every >= 1, "every", self.every, "1 or more, or null")
        yield from count_problems(self.limit, self.num_fewshot)


def count_problems(limit: int | None, num_fewshot: int | None) -> Iterator[Problem]:
    """Yield a problem for each number that is out of range."""
    yield from require(limit is None or limit >= 1, "limit", limit, "1 or more, or null")
    allowed = "0 or more, or null"
    yield from require(num_fewshot is None or num_fewshot >= 0, "num_fewshot", num_fewshot, allowed)
