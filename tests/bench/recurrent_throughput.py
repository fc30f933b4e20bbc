"""Training of GRU and LSTM language models: our engine against a bare torch loop, of equal weights and
batches.

    python -m tests.bench.recurrent_throughput CORPUS [--threads 1] [--steps 12] [key=value …]

Both sides take their steps in turn in one process: ours as `llmtrain train` does, the reading of its rows and
the exact sums included; theirs the plainest loop over torch.nn's modules, whose batches are ready. Both take
fused AdamW and clip at 1. Ratios are medians of those of each turn, by the processor time of all threads and
by the clock; the losses show that both learn the same.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WARM_STEPS = 3
KINDS = {"gru": nn.GRU, "lstm": nn.LSTM}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("overrides", nargs="*", help="further keys of llmtrain train, for both")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(options.threads)
    print(
        f"{'':<6}{'ours, tokens/CPU s':>20}{'bare loop':>12}{'ratio':>8}{'by the clock':>14}"
        f"{'last losses':>20}"
    )
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            words = [
                f"model={kind}", f"data.path={options.corpus}", f"run.dir={folder}", "data.workers=0",
                "batch.global_size=16", "batch.micro_size=16", "batch.sequence_length=128",
                "data.document_mask=false", "optimizer.weight_decay=0", "optimizer.max_grad_norm=1.0",
                "optimizer.lr=1e-3", *options.overrides,
            ]  # fmt: skip
            compare(kind, words, options.steps)


def compare(kind: str, words: Sequence[str], steps: int) -> None:
    ours, theirs = sides(kind, words)
    seconds = np.zeros((steps + WARM_STEPS, 2, 2))  # step, side, CPU or clock
    losses, tokens = [0.0, 0.0], 0
    for number in range(len(seconds)):
        # Whoever goes first finds a colder cache: take turns.
        for side in (0, 1) if number % 2 else (1, 0):
            cpu, clock = time.process_time(), time.perf_counter()
            losses[side], tokens = next((ours, theirs)[side])
            seconds[number, side] = time.process_time() - cpu, time.perf_counter() - clock
    seconds = seconds[WARM_STEPS:]
    cpu_ratio, clock_ratio = np.median(seconds[:, 1] / seconds[:, 0], axis=0)
    rates = tokens / np.median(seconds[:, :, 0], axis=0)
    print(
        f"{kind:<6}{rates[0]:>20,.0f}{rates[1]:>12,.0f}{cpu_ratio:>8.3f}{clock_ratio:>14.3f}"
        f"{' / '.join(f'{loss:.5f}' for loss in losses):>20}",
        flush=True,
    )


Side = Iterator[tuple[float, int]]
"""Yields the loss and the tokens of each step."""


def sides(kind: str, words: Sequence[str]) -> tuple[Side, Side]:
    from llmtrain.distributed import processes
    from llmtrain.engine.build import build_engine
    from llmtrain.train.resolve import resolve
    from tests.support.training import compose, open_loader

    resolved = resolve(compose(words))
    config: Any = resolved.config
    objective = config.objective.build(config.model, config.data, resolved.corpora)
    device = torch.device("cpu")
    processes.start(device)
    engine = build_engine(config, resolved.layout, device, objective, None, None)
    start = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    ready = [
        (micro.batch["tokens"], micro.batch["labels"])
        for step, _ in zip(open_loader(resolved).steps(0), range(64), strict=False)
        for micro in step.micro_batches
    ]

    def ours() -> Side:
        for step in open_loader(resolved).steps(0):
            result = engine.train_step(step.micro_batches, lr=config.optimizer.lr)
            yield result.loss, sum(micro.batch["tokens"].numel() for micro in step.micro_batches)

    return ours(), bare(kind, config, start, ready)


class Bare(nn.Module):
    def __init__(self, kind: str, vocab_size: int, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        make: Callable[..., nn.Module] = KINDS[kind]
        self.cells = make(hidden_size, hidden_size, num_layers=num_layers, batch_first=True)
        self.out = nn.Linear(hidden_size, vocab_size, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens_BT: Tensor) -> Tensor:
        logits: Tensor = self.out(self.cells(self.embedding(tokens_BT))[0])
        return logits


def bare(kind: str, config: Any, start: dict[str, Tensor], ready: list[tuple[Tensor, Tensor]]) -> Side:
    model = Bare(kind, config.model.vocab_size, config.model.hidden_size, config.model.num_layers)
    with torch.no_grad():
        model.embedding.weight.copy_(start["embedding.weight"])
        for layer in range(config.model.num_layers):
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                getattr(model.cells, f"{name}_l{layer}").copy_(start[f"layers.{layer}.{name}_l0"])
    betas = tuple(config.optimizer.betas)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.optimizer.lr, betas=betas, eps=config.optimizer.eps,
        weight_decay=0.0, fused=True,
    )  # fmt: skip
    for tokens_BT, labels_BT in ready:
        loss = F.cross_entropy(model(tokens_BT).flatten(0, 1), labels_BT.flatten(), ignore_index=-100)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.item(), tokens_BT.numel()


if __name__ == "__main__":
    main()
