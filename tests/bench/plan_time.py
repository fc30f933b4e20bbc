"""Predicted against measured step times of twelve configurations on this machine's CPU.

    OMP_NUM_THREADS=2 python -m tests.bench.plan_time CORPUS [--rounds 3] [--cluster FILE] [--only NAME]

In each round `llmtrain plan calibrate` measures the machine, and then each configuration takes some steps of
its real engine over the corpus, one after another: so a machine that slows down for a minute spoils one
round of each alone. Predictions are those of `llmtrain plan`; both are medians over the rounds, and a round's
measured time is the median of its steps after the first two. --cluster FILE takes a file of an earlier
calibration in place of new ones; --parts prints what the plan is made of. Run it on an idle machine: about
ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
import yaml

from llmtrain.config import decode
from llmtrain.engine.allocator import keep_freed_memory
from llmtrain.engine.build import build_engine
from llmtrain.plan.config import ClusterConfig
from llmtrain.plan.estimate import estimate
from llmtrain.plan.times.step import StepTime
from llmtrain.train.resolve import Resolved, resolve
from tests.support.training import compose, open_loader

GPT = ("model=gpt_tiny",)
CONFIGURATIONS: dict[str, tuple[str, ...]] = {
    "4 layers of 256": (*GPT, "model.hidden_size=256", "model.num_layers=4"),
    "8 layers of 256": (*GPT, "model.hidden_size=256", "model.num_layers=8"),
    "4 layers of 512": (*GPT, "model.hidden_size=512", "model.num_layers=4"),
    "2 layers of 1024": (*GPT, "model.hidden_size=1024", "model.num_layers=2", "model.num_heads=16"),
    "6 layers of 384": (*GPT, "model.hidden_size=384", "model.num_heads=6"),
    "short rows": (*GPT, "model.hidden_size=512", "batch.sequence_length=64", "batch.micro_size=16"),
    "long rows": (*GPT, "model.hidden_size=256", "batch.sequence_length=512", "batch.micro_size=4"),
    "accumulation": (*GPT, "model.hidden_size=384", "model.num_heads=6", "batch.micro_size=2"),
    "recomputation": (*GPT, "model.hidden_size=512", "recompute=full"),
    "bf16": (*GPT, "model.hidden_size=512", "precision=bf16"),
    "Llama's form": ("model=llama_tiny", "model.hidden_size=256", "model.num_layers=4"),
    "BERT": ("model=bert_tiny", "model.hidden_size=256"),
}
SHARED = ("engine=local", "batch.micro_size=8", "batch.sequence_length=256", "device=cpu", "data.workers=0")
SIZES = {"short rows": 16, "long rows": 4}
"""Configuration → rows of a step, where they are not 8."""
FIRST_STEPS = 2
"""Steps that are not timed: libraries choose their kernels in them, and the heap grows."""
TIMED_STEPS, LEAST_SECONDS, MOST_SECONDS = 4, 3.0, 12.0
"""Steps that are timed at least, for so many seconds at least, and no more once so many have passed."""


def settings(name: str, corpus: Path) -> list[str]:
    """The overrides of a configuration, each key once."""
    size = f"batch.global_size={SIZES.get(name, 8)}"
    words = (*SHARED, size, f"data.path={corpus}", *CONFIGURATIONS[name])
    return [f"{key}={value}" for key, value in dict(word.split("=", 1) for word in words).items()]


def calibrated(folder: Path) -> ClusterConfig:
    """This machine as a cluster, measured now."""
    file = folder / "here.yaml"
    command = [sys.executable, "-m", "llmtrain", "plan", "calibrate", f"output={file}", "device=cpu"]
    done = subprocess.run([*command, "overwrite=true"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"llmtrain plan calibrate:\n{done.stderr[-2000:]}")
    return cluster_in(file)


def cluster_in(file: Path) -> ClusterConfig:
    return decode(ClusterConfig, yaml.safe_load(file.read_text()))


def planned(resolved: Resolved, cluster: ClusterConfig) -> StepTime:
    """What `llmtrain plan` says of a step."""
    plan = estimate(
        resolved.config.model,
        resolved.layout,
        replace(resolved.config, cluster=cluster),
        resolved.trainable,
    )
    assert plan.time is not None
    return plan.time


def measured(resolved: Resolved) -> float:
    """Median seconds of a step of the run's engine, its data read meanwhile."""
    config = resolved.config
    objective = config.objective.build(config.model, config.data, resolved.corpora)
    engine = build_engine(config, resolved.layout, torch.device("cpu"), objective, None)
    steps = open_loader(resolved, objective=objective).steps()
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < FIRST_STEPS + TIMED_STEPS or time.perf_counter() - begun < LEAST_SECONDS:
        started = time.perf_counter()
        engine.train_step(next(steps).micro_batches, lr=1e-4)
        times.append(time.perf_counter() - started)
        if len(times) > FIRST_STEPS + 1 and time.perf_counter() - begun > MOST_SECONDS:
            break
    engine.release()
    return median(times[FIRST_STEPS:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cluster", type=Path)
    parser.add_argument("--only", choices=CONFIGURATIONS)
    parser.add_argument("--parts", action="store_true")
    options = parser.parse_args()
    keep_freed_memory()  # as a run does
    runs: dict[str, Resolved] = {
        name: resolve(compose(settings(name, options.corpus.absolute())))
        for name in CONFIGURATIONS
        if options.only in (None, name)
    }
    predictions: dict[str, list[StepTime]] = {name: [] for name in runs}
    clocked: dict[str, list[float]] = {name: [] for name in runs}
    with TemporaryDirectory() as folder:
        for number in range(options.rounds):
            cluster = cluster_in(options.cluster) if options.cluster else calibrated(Path(folder))
            say_figures(number, cluster)
            for name, resolved in runs.items():
                predictions[name].append(planned(resolved, cluster))
                clocked[name].append(measured(resolved))
                gc.collect()
                print(
                    f"round {number + 1}, {name}: predicted {predictions[name][-1].seconds:.3f} s, "
                    f"measured {clocked[name][-1]:.3f} s",
                    flush=True,
                )
    print(f"\n{table(predictions, clocked)}")
    if options.parts:
        print(f"\n{parts_table(predictions)}")


def say_figures(number: int, cluster: ClusterConfig) -> None:
    """Print what a calibration found."""
    peaks = ", ".join(f"{name} {peak / 1e9:.0f}" for name, peak in cluster.peak_flops.items())
    share = cluster.efficiency
    print(
        f"round {number + 1}, calibration: peaks of {peaks} GFLOP/s, memory "
        f"{(cluster.memory_bandwidth or 0) / 1e9:.1f} GB/s, matrix_depth {share.matrix_depth:.0f}, attention "
        f"{share.attention:.2f}, unfused {share.unfused:.2f}, kernel_seconds {share.kernel_seconds:.1e}",
        flush=True,
    )


def table(predictions: dict[str, list[StepTime]], clocked: dict[str, list[float]]) -> str:
    """The medians of all rounds and their errors. What a round measured beyond the least is its spread."""
    lines = [
        "| configuration | predicted | measured | error | spread of the rounds |",
        "|---|---|---|---|---|",
    ]
    errors = []
    for name, times in clocked.items():
        predicted, took = median(step.seconds for step in predictions[name]), median(times)
        errors.append(abs(predicted / took - 1))
        lines.append(
            f"| {name} | {predicted:.3f} s | {took:.3f} s | {predicted / took - 1:+.0%} | "
            f"{max(times) / min(times) - 1:.0%} |"
        )
    return "\n".join([*lines, "", f"median absolute error {median(errors):.1%}, worst {max(errors):.0%}"])


def parts_table(predictions: dict[str, list[StepTime]]) -> str:
    """Milliseconds that each part adds, as predicted in the last round."""
    last: dict[str, dict[str, float]] = {name: steps[-1].parts for name, steps in predictions.items()}
    names = list(dict.fromkeys(part for parts in last.values() for part in parts))
    lines = [f"{'':<18}" + "".join(f"{name[:11]:>12}" for name in names)]
    for name, parts in last.items():
        lines.append(f"{name:<18}" + "".join(f"{1000 * parts.get(part, 0):>12.1f}" for part in names))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
