"""All processes of a model work on the requests that rank 0 has from the harness, which runs there alone.

Data-parallel processes share the requests; those that hold one model between them compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from torch import nn

from llmtrain.distributed import processes
from llmtrain.errors import UserError
from llmtrain.generation.config import GenerateConfig
from llmtrain.generation.progress import Progress
from llmtrain.harness import continuing, scoring
from llmtrain.harness.codec import Codec
from llmtrain.harness.continuing import Ends, continue_texts
from llmtrain.harness.scoring import Row, Score, score_rows

if TYPE_CHECKING:
    from llmtrain.parallel.mesh import Mesh

T = TypeVar("T")


@dataclass(frozen=True)
class Scoring:
    """Rows of tokens to score, flat, as they are sent to the other processes."""

    tokens: np.ndarray
    """Inputs and answers of all rows, one after another, int32."""
    lengths: list[list[int]]
    """Of each row: tokens of its context, of its inputs, and of each answer."""

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Scoring:
        parts = [part for row in rows for part in (row.inputs, *row.answers)]
        flat = np.fromiter((token for part in parts for token in part), np.int32)
        return cls(flat, [[row.context, len(row.inputs), *map(len, row.answers)] for row in rows])

    def rows(self) -> list[Row]:
        found, start = [], 0
        for context, *lengths in self.lengths:
            parts = []
            for length in lengths:
                parts.append(self.tokens[start : start + length].tolist())
                start += length
            found.append(Row(parts[0], parts[1:], context))
        return found


@dataclass(frozen=True)
class Continuing:
    """Prompts to continue."""

    prompts: list[list[int]]
    settings: GenerateConfig
    """Resolved."""
    ends: Ends


class Team:
    """The processes that share a model. Rank 0 calls `score` and `write`, and in the end `dismiss`; the
    others `follow` meanwhile."""

    def __init__(
        self,
        model: nn.Module,
        codec: Codec,
        mesh: Mesh,
        *,
        batch_tokens: int,
        low_precision: AbstractContextManager[Any],
        between: Callable[[], None] = lambda: None,
        shows_progress: bool = True,
    ) -> None:
        """batch_tokens: of one forward, padding included. low_precision: the context of a forward.
        between: called by all processes alike between batches; an exception that it raises ends the work."""
        self._model, self._codec, self._mesh = model, codec, mesh
        self._batch_tokens, self._low_precision = batch_tokens, low_precision
        self._between, self._shows_progress = between, shows_progress

    def score(self, rows: Sequence[Row]) -> list[list[Score]]:
        """Return the score of each answer of each row. Raise UserError if any process meets one."""
        found: list[list[Score]] = self._together(Scoring.of(rows))
        return found

    def write(self, prompts: Sequence[Sequence[int]], settings: GenerateConfig, ends: Ends) -> list[str]:
        """Return what the model writes after each prompt. Raise UserError if any process meets one."""
        texts: list[str] = self._together(Continuing([[*prompt] for prompt in prompts], settings, ends))
        return texts

    def dismiss(self) -> None:
        """Release the other processes. After an error that all of them have met, they have already
        returned."""
        self._together(None)

    def follow(self) -> None:
        """Work with rank 0 until it needs no more. Raise UserError as it does."""
        while self._together(None) is not None:
            pass

    def _together(self, work: Scoring | Continuing | None) -> Any:
        """Do the work of rank 0 on all processes; return the results in order, on the others an empty list.
        Without work return None."""
        work = processes.from_main(work)
        if work is None:
            return None
        if isinstance(work, Scoring):
            rows = work.rows()
            scored = [
                (
                    batch.numbers,
                    partial(score_rows, self._model, [rows[i] for i in batch.numbers], batch.shared),
                )
                for batch in scoring.batches_of(rows, self._batch_tokens)
            ]
            return _in_order(self._divided(scored, "requests"), len(rows))
        settings, prompts = work.settings, work.prompts
        lengths = [len(prompt) for prompt in prompts]
        written = [
            (numbers, partial(self._continued, work, numbers))
            for numbers in continuing.batches_of(lengths, settings.new_tokens, settings.batch_size)
        ]
        return _in_order(self._divided(written, "texts"), len(prompts))

    def _continued(self, work: Continuing, numbers: list[int]) -> list[str]:
        prompts = [work.prompts[i] for i in numbers]
        return continue_texts(self._model, prompts, numbers, work.settings, work.ends, self._codec)

    def _divided(self, batches: Sequence[tuple[list[int], Callable[[], list[T]]]], what: str) -> dict[int, T]:
        """Compute this process' part of the batches, each numbers and what computes their results; return
        number → result of all on rank 0, {} on others."""
        here = self._mesh.coordinates
        parts = self._mesh.layout.data
        own = sum(len(numbers) for numbers, _ in batches[here.data :: parts])
        progress = Progress(own, what) if self._shows_progress and processes.is_main() else None
        found: dict[int, T] = {}
        problem: UserError | None = None
        for first in range(0, len(batches), parts):
            self._between()
            # After a problem go on without work: the others call `between`, which may be a collective.
            if first + here.data >= len(batches) or problem is not None:
                continue
            numbers, compute = batches[first + here.data]
            try:
                with self._low_precision:
                    found |= zip(numbers, compute(), strict=True)
            except UserError as error:
                problem = error
            for number in numbers if progress is not None else ():
                progress(number)  # type: ignore[misc]
        if problems := [each for each in processes.gather(problem) if each is not None]:
            raise processes.everywhere(problems[0])
        speaks = here.tensor == 0 and here.pipeline == 0
        gathered = processes.gather_to_main(found if speaks else {})
        return {index: result for of_rank in gathered for index, result in of_rank.items()}


def _in_order(found: dict[int, T], count: int) -> list[T]:
    return [found[index] for index in range(count)] if found else []
