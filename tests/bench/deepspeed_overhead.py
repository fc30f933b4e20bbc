"""`engine=deepspeed` at one rank against a bare torch loop over the same model, in turn, in one process.

    OMP_NUM_THREADS=2 python -m tests.bench.deepspeed_overhead CORPUS [--zero 0 1 2 3] [--rounds 8]

The bare loop is what a paper's appendix shows: forward, backward, clip, fused AdamW, zero_grad. Each
round times a few steps of each side; the ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from llmtrain.commands.build import build_engine
from llmtrain.commands.loading import build_module
from llmtrain.commands.resolve import resolve
from llmtrain.data.loader import MicroBatch
from llmtrain.distributed import processes
from llmtrain.families import family_of
from llmtrain.nn.initialize import initialize
from llmtrain.optim.optimizers import build_optimizer
from tests.support.training import compose, open_loader

STEPS_A_ROUND = 2


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus")
    parser.add_argument("--zero", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    device = torch.device("cpu")
    processes.start(device, single_process_group=True)
    print(f"{'deepspeed at one rank':<24}{'tokens/s':>10}{'bare loop':>11}{'ratio':>8}")
    for zero in options.zero:
        ours, bare, tokens = prepare(options.corpus, zero, device)
        clock(ours), clock(bare)  # first steps allocate
        pairs = [(clock(ours), clock(bare)) for _ in range(options.rounds)]
        ratio = statistics.median(b / a for a, b in pairs)
        a, b = (tokens / statistics.median(side) for side in zip(*pairs, strict=True))
        print(f"{f'fp32, ZeRO {zero}':<24}{a:>10,.0f}{b:>11,.0f}{ratio:>8.2f}", flush=True)


def prepare(
    corpus: str, zero: int, device: torch.device
) -> tuple[Callable[[], None], Callable[[], None], int]:
    """One step of ours, one step of the bare loop, tokens of a step."""
    overrides = ["model=gpt_tiny", f"data.path={corpus}", "batch.global_size=8", "batch.micro_size=8"]
    overrides += ["batch.sequence_length=256", "engine=deepspeed", f"parallel.zero={zero}"]
    resolved = resolve(compose(overrides))
    config, layout = resolved.config, resolved.layout
    objective = family_of(config.model).objective(config.model, config.data)
    engine = build_engine(config, layout, device, objective, None)
    steps = open_loader(resolved).steps()
    batches: list[list[MicroBatch]] = [next(steps).micro_batches for _ in range(4)]

    module = build_module(config.model, device)
    initialize(module, 0)
    optimizer = build_optimizer(config.optimizer, module.named_parameters(), "cpu")
    turn = iter(range(10**9))

    def ours() -> None:
        engine.train_step(batches[next(turn) % 4], lr=1e-4)

    def bare() -> None:
        batch = batches[next(turn) % 4][0].batch
        terms = objective(module, batch)
        (terms.loss_sum / terms.num_targets).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return ours, bare, 8 * config.batch.sequence_length


def clock(step: Callable[[], None]) -> float:
    """Seconds a step."""
    started = time.perf_counter()
    for _ in range(STEPS_A_ROUND):
        step()
    return (time.perf_counter() - started) / STEPS_A_ROUND


if __name__ == "__main__":
    main()
