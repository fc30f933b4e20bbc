"""Tasks of the lm-evaluation-harness that a decoder does during training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from llmtrain.corpus.text_source import TextSource
from llmtrain.distributed import processes
from llmtrain.engine.base import Engine
from llmtrain.engine.modules import autocast
from llmtrain.errors import UserError
from llmtrain.harness.codec import Codec
from llmtrain.harness.results import figures
from llmtrain.harness.running import run_tasks
from llmtrain.harness.team import Team
from llmtrain.train.starting import Say
from llmtrain.train.writing import without_weights

if TYPE_CHECKING:
    from llmtrain.harness.model import HarnessModel
    from llmtrain.train.config import TrainConfig


def tasks_of(config: TrainConfig) -> Any:
    """Return the tasks of a run with their data, on rank 0; None on others and without tasks.

    Raise DataError for a task that does not load."""
    harness = config.harness
    if not harness.tasks or not processes.is_main():
        return None
    from llmtrain.harness.tasks import load_tasks

    return load_tasks(harness.tasks, harness.tasks_path, harness.num_fewshot)


class TrainingSuite:
    """Does tasks with the weights of an engine. All ranks call it together."""

    def __init__(self, config: TrainConfig, corpora: TextSource, origin: Any, tasks: Any, say: Say) -> None:
        """origin: settings of the Hugging Face folder that the weights came from, as JSON; None: none.
        tasks: of `tasks_of`."""
        self._config, self._tasks, self._say = config, tasks, say
        self._trained = without_weights(config, corpora, origin)
        self._codec = Codec(self._trained.tokenizer())

    def is_due(self, step: int) -> bool:
        """Return whether the tasks are done at the evaluation after `step`."""
        every = self._config.harness.every
        return every is None or step % every == 0 or step >= self._config.train.steps

    def figures(self, engine: Engine, between: Callable[[], None]) -> dict[str, float]:
        """Return each figure of each task, on all ranks. Warn and return nothing if the model cannot do the
        tasks, for instance because logits are not finite."""
        config, layout = self._config, engine.layout
        team = Team(
            engine.model,
            self._codec,
            engine.mesh,
            batch_tokens=layout.micro_size * config.batch.sequence_length,
            # Under ZeRO the weights themselves have low precision.
            low_precision=autocast(config.precision, engine.device) if layout.zero == 0 else nullcontext(),
            between=between,
            shows_progress=False,
        )
        engine.model.eval()
        try:
            results = run_tasks(
                team, lambda: self._model(team), self._tasks, limit=config.harness.limit, resamples=0
            )
        except UserError as error:
            self._say(f"warning: no tasks were done: {error}")
            return {}
        finally:
            engine.model.train()
        return processes.from_main(figures(results) if results is not None else {})

    def _model(self, team: Team) -> HarnessModel:
        from llmtrain.harness.model import HarnessModel

        return HarnessModel.of(team, self._codec, self._trained)
