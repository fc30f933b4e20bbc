"""How fast a checkpoint reaches the disk, and how long training stands still for it.

    OMP_NUM_THREADS=2 python -m tests.bench.checkpoint FOLDER [--model gpt2_124m] [--rounds 5]

Each round, in turn and to the same folder: `dd conv=fsync` of as many random bytes from memory; a save that
waits; one that does not, nothing else under way. That one's copy runs beside the next forward and backward
pass, and only an optimizer that would step before its end waits for it. The state is that of the model after
a step of AdamW: weights and two moments. The first save touches its host memory for the first time; the rest
are medians of later rounds, whose buffers are there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.checkpoint.saver import Saver
from llmtrain.engine.allocator import keep_freed_memory
from llmtrain.engine.base import Engine
from llmtrain.engine.build import build_engine
from llmtrain.train.resolve import resolve
from tests.support.training import compose


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="gpt2_124m")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    keep_freed_memory()  # as `llmtrain train` does
    engine = trained(options.model)
    root: Path = options.folder / f"bench-{os.getpid()}"
    waiting, beside = Saver(root / "waiting", asynchronous=False), Saver(root / "beside")
    times: dict[str, list[float]] = {
        name: [] for name in ("dd", "waits", "stall", "copy", "commit", "beside", "read")
    }
    try:
        waiting.save(0, engine, {}, None)
        num_bytes = Checkpoint.open(root / "waiting" / "step-00000000").bytes
        print(f"{options.model}: {num_bytes / 1e9:.2f} GB, load {os.getloadavg()[0]:.2f}", flush=True)
        source = Path("/dev/shm") / f"bench-{os.getpid()}"
        source.write_bytes(os.urandom(2**24) * (num_bytes // 2**24))
        started = time.perf_counter()
        beside.save(0, engine, {}, None)
        assert beside._pending is not None
        beside._pending.wait_for_copy()
        first = time.perf_counter() - started
        beside.finish()
        for step in range(1, options.rounds + 1):
            remove(root / "dd")
            times["dd"].append(clock(lambda: dd(source, root / "dd")))
            remove(root / "dd")
            settle()
            times["waits"].append(clock(lambda: waiting.save(step, engine, {}, None)))  # noqa: B023
            remove(root / "waiting")
            settle()
            started = time.perf_counter()
            times["stall"].append(clock(lambda: beside.save(step, engine, {}, None)))  # noqa: B023
            pending = beside._pending
            assert pending is not None
            pending.wait_for_copy()
            times["copy"].append(time.perf_counter() - started)
            pending.wait()
            times["commit"].append(clock(beside.poll))
            times["beside"].append(time.perf_counter() - started)
            checkpoint = Checkpoint.open(root / "beside" / f"step-{step:08d}")
            times["read"].append(clock(lambda: checkpoint.restore(engine)))  # noqa: B023
            remove(root / "beside")
            settle()
        source.unlink()
    finally:
        remove(root)
    middle = {name: statistics.median(values) for name, values in times.items()}
    ratios = [dd / ours for dd, ours in zip(times["dd"], times["waits"], strict=True)]
    stalls = [
        statistics.median(stall / waits for stall, waits in zip(times[name], times["waits"], strict=True))
        for name in ("stall", "copy")
    ]
    rate = {name: num_bytes / 1e6 / middle[name] for name in ("dd", "waits", "beside", "read")}
    print(f"{'':<34}{'seconds':>9}{'MB/s':>9}   each round")
    for name, label in (
        ("dd", "dd conv=fsync"),
        ("waits", "save that waits"),
        ("stall", "save that does not: stall"),
        ("copy", "… until an optimizer may step"),
        ("commit", "… its commit, later"),
        ("beside", "… until it is a checkpoint"),
        ("read", "restore, from the page cache"),
    ):
        shown = f"{rate[name]:>9,.0f}" if name in rate else " " * 9
        print(f"{label:<34}{middle[name]:>9.3f}{shown}   {' '.join(f'{t:.3f}' for t in times[name])}")
    print(f"{'first save: until it may step':<34}{first:>9.3f}")
    print(f"rate of a save that waits to dd's: median of rounds {statistics.median(ratios):.2f}")
    print(
        f"stall to a save that waits: median of rounds {stalls[0]:.4f}, {stalls[1]:.3f} with a step at once"
    )


def trained(model: str) -> Engine:
    """An engine with optimizer state; its gradients are zeros."""
    overrides = [f"model={model}", "batch.sequence_length=8", "model.vocab_size=50257", "data.path=unused"]
    mapping = compose(overrides)
    mapping["data"].pop("path")
    resolved = resolve(mapping, data_optional=True)
    config = resolved.config
    objective = config.objective.build(config.model, config.data, resolved.corpora)
    engine = build_engine(config, resolved.layout, torch.device("cpu"), objective, None)
    for parameter in engine.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    engine.optimizer.step()
    return engine


def clock(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def dd(source: Path, target: Path) -> None:
    command = ["dd", f"if={source}", f"of={target}", "bs=16M", "conv=fsync"]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def settle() -> None:
    """Write all cached data to the disk, so that one contender does not slow the next."""
    os.sync()
    time.sleep(0.5)


if __name__ == "__main__":
    main()
