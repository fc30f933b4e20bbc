"""What each mode of recomputation keeps, and what it costs in time.

    OMP_NUM_THREADS=2 python -m tests.bench.recompute [--bf16] [--rounds 5]

GPT-2's form, 8 layers of 256, micro-batches of 4 · 512 tokens. Each mode runs in a process of its own;
rounds of all modes are taken in turn. A step's time is the process' CPU time, the least of the rounds: wall
time follows whatever else the machine does.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from llmtrain.engine.allocator import keep_freed_memory
from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.gpt.model import GPT
from llmtrain.nn.initialize import initialize
from llmtrain.nn.memory import Conditions, Numbers
from llmtrain.nn.model_config import Row
from llmtrain.nn.recompute_config import RecomputeConfig
from llmtrain.parallel.layout import Layout
from llmtrain.parallel.recompute import apply_recompute
from llmtrain.plan.memory import model_memory
from tests.support.memory import allocated

MODEL = GPTConfig(vocab_size=8192, max_sequence_length=512, hidden_size=256, num_layers=8, num_heads=4)
B, T = 4, 512
MODES = (("none", 1), ("selective", 1), ("full", 2), ("full", 1), ("offload", 1))
MB = 10**6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    workers = []
    for mode, every in MODES:
        ours, theirs = context.Pipe()
        arguments = (theirs, mode, every, options.bf16)
        process = context.Process(target=work, args=arguments, daemon=True)
        process.start()
        workers.append((ours, process))
    figures = [pipe.recv() for pipe, _ in workers]
    times: list[list[float]] = [[] for _ in workers]
    for _ in range(options.rounds):
        for (pipe, _), of_mode in zip(workers, times, strict=True):
            pipe.send("step")
            of_mode.append(pipe.recv())
    for pipe, process in workers:
        pipe.send("stop")
        process.join()
    base = min(times[0])
    print(f"{'recompute':<16}{'kept MB':>9}{'planned':>9}{'peak RSS MB':>13}{'CPU s':>8}{'ratio':>7}")
    for (mode, every), (kept, planned, peak), of_mode in zip(MODES, figures, times, strict=True):
        name = mode if every == 1 else f"{mode}, every={every}"
        step = min(of_mode)
        sizes = f"{kept / MB:>9,.0f}{planned / MB:>9,.0f}{peak / MB:>13,.0f}"
        print(f"{name:<16}{sizes}{step:>8.2f}{step / base:>7.2f}")


def work(pipe: Connection, mode: str, every: int, bf16: bool) -> None:
    """Send (bytes kept, planned, growth of resident memory over one step); then a step's seconds for each
    message."""
    keep_freed_memory()
    recompute = RecomputeConfig(mode, every)  # type: ignore[arg-type]
    model = GPT(MODEL)
    initialize(model, 0)
    apply_recompute(model, recompute)
    tokens = torch.randint(MODEL.vocab_size or 1, (B, T))

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            return model(tokens, labels_BT=tokens) / (B * T)

    model(tokens[:1, :8], labels_BT=tokens[:1, :8]).backward()  # libraries are loaded by the first use
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    loss().backward()
    peak = resident("VmHWM") - before
    layout = Layout(1, 1, 1, 1, 1, 0, B, 1, B, T)
    numbers = Numbers(2 if bf16 else 4, 4)
    conditions = Conditions("cpu", False, recompute=recompute)
    memory = model_memory(MODEL, Row(T, predicted=T), numbers, layout, conditions)
    assert memory is not None
    planned = memory.activations(range(MODEL.num_layers + 2)).kept
    # The head keeps its gradients too: those are counted with the logits.
    head = allocated(loss).kept - 4 * MODEL.hidden_size * (MODEL.vocab_size or 0)
    pipe.send((head - B * T * MODEL.hidden_size * numbers.compute, planned, peak))
    while pipe.recv() == "step":
        started = time.process_time()
        loss().backward()
        pipe.send(time.process_time() - started)


def resident(line: str) -> int:
    """Bytes, by the name of a line of the process' status: VmRSS now, VmHWM at the peak."""
    return 1024 * int(Path("/proc/self/status").read_text().split(line + ":")[1].split()[0])


if __name__ == "__main__":
    main()
