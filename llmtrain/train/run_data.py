"""The data of one start of a run: training and validation data, the stream over them, and the loader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtrain.data.datasets.base import Dataset
from llmtrain.data.loader import Loader
from llmtrain.data.stream import Stream
from llmtrain.data.streaming import open_stream, plan_timeline
from llmtrain.distributed import processes, set_union
from llmtrain.errors import DataError
from llmtrain.objectives.base import Objective
from llmtrain.objectives.reading import open_dataset
from llmtrain.standard_streams import Say
from llmtrain.train.resolve import Resolved
from llmtrain.train.starting import StartingPoint
from llmtrain.urls import without_credentials_in


class RunData:
    """The data of one start, opened in the order of the methods; all ranks call each of them."""

    def __init__(self, resolved: Resolved, say: Say) -> None:
        self._config, self._layout, self.corpora = resolved.config, resolved.layout, resolved.corpora
        self._say = say
        self.validation: Dataset | None = None
        """None before `open`, and when nothing is evaluated."""

    def open(self) -> Mapping[str, Dataset]:
        """Open the validation data, and return the training data, corpus by corpus."""
        training = processes.agree(self._open_training)
        self.validation = processes.agree(self._open_validation)
        return training

    def open_stream(self, training: Mapping[str, Dataset], start: StartingPoint) -> Stream:
        """Return the stream of samples of a start from `start` on."""
        config = self._config
        before = start.resume.timeline if start.resume is not None else None
        timeline = plan_timeline(config, training, before, start.step, self._say)
        return processes.agree(
            lambda: open_stream(
                config.data,
                training,
                timeline,
                seed=config.seed,
                agree=set_union.of_all_ranks(),
                on_skip=lambda tar, samples: self._say(f"{_left_out(tar, samples)} in this epoch"),
            )
        )

    def open_loader(self, stream: Stream, objective: Objective, data_rank: int, pin_memory: bool) -> Loader:
        """Return the loader of the micro-batches of one data rank."""
        return Loader(
            stream,
            objective.collate,
            micro_size=self._layout.micro_size,
            data_rank=data_rank,
            data_size=self._layout.data,
            workers=self._config.data.workers,
            pin_memory=pin_memory,
        )

    def facts(self) -> dict[str, Any]:
        """Return what identifies the data: its kind, locations and tokenizer."""
        data = self._config.data
        validation = None if self.validation is None else self.validation.fingerprint
        return {
            "kind": data.kind,
            "paths": without_credentials_in(data.paths),
            "tokenizer_sha256": self.corpora.tokenizer_sha256 if self.corpora is not None else None,
            "validation": validation if data.is_table else None,
        }

    def close(self) -> None:
        if self.corpora is not None:
            self.corpora.close()

    def _open_training(self) -> Mapping[str, Dataset]:
        config, length = self._config, self._config.batch.sequence_length
        return config.objective.open(config.model, config.data, self.corpora, "train", length)

    def _open_validation(self) -> Dataset | None:
        """Return None when nothing is evaluated, because of the settings or for lack of data."""
        config = self._config
        if config.evaluation.every is None and not config.evaluation.at_start:
            return None
        try:
            self._say_what_is_not_evaluated()
            return open_dataset(
                config.objective,
                config.model,
                config.data,
                self.corpora,
                "validation",
                config.batch.sequence_length,
                lambda tar, samples: self._say(_left_out(tar, samples)),
            )
        except DataError as error:
            self._say(f"no evaluation{', nor tasks' if config.harness.tasks else ''}: {error}")
            return None

    def _say_what_is_not_evaluated(self) -> None:
        without = [] if self.corpora is None else self.corpora.without("validation")
        if without and self.corpora is not None and len(without) < len(self.corpora.by_name):
            self._say(f"note: {', '.join(without)} has no validation split; the others are evaluated")


def _left_out(tar: str, samples: int) -> str:
    return f"warning: {tar} is bad: its {samples:,} sequences are left empty"
