"""What the watch costs a step: steps with all of it against steps without, on the same ranks of one run.

    python -m tests.bench.watching CORPUS [--size 2] [--rounds 40] [--steps 6] [overrides …]

Blocks of steps take turns, first without and then with the watch, then the other way around, so that
whatever else the machine does meets both alike. Each pair of blocks gives one ratio; printed are the median
of the ratios and the interval that 95 % of its bootstrap resamples fall into. On are the watch of hangs and
the times of phases, which are gathered ten times as often as by default; in a third kind of blocks the
comparison of collectives too.

Beside the ratio stands the cost itself: the calls that a step makes, repeated a thousand times, and the
processor time of the watching thread as the kernel counts it. Both hardly depend on what else the machine
does.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.support.ranks import Pool
from tests.support.training import compose, open_loader

MODEL = ("model=gpt_tiny", "batch.sequence_length=128", "batch.micro_size=4", "data.workers=0")
WATCH = ("watch.times_every=2", "watch.straggler_steps=2")
SIDES = ("off", "on", "on, collectives compared")
AIM = 0.995
REPEATS = 1000
_ready: dict[str, Any] = {}


class Block(NamedTuple):
    """Seconds of a step in one block; `thread`: of the processor in a second, for the watching thread."""

    clock: float
    processor: float
    thread: float = 0.0


def prepare(overrides: list[str]) -> None:
    """Build an engine in this rank and take its first steps."""
    import torch

    from llmtrain.engine.build import build_engine
    from llmtrain.train.resolve import resolve

    resolved = resolve(compose(overrides))
    config, layout = resolved.config, resolved.layout
    objective = config.objective.build(config.model, config.data, resolved.corpora)
    engine = build_engine(config, layout, torch.device("cpu"), objective, None)
    _ready.update(engine=engine, steps=open_loader(resolved).steps(), config=config, done=0)
    for _ in range(3):
        take_step()


def take_step() -> None:
    """One step with all that the loop tells the watch."""
    from llmtrain.watch import phases, watch

    _ready["done"] += 1
    phases.begin_step(_ready["done"])
    with phases.DATA:
        batch = next(_ready["steps"])
    _ready["engine"].train_step(batch.micro_batches, lr=1e-4)
    watch.after_step()
    watch.times()


def watching(side: str, folder: str) -> Any:
    """The context of a block of this kind."""
    import torch

    from llmtrain.distributed import processes
    from llmtrain.watch import watch
    from llmtrain.watch.config import DebugConfig

    if side == "off":
        return nullcontext()
    everyone = [list(range(processes.world_size()))]
    compares = DebugConfig(collectives=side == SIDES[2])
    return watch.watched(_ready["config"].watch, compares, Path(folder), torch.device("cpu"), everyone)


def take_block(side: str, steps: int, folder: str) -> Block:
    """Take a block of steps; opening and closing the watch, and the step after, are not counted."""
    from llmtrain.distributed import processes

    with watching(side, folder):
        take_step()
        processes.barrier()
        of_thread, began = thread_seconds(), time.perf_counter()
        used = time.process_time()
        for _ in range(steps):
            take_step()
        seconds = time.perf_counter() - began
        own = (thread_seconds() - of_thread) / seconds
        return Block(seconds / steps, (time.process_time() - used) / steps, own)


def thread_seconds() -> float:
    """Seconds of the processor that the watching thread has used; 0 without one."""
    from llmtrain.watch import watch

    if watch._current is None:
        return 0.0
    number = watch._current.watcher._thread.native_id
    return int(Path(f"/proc/self/task/{number}/schedstat").read_text().split()[0]) / 1e9


class Notes:
    """Stands for the recorder, and keeps what it is told."""

    def __init__(self, of: Any) -> None:
        self._of, self.calls = of, []  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._of, name)
        if not callable(found):
            return found

        def noted(*arguments: Any) -> Any:
            self.calls.append((found, arguments))
            return found(*arguments)

        return noted


def count_calls(side: str, folder: str) -> tuple[int, float]:
    """How many calls of the recorder a step makes, and their seconds."""
    from llmtrain.watch import recorder

    with watching(side, folder):
        take_step()
        own = recorder.current
        recorder.current = notes = Notes(own)  # type: ignore[assignment]
        take_step()
        recorder.current = None
        began = time.thread_time()
        for _ in range(REPEATS):
            for call, arguments in notes.calls:
                call(*arguments)
        seconds = (time.thread_time() - began) / REPEATS
        recorder.current = own
        return len(notes.calls), seconds


def interval(ratios: list[float]) -> tuple[float, float]:
    """Where 95 % of the medians of resamples lie."""
    drawn = np.random.default_rng(0).choice(np.array(ratios), (10_000, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus")
    parser.add_argument("--size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("overrides", nargs="*", help="of llmtrain train")
    options = parser.parse_args()
    from tests.bench.watching import (
        count_calls,
        prepare,
        take_block,
    )  # by this name other processes find them

    pool = Pool(options.size)
    model = [*MODEL, f"batch.global_size={8 * options.size}", f"data.path={options.corpus}", *WATCH]
    pool.run(prepare, [*model, *options.overrides])
    blocks: dict[str, list[list[Block]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for side in SIDES[:: (-1) ** number]:
                blocks[side].append(pool.run(take_block, side, options.steps, folder))
        calls = {side: pool.run(count_calls, side, folder)[0] for side in SIDES[1:]}
    pool.close()

    def medians(side: str, figure: str) -> list[float]:
        return [max(getattr(of_rank, figure) for of_rank in block) for block in blocks[side]]

    seconds = statistics.median(medians("off", "clock"))
    print(f"{options.size} ranks, {options.rounds} rounds of {options.steps} steps of {seconds:.3f} s")
    for side in SIDES[1:]:
        print(f"{side}:")
        for figure, name in (("clock", "by the clock"), ("processor", "by the processor")):
            pairs = zip(medians("off", figure), medians(side, figure), strict=True)
            ratios = [off / on for off, on in pairs]
            low, high = interval(ratios)
            print(f"  speed against off, {name}: {statistics.median(ratios):.4f} ({low:.4f} to {high:.4f})")
        number, of_calls = calls[side]
        of_thread = statistics.median(medians(side, "thread")) * seconds
        share = 1 - (of_calls + of_thread) / seconds
        print(f"  {number} calls of the recorder a step: {of_calls * 1e6:.0f} microseconds")
        print(f"  the watching thread, in a step: {of_thread * 1e6:.0f} microseconds")
        print(f"  both, if nothing runs beside them: {share:.4f} of the speed (aim {AIM})")


if __name__ == "__main__":
    main()
