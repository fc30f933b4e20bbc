"""Seconds of a step with the whole watch and without it, on the same ranks, in turn.

    python -m tests.bench.watching CORPUS [--size 2] [--rounds 10] [--steps 20] [--collectives]

With --collectives the comparison of collectives is on as well; a run has it off unless it is asked for.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.support.ranks import Pool
from tests.support.training import compose, open_loader

MODEL = ("model=gpt_tiny", "batch.sequence_length=128", "batch.micro_size=4", "data.workers=0")
AIM = 0.995
_ready: dict[str, Any] = {}


def prepare(overrides: list[str]) -> None:
    """Build an engine in this rank and take its first steps."""
    import torch

    from llmtrain.engine.build import build_engine
    from llmtrain.train.resolve import resolve

    resolved = resolve(compose(overrides))
    config, layout = resolved.config, resolved.layout
    objective = config.objective.build(config.model, config.data, resolved.corpora)
    engine = build_engine(config, layout, torch.device("cpu"), objective, None)
    _ready.update(engine=engine, steps=open_loader(resolved).steps(), config=config)
    clock(3, "", False)


def clock(steps: int, folder: str, collectives: bool) -> tuple[float, float]:
    """Seconds a step by the clock and of the processor, watched if a folder is given; opening and closing the
    watch are not counted."""
    from contextlib import nullcontext

    import torch

    from llmtrain.distributed import processes
    from llmtrain.watch import phases, watch
    from llmtrain.watch.config import DebugConfig

    everyone = [list(range(processes.world_size()))]
    settings = _ready["config"].watch, DebugConfig(collectives=collectives)
    opened: Any = nullcontext()
    if folder:
        opened = watch.watched(*settings, Path(folder), torch.device("cpu"), everyone)
    with opened:
        processes.barrier()
        started, used = time.perf_counter(), time.process_time()
        for step in range(steps):
            phases.begin_step(step + 1)
            with phases.DATA:
                batch = next(_ready["steps"])
            _ready["engine"].train_step(batch.micro_batches, lr=1e-4)
            watch.after_step()
            watch.times()
        return (time.perf_counter() - started) / steps, (time.process_time() - used) / steps


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus")
    parser.add_argument("--size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--collectives", action="store_true")
    options = parser.parse_args()
    from tests.bench.watching import clock, prepare  # by this name other processes find them

    pool = Pool(options.size)
    overrides = [*MODEL, f"data.path={options.corpus}", f"batch.global_size={4 * options.size}"]
    pool.run(prepare, [*overrides, "watch.times_every=10", "watch.straggler_steps=10"])
    rounds: list[list[tuple[float, float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        sides = (("", False), (folder, options.collectives))
        for number in range(options.rounds):
            # Each of the two goes first equally often.
            order = sides[:: (-1) ** number]
            times = {side: pool.run(clock, options.steps, *side) for side in order}
            rounds.append([tuple(map(max, zip(*times[side], strict=True))) for side in sides])  # type: ignore[misc]
    for number, name in enumerate(("by the clock", "of the processor")):
        pairs = [(off[number], on[number]) for off, on in rounds]
        off, on = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratios = sorted(off / on for off, on in pairs)
        middle = f"{ratios[len(ratios) // 4]:.3f} to {ratios[3 * len(ratios) // 4]:.3f}"
        print(f"a step {name}: {off * 1000:.2f} ms off, {on * 1000:.2f} ms on")
        print(f"  speed on against off: {statistics.median(ratios):.4f}, half of them {middle} (aim {AIM})")
    pool.close()


if __name__ == "__main__":
    main()
