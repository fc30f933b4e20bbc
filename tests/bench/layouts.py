"""Two ranks of one thread each against one process of two threads, on the same global batch, in turn.

    python -m tests.bench.layouts CORPUS [--rounds 5] [--only tensor]

Each side keeps its processes alive and trains only while the other waits; the ratio is the median of the
rounds'. A pipeline of P stages over M micro-batches can reach M / (M + P − 1) of its processes at best.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from tests.support.ranks import Pool
from tests.support.training import compose, open_loader

MODEL = ("model=gpt_tiny", "batch.global_size=16", "batch.sequence_length=256", "data.workers=0")
SIDES: dict[str, tuple[tuple[str, ...], float]] = {
    # name: (overrides of the two ranks, the ratio aimed at)
    "data 2, ZeRO 0": (("batch.micro_size=4",), 0.9),
    "data 2, ZeRO 1": (("batch.micro_size=4", "parallel.zero=1"), 0.9),
    "data 2, ZeRO 2": (("batch.micro_size=4", "parallel.zero=2"), 0.7),
    "data 2, ZeRO 3": (("batch.micro_size=4", "parallel.zero=3"), 0.7),
    "tensor 2": (("batch.micro_size=4", "parallel.tensor=2"), 0.6),
    "tensor 2, sequence shared": (
        ("batch.micro_size=4", "parallel.tensor=2", "parallel.tensor_sequence=true"),
        0.6,
    ),
    "sequence 2": (("batch.micro_size=4", "parallel.sequence=2"), 0.6),
    "pipeline 2, 8 micro-batches": (
        ("batch.micro_size=2", "parallel.pipeline=2", "parallel.zero=1", "parallel.balance=time"),
        8 / 9 * 0.85,
    ),
}
_ready: dict[str, Any] = {}


def prepare(overrides: list[str], threads: int) -> int:
    """Build an engine in this rank and take its first steps; return the tokens of a step."""
    import torch

    from llmtrain.engine.allocator import keep_freed_memory
    from llmtrain.engine.build import build_engine
    from llmtrain.train.resolve import resolve

    torch.set_num_threads(threads)
    keep_freed_memory()
    resolved = resolve(compose(overrides))
    config, layout = resolved.config, resolved.layout
    objective = config.objective.build(config.model, config.data, resolved.corpora)
    _ready.clear()
    engine = build_engine(config, layout, torch.device("cpu"), objective, None)
    loader = open_loader(resolved)
    _ready.update(engine=engine, steps=loader.steps())
    clock(2)
    return layout.tokens_per_step


def clock(steps: int) -> float:
    """Seconds a step of the prepared engine."""
    started = time.perf_counter()
    for _ in range(steps):
        _ready["engine"].train_step(next(_ready["steps"]).micro_batches, lr=1e-4)
    return (time.perf_counter() - started) / steps


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    alone, two = Pool(1), Pool(2)
    common = [*MODEL, f"data.path={options.corpus}"]
    tokens = alone.run(prepare, [*common, "batch.micro_size=4"], 2)[0]
    print(f"{'two ranks of one thread':<30}{'tokens/s':>10}{'one, two threads':>18}{'ratio':>8}{'aim':>7}")
    for name, (overrides, aim) in SIDES.items():
        if options.only not in name:
            continue
        two.run(prepare, [*common, *overrides], 1)
        pairs = [
            (max(two.run(clock, options.steps)), alone.run(clock, options.steps)[0])
            for _ in range(options.rounds)
        ]
        ratio = statistics.median(b / a for a, b in pairs)
        a, b = (tokens / statistics.median(side) for side in zip(*pairs, strict=True))
        print(f"{name:<30}{a:>10,.0f}{b:>18,.0f}{ratio:>8.2f}{aim:>7.2f}", flush=True)
    alone.close()
    two.close()


if __name__ == "__main__":
    main()
