"""The whole memory of real runs, libraries included, beside what `llmtrain plan` says before they start.

    python -m tests.bench.run_memory CORPUS [--only WORD]

Each row is `llmtrain train` over the corpus for some steps, with evaluation and a checkpoint, on one or two
processes. Measured is the most that a process had resident (`ru_maxrss` of the kernel), which counts pages of
libraries, and the freed blocks that a run keeps for its next step. plan_memory.py compares the tensors alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

MIB = 2**20
QUICKSTART = (
    "model=llama_tiny model.tie_embeddings=true model.hidden_size=192 model.num_layers=4 model.num_heads=6 "
    "model.num_kv_heads=6 model.mlp_hidden_size=512 batch.global_size=8 batch.micro_size=8 "
    "batch.sequence_length=256"
)
"""The model and batch of launch/quickstart.sh."""
GPT = "model=gpt_tiny batch.global_size=8 batch.micro_size=8 batch.sequence_length=256"
WIDE = (
    "model=gpt_tiny model.hidden_size=1024 model.num_heads=16 model.num_layers=8 batch.global_size=4 "
    "batch.micro_size=2 batch.sequence_length=256"
)
ONE_ROW = "model=gpt_tiny batch.global_size=1 batch.micro_size=1 batch.sequence_length=64"
RUNS = {
    "quickstart, bf16": (1, f"{QUICKSTART} precision=bf16"),
    "quickstart, fp32": (1, f"{QUICKSTART} precision=fp32"),
    "GPT of 7 million": (1, GPT),
    "GPT of 7 million, one row": (1, ONE_ROW),
    "GPT of 109 million": (1, WIDE),
    "GPT of 109 million, recomputed": (1, f"{WIDE} recompute=full"),
    "GPT of 109 million, ZeRO 2, bf16": (2, f"{WIDE} parallel.zero=2 precision=bf16"),
    "GPT of 109 million, tensor 2": (2, f"{WIDE} parallel.tensor=2"),
}
STEPS = (
    "train.steps=4 evaluation.every=4 evaluation.max_samples=8 track=[jsonl] device=cpu watch.hang_seconds=0"
)


def forecast(words: list[str], size: int) -> int:
    """Bytes of the fullest process."""
    command = [sys.executable, "-m", "llmtrain", "plan", "format=json", f"world_size={size}", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return max(stage["total"] for stage in json.loads(done.stdout)["memory"])


def measured(words: list[str], size: int) -> int:
    """Most bytes that one process of a real run had resident."""
    command = [sys.executable, "-m", "llmtrain", "train", *words]
    if size > 1:
        start = ["-m", "llmtrain.distributed.torchrun", f"--nproc-per-node={size}", "-m", "llmtrain", "train"]
        command = [sys.executable, *start, *words]
    child = os.fork()
    if child == 0:  # so that this run's processes alone are among its descendants
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        sys.stderr.write(done.stderr if done.returncode else "")
        os._exit(done.returncode)
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    print(f"{'run':<36} {'processes':>9} {'forecast':>9} {'measured':>9} {'error':>7}   MiB", flush=True)
    errors = []
    for name, (size, overrides) in RUNS.items():
        if options.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            words = [*overrides.split(), *STEPS.split(), f"data.path={options.corpus.absolute()}"]
            planned = forecast(words, size)
            most = measured([*words, f"run.dir={folder}/run"], size)
        errors.append(abs(planned / most - 1))
        row = f"{planned / MIB:>9.0f} {most / MIB:>9.0f} {planned / most - 1:>+7.1%}"
        print(f"{name:<36} {size:>9} {row}", flush=True)
    print(f"{len(errors)} runs: median error {median(errors):.1%}, worst {max(errors):.1%}")


if __name__ == "__main__":
    main()
