"""Metrics and progress of a run: the metrics go to the trackers, the lines to the progress report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from llmtrain.engine.base import StepResult
from llmtrain.engine.evaluation import Totals
from llmtrain.errors import UserError
from llmtrain.harness.results import OF_TASKS
from llmtrain.nn.linear import product
from llmtrain.parallel.layout import Layout
from llmtrain.plan.flops import training_flops
from llmtrain.plan.memory import Trainable
from llmtrain.track import throughput
from llmtrain.track.base import Metrics, WrittenText
from llmtrain.track.peak import Peak, PeakKeeper
from llmtrain.track.progress import Progress
from llmtrain.track.trackers import Trackers
from llmtrain.train.config import TrainConfig

HEADLINES = 2
"""Figures of an evaluation that its progress line shows."""


class RunObserver:
    """Turns the results of steps into metrics and progress lines; ranks other than 0 write nothing."""

    def __init__(
        self,
        config: TrainConfig,
        layout: Layout,
        device: torch.device,
        trackers: Trackers | None,
        progress: Progress | None,
        counters: Callable[[], Mapping[str, float]] = dict,
        tokens_per_sample: float | None = None,
        trainable: Trainable | None = None,
    ) -> None:
        """counters: returns further metrics of the data that was read; called at each step.
        tokens_per_sample: mean length of a sample, if samples have different ones.
        trainable: what trains; None: all parameters."""
        self._trackers, self._progress, self._counters = trackers, progress, counters
        self._failure: UserError | None = None
        self._device_type = device.type
        self._meter = throughput.ThroughputMeter()
        row = config.objective.row(config.batch.sequence_length)
        usual = 1 if config.objective.data in ("images", "columns") else config.batch.sequence_length
        self._units = usual if tokens_per_sample is None else tokens_per_sample
        self._flops = training_flops(config.model, row, trainable)
        self._global_size = layout.global_size
        self._processes = layout.world_size
        self._peak: PeakKeeper | None = None
        if progress is not None:
            self._peak = PeakKeeper(device.type, config.precision, product)
            progress.message(_about(self._peak.peak, config.precision))

    def on_step(
        self, step: int, result: StepResult, lr: float, seconds: float, data: Mapping[str, float]
    ) -> None:
        tokens = round(self._global_size * self._units)
        self._meter.add(tokens, seconds)
        if self._trackers is None or self._progress is None:
            return
        rate = self._meter.tokens_per_second
        metrics = {
            "loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens_per_second": rate,
            "step_tokens_per_second": tokens / seconds,
            "memory_bytes": throughput.memory_bytes(self._device_type),
            **data,
            **self._counters(),
            "data_digest": result.data_digest,
            "num_targets": result.num_targets,
            **result.metrics,
        }
        if self._peak is not None:
            # MFU (PaLM, arXiv:2204.02311) counts the model's own FLOPs, without recomputation; of frozen
            # weights those that are computed.
            used = self._peak.utilization(rate * self._flops / self._processes)
            metrics |= {} if used is None else {"mfu": used}
        if result.skipped:
            metrics["skipped"] = 1
        if result.rejected:
            metrics["rejected"] = 1
        if result.num_targets == 0:
            # Nothing was computed; zeros in the curves would be false.
            del metrics["loss"], metrics["grad_norm"]
        if result.num_skipped:
            metrics["skipped_samples"] = result.num_skipped
        self._log(step, metrics)
        self._progress.update(step, metrics)

    def on_evaluation(self, step: int, totals: Totals, seconds: float) -> None:
        if self._trackers is None or self._progress is None:
            return
        means = {"loss": totals.loss, **totals.source_losses, **totals.metrics}
        metrics = {f"validation_{name}": value for name, value in means.items()}
        of_tasks = {name: value for name, value in totals.figures.items() if name.startswith(OF_TASKS)}
        figures = {
            f"validation_{name}": value for name, value in totals.figures.items() if name not in of_tasks
        }
        self._log(step, {**metrics, **figures, **of_tasks, "validation_seconds": seconds})
        metrics |= dict(list(figures.items())[:HEADLINES])
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in metrics.items())
        self._progress.message(f"step {step:,}: {shown} ({totals.num_targets:,} targets, {seconds:.1f} s)")
        if of_tasks:
            named = (f"{name.removeprefix(OF_TASKS)} {value:.4f}" for name, value in of_tasks.items())
            self._progress.message(f"step {step:,}: tasks: {', '.join(named)}")

    def on_pictures(self, step: int, pictures: Mapping[str, bytes]) -> None:
        """pictures: name → PNG."""
        if self._trackers is not None:
            self._trackers.show(step, pictures)

    def on_texts(self, step: int, texts: Sequence[WrittenText]) -> None:
        if self._trackers is not None:
            self._trackers.write(step, texts)

    def warn(self, text: str) -> None:
        if self._progress is not None:
            self._progress.message(f"warning: {text}")

    @property
    def failed(self) -> bool:
        return self._failure is not None

    def raise_failure(self) -> None:
        """Raise the error that kept metrics from being recorded, if there was one."""
        if self._failure is not None:
            raise self._failure

    def _log(self, step: int, metrics: Metrics) -> None:
        # Only rank 0 gets an error here; raised at once, it would leave the others waiting in a collective.
        assert self._trackers is not None
        try:
            self._trackers.log(step, metrics)
        except UserError as error:
            self._failure = error


def _about(peak: Peak | None, precision: str) -> str:
    if peak is None:
        return f"mfu is left out: what this device can do in {precision} is not known"
    return f"mfu is of {peak.flops / 1e12:.3g} TFLOP/s a process, {peak.source}"
