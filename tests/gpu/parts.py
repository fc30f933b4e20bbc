"""The parts of the check, each a process of its own, in the order in which they run."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.gpu.table import REPOSITORY, Row, read_rows


@dataclass(frozen=True)
class Part:
    name: str
    function: str
    """module:function; (device, folder) → rows, as they become known."""
    seconds: float
    """How long it may take."""
    packages: tuple[str, ...] = ()
    """What it needs besides torch."""


TRAINER = ("transformers", "accelerate")
PARTS = (
    Part("parity", "tests.gpu.parity:check", 60),
    Part("attention", "tests.gpu.attention:check", 30),
    Part("optimizers", "tests.gpu.optimizers:check", 30),
    Part("scaler", "tests.gpu.scaler:check", 30),
    Part("zero", "tests.gpu.zero:check", 90, ("deepspeed",)),
    Part("checkpoints", "tests.gpu.checkpoints:check", 30),
    Part("resume", "tests.gpu.resume:check", 75),
    Part("generation", "tests.gpu.generation:check", 30),
    Part("gpt2 124M", "tests.gpu.speed:gpt2", 60, TRAINER),
    Part("bert base", "tests.gpu.speed:bert", 60, TRAINER),
    Part("llama 1B", "tests.gpu.speed:llama", 90, TRAINER),
)
"""Together at most ten minutes where each needs all that it has."""


def run(
    parts: Sequence[Part], device: str, folder: Path, on_rows: Callable[[list[Row]], None], minutes: float
) -> list[Row]:
    """All rows; `on_rows` is called with those so far after each part. Parts write into `folder`."""
    rows: list[Row] = []
    deadline = time.monotonic() + 60 * minutes
    for part in parts:
        missing = [name for name in part.packages if importlib.util.find_spec(name) is None]
        seconds = min(part.seconds, deadline - time.monotonic())
        if missing:
            rows.append(Row(part.name, "all of it", "passed over", f"there is no {', '.join(missing)} here"))
        elif seconds <= 0:
            rows.append(Row(part.name, "all of it", "FAILED", f"not begun: the {minutes:g} minutes are over"))
        else:
            rows += _rows_of(part, device, folder, seconds)
        on_rows(rows)
    return rows


def _first_gpu() -> str:
    """Of those that may be used: transformers' Trainer would take them all."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def _rows_of(part: Part, device: str, folder: Path, seconds: float) -> Iterator[Row]:
    """What a process of its own finds; how it failed, if it did, is a row more."""
    name = part.name.replace(" ", "-")
    written, log = folder / f"{name}.rows", folder / f"{name}.log"
    written.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.gpu.work", part.function, device, str(folder), str(written)]
    started = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": _first_gpu()},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
            how = f"ended with {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
        except subprocess.TimeoutExpired:
            code, how = 1, f"not done within {seconds:.0f} s"
        finally:
            # With whatever it has started; nothing may stay on the GPU.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    rows = read_rows(written)
    yield from rows
    if code != 0:
        lines = log.read_text(errors="replace").strip().splitlines()
        yield Row(part.name, "all of it", "FAILED", f"{how}: {lines[-1] if lines else 'it said nothing'}")
    elif not rows:
        yield Row(part.name, "all of it", "FAILED", "it asked nothing")
    print(f"{part.name}: {time.monotonic() - started:.0f} s", flush=True)
