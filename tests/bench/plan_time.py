"""Predicted against measured step times of twelve configurations on this machine's CPU.

    OMP_NUM_THREADS=2 python -m tests.bench.plan_time CORPUS [--cluster FILE.yaml] [--only NAME] [--steps 8]

`llmtrain plan calibrate` measures the machine first, unless a file of an earlier one is given. Then each
configuration is planned (`seconds_per_step` of `format=json`) and trained for some steps; its time is the
median of the steps after the first two. Run it on an idle machine: calibration and training share a minute.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

GPT = ("model=gpt_tiny", "engine=local")
CONFIGURATIONS: dict[str, tuple[str, ...]] = {
    "4 layers of 256": (*GPT, "model.hidden_size=256", "model.num_layers=4"),
    "8 layers of 256": (*GPT, "model.hidden_size=256", "model.num_layers=8"),
    "4 layers of 512": (*GPT, "model.hidden_size=512", "model.num_layers=4", "model.num_heads=8"),
    "2 layers of 1024": (*GPT, "model.hidden_size=1024", "model.num_layers=2", "model.num_heads=16"),
    "6 layers of 384": (*GPT, "model.hidden_size=384", "model.num_layers=6", "model.num_heads=6"),
    "short rows": (*GPT, "model.hidden_size=512", "batch.sequence_length=64", "batch.micro_size=16"),
    "long rows": (*GPT, "model.hidden_size=256", "batch.sequence_length=512", "batch.micro_size=2"),
    "accumulation": (*GPT, "model.hidden_size=384", "model.num_heads=6", "batch.micro_size=2"),
    "recomputation": (*GPT, "model.hidden_size=512", "model.num_heads=8", "recompute=full"),
    "bf16": (*GPT, "model.hidden_size=512", "model.num_heads=8", "precision=bf16"),
    "Llama's form": ("model=llama_tiny", "engine=local", "model.hidden_size=256", "model.num_layers=4"),
    "BERT": ("model=bert_tiny", "engine=local", "model.hidden_size=256", "model.num_layers=4"),
}
SHARED = ("batch.global_size=8", "batch.micro_size=8", "batch.sequence_length=256", "device=cpu")
TRAINING = ("evaluation.every=null", "evaluation.at_start=false", "checkpoint.every=null", "data.workers=0")


def llmtrain(*words: str) -> str:
    """Run a command to its end and return its output."""
    done = subprocess.run([sys.executable, "-m", "llmtrain", *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"llmtrain {' '.join(words)}:\n{done.stderr[-2000:]}")
    return done.stdout


def settings(own: tuple[str, ...], corpus: Path) -> list[str]:
    """The overrides of a configuration, each key once."""
    found = dict(word.split("=", 1) for word in (*SHARED, f"data.path={corpus}", *own))
    return [f"{key}={value}" for key, value in found.items()]


def measured(words: list[str], folder: Path, steps: int) -> float:
    """Seconds of a step: the tokens of a step over the tokens a second of each."""
    batch = dict(word.split("=", 1) for word in words)
    tokens = int(batch["batch.global_size"]) * int(batch["batch.sequence_length"])
    llmtrain("train", *words, *TRAINING, f"run.dir={folder}", f"train.steps={steps}")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = [
        tokens / record["step_tokens_per_second"] for record in records if "step_tokens_per_second" in record
    ]
    return median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--cluster", type=Path)
    parser.add_argument("--only", choices=CONFIGURATIONS)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    errors = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        file = folder / "cluster/here.yaml"
        file.parent.mkdir()
        if options.cluster is None:
            llmtrain("plan", "calibrate", f"output={file}", "device=cpu")
        else:
            file.write_text(options.cluster.read_text())
        print("| configuration | predicted | measured | error |\n|---|---|---|---|", flush=True)
        for name, own in CONFIGURATIONS.items():
            if options.only not in (None, name):
                continue
            words = settings(own, options.corpus.absolute())
            plan = json.loads(
                llmtrain("plan", "--config-dir", str(folder), "cluster=here", *words, "format=json")
            )
            predicted, took = plan["seconds_per_step"], measured(words, folder / name, options.steps)
            errors.append(predicted / took - 1)
            print(f"| {name} | {predicted:.3f} s | {took:.3f} s | {errors[-1]:+.0%} |", flush=True)
    print(f"\nmedian absolute error {median(map(abs, errors)):.0%}, worst {max(map(abs, errors)):.0%}")


if __name__ == "__main__":
    main()
