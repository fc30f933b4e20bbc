"""Training steps of LoRA over a decoder: our engine against peft in transformers' Trainer.

    python -m tests.bench.lora_throughput FOLDER CORPUS [--rank 8] [--threads 2] [--rounds 3] [key=value …]

FOLDER: a decoder as a Hugging Face folder; CORPUS: what `llmtrain prepare` made with its tokenizer. Both have
products beside the same matrices, all of the layers, and take the same rows in the same order, in which the
documents see each other. Each side runs in a process of its own, in turn. Both take fused AdamW and clip at
1. The peak is that of the whole process, the reading of the weights included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from tests.bench.against_trainer import STEPS, WARM_STEPS, Step, rows_of, trainer_steps

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("corpus")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("overrides", nargs="*", help="further keys of llmtrain finetune, for both")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()
    if options.side:
        side, precision = options.side
        run = {"ours": run_ours, "theirs": run_theirs}[side]
        steps = run(options, [*_keys(options), f"precision={precision}"])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"steps": steps, "peak": peak}))
        return

    def result(side: str, precision: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "tests.bench.lora_throughput", options.folder, options.corpus]
        command += [f"--rank={options.rank}", *options.overrides, "--side", side, precision]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    heads = f"{'ours, ms':>10}{'theirs':>10}{'wall ratio':>12}{'cpu ratio':>12}"
    print(f"{'':<8}{heads}{'peak, GiB':>16}{'losses':>20}")
    for precision in options.precisions.split(","):
        rounds = [(result("ours", precision), result("theirs", precision)) for _ in range(options.rounds)]
        medians = [
            [[statistics.median(s[i] for s in side["steps"][WARM_STEPS:]) for i in (0, 1)] for side in sides]
            for sides in rounds
        ]
        wall, cpu = (statistics.median(b[i] / a[i] for a, b in medians) for i in (0, 1))
        walls = "".join(f"{1000 * statistics.median(m[side][0] for m in medians):>10,.0f}" for side in (0, 1))
        peaks = " / ".join(f"{min(r[side]['peak'] for r in rounds) / GIB:.2f}" for side in (0, 1))
        losses = " / ".join(f"{side['steps'][0][2]:.4f}" for side in rounds[0])
        print(f"{precision:<8}{walls}{wall:>12.2f}{cpu:>12.2f}{peaks:>16}{losses:>20}", flush=True)


def _keys(options: argparse.Namespace) -> list[str]:
    """Return the overrides that both sides follow."""
    return [
        "model=pretrained", f"model.path={options.folder}", f"data.path={options.corpus}", "method=lora",
        f"lora.rank={options.rank}", f"train.steps={STEPS}", "run.dir=none", "batch.global_size=2",
        "batch.micro_size=2", "batch.sequence_length=512", "optimizer.betas=[0.9,0.999]",
        "optimizer.weight_decay=0", "data.document_mask=false", *options.overrides,
    ]  # fmt: skip


def _prepare(words: Sequence[str]) -> tuple[Any, Any, list[list[Any]]]:
    """Return the resolved run, its objective, and the micro-batches of each step."""
    from llmtrain.train.resolve import resolve
    from tests.support.training import compose, open_loader

    resolved = resolve(compose(words))
    config = resolved.config
    objective = config.objective.build(config.model, config.data, resolved.corpora)
    steps = zip(open_loader(resolved, objective=objective).steps(0), range(STEPS), strict=False)
    return resolved, objective, [step.micro_batches for step, _ in steps]


def run_ours(options: argparse.Namespace, words: Sequence[str]) -> list[Step]:
    import time

    import torch

    from llmtrain.distributed import processes
    from llmtrain.engine.build import build_engine
    from llmtrain.train.pretrained import open_weights

    resolved, objective, batches = _prepare(words)
    config, device = resolved.config, torch.device("cpu")
    processes.start(device)
    source = open_weights(resolved.pretrained, config.model).source(config.seed)
    engine = build_engine(config, resolved.layout, device, objective, None, source)
    steps = []
    for micro_batches in batches:
        wall, cpu = time.perf_counter(), time.process_time()
        loss = engine.train_step(micro_batches, lr=3e-4).loss
        steps.append((time.perf_counter() - wall, time.process_time() - cpu, loss))
    return steps


def run_theirs(options: argparse.Namespace, words: Sequence[str]) -> list[Step]:
    import peft
    import transformers

    resolved, _, batches = _prepare(words)
    config = resolved.config
    rows = []
    for (micro,) in batches:
        tokens, labels = micro.batch["tokens"], micro.batch["labels"].clone()
        # transformers shifts labels itself: those of ours are one place ahead.
        labels = labels.roll(1, dims=1)
        labels[:, 0] = -100
        rows += rows_of({"input_ids": tokens, "labels": labels})
    model = transformers.AutoModelForCausalLM.from_pretrained(options.folder)
    lora = config.lora
    settings = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules="all-linear"
    )
    adapted = peft.get_peft_model(model, settings)
    return trainer_steps(adapted, rows, config.batch.micro_size, config.precision)


if __name__ == "__main__":
    main()
