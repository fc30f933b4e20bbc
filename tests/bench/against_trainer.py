"""Seconds of training steps: our engine against transformers' Trainer, of one model on the same batches.

Each side runs in a process of its own, in turn: ours as `llmtrain train` does, theirs over the same model by
way of an exported folder. Rows come to the Trainer ready, with the tokens that our objective hid. Both take
fused AdamW and clip at 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEPS, WARM_STEPS = 6, 2

ToTheirs = Callable[[dict[str, Any]], dict[str, Any]]
"""One of our batches → what their model is called with, (B, …) each."""


@dataclass(frozen=True)
class Contest:
    """A model that both train."""

    overrides: tuple[str, ...]
    """Of `llmtrain train`."""
    model_class: str
    """Of transformers."""
    to_theirs: ToTheirs


Step = tuple[float, float, float]
"""Wall seconds, processor seconds, loss."""


def main(contests: Mapping[str, Contest], module: str, description: str) -> None:
    """Print the table, or run one side where told so."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--contests", default=",".join(contests))
    parser.add_argument("overrides", nargs="*", help="further keys of llmtrain train, for both")
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()
    overrides = [f"data.path={options.corpus}", *options.overrides]
    if options.side:
        name, side, precision = options.side
        run = {"ours": run_ours, "theirs": run_trainer}[side]
        print(json.dumps(run(contests[name], [*overrides, f"precision={precision}"])))
        return

    def steps(name: str, side: str, precision: str) -> list[Step]:
        command = [sys.executable, "-m", module, options.corpus, *options.overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        done = subprocess.run(
            [*command, "--side", name, side, precision],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]

    print(f"{'':<22}{'ours, ms':>10}{'theirs':>10}{'wall ratio':>12}{'cpu ratio':>12}{'first losses':>20}")
    for name in options.contests.split(","):
        for precision in options.precisions.split(","):
            rounds = [
                (steps(name, "ours", precision), steps(name, "theirs", precision))
                for _ in range(options.rounds)
            ]
            # Of a round, each side's median step; of the rounds, the median ratio.
            medians = [
                [[statistics.median(s[i] for s in side[WARM_STEPS:]) for i in (0, 1)] for side in sides]
                for sides in rounds
            ]
            wall, cpu = (statistics.median(b[i] / a[i] for a, b in medians) for i in (0, 1))
            walls = "".join(
                f"{1000 * statistics.median(m[side][0] for m in medians):>10,.0f}" for side in (0, 1)
            )
            losses = " / ".join(f"{side[0][2]:.4f}" for side in rounds[0])
            print(f"{name + ', ' + precision:<22}{walls}{wall:>12.2f}{cpu:>12.2f}{losses:>20}", flush=True)


def _prepare(contest: Contest, overrides: Sequence[str]) -> tuple[Any, Any, list[list[Any]]]:
    """The resolved run, its objective, and the micro-batches of each step."""
    from llmtrain.commands.resolve import resolve
    from llmtrain.families import family_of
    from tests.support.training import compose, open_loader

    resolved = resolve(compose([*contest.overrides, f"train.steps={STEPS}", *overrides]))
    objective = family_of(resolved.config.model).objective(resolved.config.model, resolved.config.data)
    loader = open_loader(resolved)
    batches = [step.micro_batches for step, _ in zip(loader.steps(0), range(STEPS), strict=False)]
    return resolved, objective, batches


def run_ours(contest: Contest, overrides: Sequence[str]) -> list[Step]:
    import torch

    from llmtrain.commands.build import build_engine
    from llmtrain.distributed import processes

    resolved, objective, batches = _prepare(contest, overrides)
    device = torch.device("cpu")
    processes.start(device)
    engine = build_engine(resolved.config, resolved.layout, device, objective, None)
    steps = []
    for micro_batches in batches:
        wall, cpu = time.perf_counter(), time.process_time()
        loss = engine.train_step(micro_batches, lr=3e-4).loss
        steps.append((time.perf_counter() - wall, time.process_time() - cpu, loss))
    return steps


def run_trainer(contest: Contest, overrides: Sequence[str]) -> list[Step]:
    import torch
    import transformers

    from llmtrain.commands.loading import build_module
    from llmtrain.interchange.huggingface import export_folder
    from llmtrain.nn.initialize import initialize

    resolved, _, batches = _prepare(contest, overrides)
    config = resolved.config
    module = build_module(config.model, torch.device("cpu"))
    initialize(module, config.seed)
    rows: list[dict[str, torch.Tensor]] = []
    for (micro,) in batches:
        rows += rows_of(contest.to_theirs(micro.batch))
    with tempfile.TemporaryDirectory() as folder:
        export_folder(config.model, dict(module.named_parameters()), None, Path(folder) / "model")
        del module
        model = getattr(transformers, contest.model_class).from_pretrained(Path(folder) / "model")
    return trainer_steps(model, rows, config.batch.micro_size, config.precision)


def rows_of(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What their model is called with, row by row."""
    (size,) = {len(values) for values in batch.values()}
    return [{name: values[i] for name, values in batch.items()} for i in range(size)]


def trainer_steps(
    model: Any, rows: Sequence[Any], micro_size: int, precision: str, device: str = "cpu"
) -> list[Step]:
    """Steps of transformers' Trainer over `rows` in their order."""
    import torch
    import transformers

    steps: list[Step] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            self.started = time.perf_counter(), time.process_time()

        def on_step_end(self, *_: object, **__: object) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            wall, cpu = self.started
            steps.append((time.perf_counter() - wall, time.process_time() - cpu, 0.0))

        def on_log(self, *_: object, logs: Mapping[str, float], **__: object) -> None:
            if "loss" in logs:
                steps[-1] = (*steps[-1][:2], logs["loss"])

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: object) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, max_steps=len(rows) // micro_size, per_device_train_batch_size=micro_size,
            bf16=precision == "bf16", use_cpu=device == "cpu", optim="adamw_torch_fused", learning_rate=3e-4,
            max_grad_norm=1.0, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True,
        )  # fmt: skip
        InOrder(model, arguments, train_dataset=rows, callbacks=[Clock()]).train()
    return steps
