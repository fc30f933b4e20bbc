"""Conversations packed into rows against one in each row, padded to the longest of its batch: the ratio of
the time that an epoch takes.

    python -m tests.bench.chat_packing MODEL FILE [--rows 512] [--length 512] [--threads 2] [--rounds 3]

MODEL: a decoder that `llmtrain finetune model.path=` takes; FILE: conversations, such as jsonl with
`messages`. Both sides pass once over the same conversations, in random order, each in a process of its own,
in turn. Steps are timed without the first two; batches hold as many rows on both sides, so that a step of
packed rows has more conversations. `data.group=64` pads batches of like length, as a run does.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

WARM_STEPS = 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("file")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", help="further keys of llmtrain finetune, for both")
    options = parser.parse_intermixed_args()
    rounds = [(epoch(options, packing=True), epoch(options, packing=False)) for _ in range(options.rounds)]
    packed, padded = (statistics.median(each[side] for each in rounds) for side in (0, 1))
    ratio = statistics.median(b / a for a, b in rounds)
    print(f"packed {packed:.1f} s an epoch, padded {padded:.1f} s, ratio {ratio:.2f}")


def epoch(options: argparse.Namespace, *, packing: bool) -> float:
    """Return the seconds of an epoch: those of a step, by their median, times the steps."""
    with tempfile.TemporaryDirectory() as folder:
        words = [
            *("finetune", f"model.path={options.model}", "objective=instruct", f"data.path={options.file}"),
            *(f"data.max_train_rows={options.rows}", f"data.cache.dir={folder}/tables", "train.epochs=1"),
            *(f"run.dir={folder}/run", f"batch.sequence_length={options.length}", "evaluation.every=null"),
            *("checkpoint.every=null", f"objective.packing={packing}", "data.group=1", *options.overrides),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        command = [sys.executable, "-m", "llmtrain", *words]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL, env=environment)
        run = Path(folder) / "run"
        lines = (run / "metrics.jsonl").read_text().splitlines()
        rates = [json.loads(line)["step_tokens_per_second"] for line in lines]
        [segment] = json.loads((run / "data.json").read_text())["timeline"]
        # A rate counts the tokens of rows of mean length.
        tokens = options.length if packing else mean_length(run, segment["settings"]["samples"][""])
        return statistics.mean(segment["global_size"] * tokens / rate for rate in rates[WARM_STEPS:]) * len(
            rates
        )


def mean_length(run: Path, samples: int) -> float:
    """Return the mean tokens of a conversation."""
    said = json.loads((run / "data.json").read_text())["train"]
    found = re.search(r"([\d,]+) tokens", said)
    assert found is not None
    return int(found[1].replace(",", "")) / samples


if __name__ == "__main__":
    main()
