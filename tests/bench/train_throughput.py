"""Training tokens per second: `llmtrain train` against transformers' Trainer, in turn.

    python -m tests.bench.train_throughput CORPUS [--threads 2] [--rounds 3]

Both train the same GPT-2 form (8 layers, 512 wide, the corpus' vocabulary) on sequences of 512 in
batches of 8, AdamW fused, clipping at 1. Absolute figures depend on what else the machine does; the
ratio of neighbours holds. The last columns are the share of a 2048³ matrix product's rate that the
model's FLOPs make up. Trainer knows no document masks, so ours are off; a last row has them on.
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
from pathlib import Path

LAYERS, WIDTH, HEADS, LENGTH, BATCH = 8, 512, 8, 512, 8
STEPS, WARM_STEPS = 9, 3


def ours(corpus: str, precision: str, *overrides: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "llmtrain", "train", "model=gpt_tiny", f"data.path={corpus}"]
        command += [f"model.num_layers={LAYERS}", f"model.hidden_size={WIDTH}", f"model.num_heads={HEADS}"]
        command += [f"model.max_sequence_length={LENGTH}", f"batch.sequence_length={LENGTH}"]
        command += [f"batch.global_size={BATCH}", f"batch.micro_size={BATCH}", f"train.steps={STEPS}"]
        command += [f"precision={precision}", f"run.dir={folder}/run", "checkpoint.every=null"]
        command += ["evaluation.every=null", "evaluation.at_start=false", *overrides]
        subprocess.run(command, check=True, capture_output=True)
        lines = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
    seconds = [BATCH * LENGTH / line["step_tokens_per_second"] for line in lines if "loss" in line]
    return BATCH * LENGTH / statistics.median(seconds[WARM_STEPS:])


def theirs(corpus: str, precision: str) -> float:
    command = [sys.executable, "-m", "tests.bench.train_throughput", corpus, "--trainer", precision]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def run_trainer(corpus: str, precision: str) -> float:
    """Tokens per second of transformers' Trainer."""
    import numpy as np
    import torch
    import transformers

    from llmtrain.data.corpus import Corpus
    from llmtrain.data.datasets import TokenSequences

    opened = Corpus.open(corpus)
    sequences = TokenSequences(opened.split("train"), LENGTH)

    class Samples(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return STEPS * BATCH

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            tokens = torch.from_numpy(sequences.get(np.array([index]))["tokens"][0, :-1])
            return {"input_ids": tokens, "labels": tokens}

    class Clock(transformers.TrainerCallback):
        times: list[float] = []  # noqa: RUF012

        def on_step_end(self, *_: object, **__: object) -> None:
            self.times.append(time.perf_counter())

    transformers.set_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=opened.manifest.vocab_size, n_positions=LENGTH,
            n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        )
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, max_steps=STEPS, per_device_train_batch_size=BATCH, bf16=precision == "bf16",
            use_cpu=True, optim="adamw_torch_fused", learning_rate=3e-4, max_grad_norm=1.0,
            report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        clock = Clock()
        transformers.Trainer(model, arguments, train_dataset=Samples(), callbacks=[clock]).train()
    seconds = np.diff(clock.times)[WARM_STEPS - 1 :]
    return BATCH * LENGTH / float(np.median(seconds))


def ceiling(precision: str) -> float:
    """FLOPs per second of a 2048³ matrix product."""
    import torch

    from llmtrain.models.linear import product

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    a, b = (torch.ones(2048, 2048, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        product(a, b)
        best = min(best, time.perf_counter() - started)
    return 2.0 * 2048**3 / best


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trainer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trainer:
        print(run_trainer(options.corpus, options.trainer))
        return
    os.environ["OMP_NUM_THREADS"] = str(options.threads)

    from llmtrain.data.corpus import Corpus
    from llmtrain.models.config import GPTConfig

    vocab_size = Corpus.open(options.corpus).manifest.vocab_size
    config = GPTConfig(vocab_size=vocab_size, hidden_size=WIDTH, num_layers=LAYERS, num_heads=HEADS)
    flops = config.flops_per_token(LENGTH)
    print(f"{'':<28}{'llmtrain':>10}{'Trainer':>10}{'ratio':>8}{'of ceiling':>12}{'Trainer':>10}")
    for precision in ("fp32", "bf16"):
        pairs = [
            (ours(options.corpus, precision, "data.document_mask=false"), theirs(options.corpus, precision))
            for _ in range(options.rounds)
        ]
        ratio = statistics.median(a / b for a, b in pairs)
        a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
        peak = ceiling(precision)
        shares = f"{a * flops / peak:>12.0%}{b * flops / peak:>10.0%}"
        print(f"{precision + ', tokens/s':<28}{a:>10,.0f}{b:>10,.0f}{ratio:>8.2f}{shares}", flush=True)
        masked = ours(options.corpus, precision)
        print(f"{precision + ', document masks':<28}{masked:>10,.0f}", flush=True)


if __name__ == "__main__":
    main()
