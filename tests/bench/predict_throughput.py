"""`llmtrain predict` against transformers' pipeline, on the same classifier and texts.

    python -m tests.bench.predict_throughput CHECKPOINT FILE [--rows 1000] [--threads 2] [--rounds 3]

CHECKPOINT: a fine-tuned classifier that exports; FILE: a table with the field text. The pipeline takes the
best of the batch sizes 1, 8 and 32. Each side runs in a process of its own, in turn. Ours is timed as the
whole command without its imports: it reads the file, tokenizes, loads the weights, predicts and writes; the
pipeline is timed over the texts alone.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BATCHES = (1, 8, 32)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("file")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--length", type=int, default=256, help="tokens that longer texts are cut to")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side == "ours":
        print(ours(options.checkpoint, options.file, options.length))
        return
    if options.side:
        print(pipeline(options.checkpoint, options.file, options.length, int(options.side)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with open(options.file, encoding="utf-8") as file, open(folder / "rows.csv", "w") as out:
            rows = [row["text"] for row, _ in zip(csv.DictReader(file), range(options.rows), strict=False)]
            writer = csv.writer(out)
            writer.writerows([["text"], *([row] for row in rows)])
        exported = folder / "exported"
        command = ["llmtrain", "export", f"checkpoint={options.checkpoint}", f"output={exported}"]
        subprocess.run([sys.executable, "-m", *command], check=True, stderr=subprocess.DEVNULL)

        def seconds(side: str) -> float:
            source = options.checkpoint if side == "ours" else str(exported)
            command = [sys.executable, "-m", "tests.bench.predict_throughput", source]
            command += [str(folder / "rows.csv"), f"--length={options.length}", f"--side={side}"]
            environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            return float(done.stdout.splitlines()[-1])

        names = ["ours", *map(str, BATCHES)]
        rounds = [{side: seconds(side) for side in names} for _ in range(options.rounds)]
    found = {side: len(rows) / statistics.median(r[side] for r in rounds) for side in names}
    ratio = statistics.median(min(r[str(size)] for size in BATCHES) / r["ours"] for r in rounds)
    for side, rate in found.items():
        title = "llmtrain predict" if side == "ours" else f"pipeline, batch size {side}"
        print(f"{title:<26}{rate:>10.1f} rows/s")
    print(f"{'ratio to the best':<26}{ratio:>10.2f}")


def ours(checkpoint: str, file: str, length: int) -> float:
    from llmtrain.cli import main as cli
    from llmtrain.engine import build as _  # what the command imports
    from llmtrain.interchange import trained as _trained

    del _, _trained
    with tempfile.TemporaryDirectory() as folder:
        words = [f"checkpoint={checkpoint}", f"input={file}", f"output={folder}/said.jsonl"]
        started = time.perf_counter()
        code = cli.run_verb("predict", [*words, f"sequence_length={length}"])
        assert code == 0
        assert json.loads(Path(folder, "said.jsonl").read_text().splitlines()[0])["prediction"]
        return time.perf_counter() - started


def pipeline(folder: str, file: str, length: int, batch_size: int) -> float:
    import transformers

    with open(file, encoding="utf-8") as stream:
        texts = [row["text"] for row in csv.DictReader(stream)]
    classify = transformers.pipeline("text-classification", folder, device="cpu")
    classify(texts[:2], truncation=True, max_length=length)
    started = time.perf_counter()
    said = classify(texts, batch_size=batch_size, truncation=True, max_length=length)
    assert len(said) == len(texts)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
