"""Fine-tuning a classifier: our engine against transformers' Trainer, on the same encoder, texts and batch.

    python -m tests.bench.finetune_throughput FOLDER FILE [--rows 1024] [--threads 2] [--rounds 3]
        [key=value …]

FOLDER: an encoder as a Hugging Face folder; FILE: a table with the fields text and label, such as a csv of
reviews. Both begin with the same weights and pass once over the same rows, cut to the same length, in batches
of rows of like length: the Trainer with its dynamic padding and its sampling by length. Each side runs in a
process of its own, in turn, and is timed from the end of its second step to the end of its last, reading the
batches included. Both take fused AdamW, clip at 1 and drop out as the folder says.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WARM_STEPS = 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("file")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("overrides", nargs="*", help="further keys of llmtrain finetune, for both")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()
    if options.side:
        side, precision = options.side
        with tempfile.TemporaryDirectory() as folder:
            run = {"ours": run_ours, "theirs": run_trainer}[side]
            words = [*_keys(options, Path(folder)), f"precision={precision}"]
            print(json.dumps(run(words, options.folder, precision)))
        return

    def rates(side: str, precision: str) -> dict[str, float]:
        command = [sys.executable, "-m", "tests.bench.finetune_throughput", options.folder, options.file]
        command += [f"--rows={options.rows}", *options.overrides, "--side", side, precision]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found

    print(
        f"{'':<8}{'ours, rows/s':>14}{'theirs':>10}{'wall ratio':>12}{'cpu ratio':>12}"
        f"{'padding':>18}{'mean losses':>20}"
    )
    for precision in options.precisions.split(","):
        rounds = [(rates("ours", precision), rates("theirs", precision)) for _ in range(options.rounds)]
        ours, theirs = (statistics.median(r[side]["rows_per_second"] for r in rounds) for side in (0, 1))
        wall = statistics.median(a["rows_per_second"] / b["rows_per_second"] for a, b in rounds)
        cpu = statistics.median(b["cpu_seconds"] / a["cpu_seconds"] for a, b in rounds)
        padding = " / ".join(f"{side['padding']:.1%}" for side in rounds[0])
        losses = " / ".join(f"{side['loss']:.4f}" for side in rounds[0])
        print(
            f"{precision:<8}{ours:>14.1f}{theirs:>10.1f}{wall:>12.2f}{cpu:>12.2f}{padding:>18}{losses:>20}",
            flush=True,
        )


def _keys(options: argparse.Namespace, folder: Path) -> list[str]:
    """Return the overrides of `llmtrain finetune` that both sides follow."""
    return [
        f"model.path={options.folder}", "objective=classification", f"data.path={options.file}",
        f"data.max_train_rows={options.rows}", f"data.cache.dir={folder / 'tables'}",
        f"run.dir={folder / 'run'}", "train.epochs=1", "data.workers=0",
        "batch.global_size=32", "batch.micro_size=32", "batch.sequence_length=256",
        "schedule=constant", "schedule.warmup_steps=0", "optimizer.lr=5e-5",
        "optimizer.weight_decay=0.01", "optimizer.betas=[0.9,0.999]", *options.overrides,
    ]  # fmt: skip


class _Clock:
    """Times what lies between the end of the second step and the end of the last."""

    def __init__(self) -> None:
        self.rows = self.steps = 0
        self.tokens = self.width = 0
        self.losses: list[float] = []
        self._begin = self._end = (0.0, 0.0)

    def step(self, rows: int) -> None:
        now = time.perf_counter(), time.process_time()
        self.steps += 1
        if self.steps == WARM_STEPS:
            self._begin = now
        elif self.steps > WARM_STEPS:
            self.rows += rows
        self._end = now

    def results(self) -> dict[str, float]:
        wall, cpu = (b - a for a, b in zip(self._begin, self._end, strict=True))
        return {
            "rows_per_second": self.rows / wall,
            "cpu_seconds": cpu / self.rows,
            "padding": 1 - self.tokens / self.width,
            "loss": statistics.mean(self.losses),
        }


def run_ours(words: Sequence[str], folder: str, precision: str) -> dict[str, float]:
    import torch

    from llmtrain.distributed import processes
    from llmtrain.engine.build import build_engine
    from llmtrain.train.pretrained import open_weights
    from llmtrain.train.resolve import resolve
    from tests.support.training import compose, open_loader

    resolved = resolve(compose(words, "finetune"))
    config = resolved.config
    assert resolved.pretrained is not None
    objective = config.objective.build(config.model, config.data, resolved.corpora)
    device = torch.device("cpu")
    processes.start(device)
    source = open_weights(resolved.pretrained, config.model).source(config.seed)
    engine = build_engine(config, resolved.layout, device, objective, None, source)
    clock = _Clock()
    for step, _ in zip(open_loader(resolved).steps(0), range(config.train.steps), strict=False):
        clock.losses.append(engine.train_step(step.micro_batches, lr=config.optimizer.lr).loss)
        for micro in step.micro_batches:
            clock.tokens += int(micro.batch["lengths"].sum())
            clock.width += micro.batch["tokens"].numel()
        clock.step(config.batch.global_size)
    return clock.results()


def run_trainer(words: Sequence[str], folder: str, precision: str) -> dict[str, float]:
    import torch
    import transformers

    from llmtrain.train.resolve import resolve
    from tests.support.training import compose

    resolved = resolve(compose(words, "finetune"))
    config = resolved.config
    examples = config.objective.open(
        config.model, config.data, resolved.corpora, "train", config.batch.sequence_length
    )[""]
    rows: list[dict[str, Any]] = []
    for index in range(len(examples)):
        raw = examples.get(torch.tensor([index]).numpy())
        tokens = raw["tokens"][0][: int(raw["lengths"][0])].tolist()
        rows.append(
            {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": int(raw["label"][0])}
        )
    clock = _Clock()

    class Timed(transformers.TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            clock.step(config.batch.global_size)

        def on_log(self, *_: object, logs: dict[str, float], **__: object) -> None:
            if "loss" in logs:
                clock.losses.append(logs["loss"])

    pads = transformers.DataCollatorWithPadding(transformers.AutoTokenizer.from_pretrained(folder))

    def collate(of_batch: list[dict[str, Any]]) -> Any:
        batch = pads(of_batch)
        clock.tokens += int(batch["attention_mask"].sum())
        clock.width += batch["input_ids"].numel()
        return batch

    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as output:
        arguments = transformers.TrainingArguments(
            output_dir=output, num_train_epochs=1, per_device_train_batch_size=config.batch.global_size,
            bf16=precision == "bf16", use_cpu=True, optim="adamw_torch_fused", weight_decay=0.01,
            learning_rate=config.optimizer.lr, lr_scheduler_type="constant", max_grad_norm=1.0, report_to=[],
            save_strategy="no", logging_steps=1, disable_tqdm=True, train_sampling_strategy="group_by_length",
        )  # fmt: skip
        transformers.Trainer(
            model, arguments, train_dataset=rows, data_collator=collate, callbacks=[Timed()]
        ).train()
    return clock.results()


if __name__ == "__main__":
    main()
