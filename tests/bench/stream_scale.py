"""The training stream over a corpus of very many tar files: start, resume, memory, and how well it mixes.

    OMP_NUM_THREADS=1 python -m tests.bench.stream_scale CORPUS [--tars 10000]

The tar files are those of CORPUS, linked many times: of real size and content, without taking space on disk.
Memory does not count what the tar files take in the page cache. With best_fit the first start on a host
counts the rows of every tar file.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from llmtrain.corpus.corpus import Corpus
from llmtrain.corpus.manifest import fingerprint_of
from llmtrain.data.datasets.base import TokenSequences
from llmtrain.data.loader import Loader
from llmtrain.data.mixture import begin
from llmtrain.data.order import BlockOrder
from llmtrain.data.stream import Stream
from llmtrain.files import checksum
from llmtrain.objectives.causal_lm import CausalLM
from tests.support.corpora import write_manifest

GLOBAL_SIZE, MICRO_SIZE = 64, 8
SEQUENCE_LENGTH = 512
SHUFFLE_SHARDS = 4
NEAR_ROWS = 100


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--tars", type=int, default=10_000)
    parser.add_argument("--buffers", type=int, default=100, help="shuffle buffers to stream for the memory")
    options = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.2f}")
    with tempfile.TemporaryDirectory(dir=options.corpus.parent) as folder:
        corpus = link_corpus(options.corpus, Path(folder), options.tars)
        bench_start(corpus)
        for packing in ("concat", "best_fit"):
            bench_memory(corpus, options.buffers, packing)
        bench_mixing(corpus)


def link_corpus(corpus: Path, folder: Path, num_tars: int) -> Path:
    """A corpus whose training split has this many tar files."""
    manifest = json.loads((corpus / "manifest.json").read_text())
    split = manifest["splits"]["train"]
    tars, index, lengths = (
        split["shards"],
        np.load(corpus / split["index"]),
        np.load(corpus / split["lengths"]),
    )
    rows = [index[index["shard"] == tar] for tar in range(len(tars))]
    documents = np.split(lengths, np.cumsum([tar["num_documents"] for tar in tars])[:-1])
    (folder / "train").mkdir()
    linked, indices = [], []
    sources = [tar % len(tars) for tar in range(num_tars)]
    for tar, source in enumerate(sources):
        file = f"train/train-{tar:06d}.tar"
        os.link(corpus / tars[source]["file"], folder / file)
        linked.append({**tars[source], "file": file})
        indices.append(rows[source].copy())
        indices[-1]["shard"] = tar
    for key, array in (
        ("index", np.concatenate(indices)),
        ("lengths", np.concatenate([documents[source] for source in sources])),
    ):
        np.save(folder / split[key], array)
        split[f"{key}_xxh3_128"] = checksum(folder / split[key])
    for key in ("num_tokens", "num_documents", "num_samples"):
        split[key] = sum(tar[key] for tar in linked)
    manifest["splits"] = {"train": {**split, "shards": linked}}
    checksums = (tar["xxh3_128"] for tar in linked)
    manifest["fingerprint"] = fingerprint_of(checksums, manifest["tokenizer"]["sha256"])
    write_manifest(folder, manifest)
    (folder / manifest["tokenizer"]["file"]).write_bytes(
        (corpus / manifest["tokenizer"]["file"]).read_bytes()
    )
    return folder


def open_loader(corpus: Path, packing: str = "concat") -> tuple[TokenSequences, Loader]:
    split = Corpus.open(corpus).split("train")
    dataset = TokenSequences(split, SEQUENCE_LENGTH, packing=packing, cache=corpus / "cache")  # type: ignore[arg-type]
    timeline = begin(GLOBAL_SIZE, {"corpus": 1.0}, {})
    stream = Stream({"corpus": dataset}, timeline, seed=0, shuffle_tars=SHUFFLE_SHARDS)
    return dataset, Loader(stream, CausalLM().collate, micro_size=MICRO_SIZE)


def bench_start(corpus: Path) -> None:
    for packing in ("concat", "best_fit"):
        for name, share in (("first step", 0.0), ("resume at 99 % of an epoch", 0.99)):
            times = []
            for _ in range(3):
                started = time.perf_counter()
                dataset, loader = open_loader(corpus, packing)
                opened = time.perf_counter() - started
                next(loader.steps(int(share * len(dataset) / GLOBAL_SIZE)))
                times.append((time.perf_counter() - started, opened))
            shown = ", ".join(f"{total:.3f} s ({opened:.3f} to open)" for total, opened in times)
            print(f"{packing}, {name}: {shown}", flush=True)
        print(dataset.describe())


def bench_memory(corpus: Path, buffers: int, packing: str) -> None:
    process = psutil.Process()
    dataset, loader = open_loader(corpus, packing)
    buffer_rows = int(dataset.tar_sizes[:SHUFFLE_SHARDS].sum())
    num_steps = buffers * buffer_rows // GLOBAL_SIZE
    assert num_steps < len(dataset) // GLOBAL_SIZE
    print(f"{packing}, memory while {buffers} shuffle buffers of {buffer_rows:,} rows are streamed:")
    marks = {max(1, int(share * num_steps)): share for share in (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)}
    for step, _ in zip(range(1, num_steps + 1), loader.steps(), strict=False):
        if step in marks:
            print(f"  {marks[step]:>4.0%}: {process.memory_info().rss / 1e6:,.0f} MB", flush=True)


def bench_mixing(corpus: Path) -> None:
    """How often consecutive samples are of one tar file, or near each other in it."""
    sizes = TokenSequences(Corpus.open(corpus).split("train"), SEQUENCE_LENGTH).tar_sizes
    firsts = np.cumsum(sizes) - sizes
    print(
        f"of neighbours in the order (in a step of {GLOBAL_SIZE}: tar files that a step has samples of)\n"
        f"{'shuffle_tars':>16}{'same tar':>12}{f'within {NEAR_ROWS} rows':>17}{'tars a step':>15}"
    )
    for block_tars in (1, 4, 16, 64, len(sizes)):
        order = BlockOrder(sizes, seed=0, block_tars=block_tars)
        _, indices = order(np.arange(GLOBAL_SIZE * 10_000))
        tars = np.searchsorted(firsts, indices, side="right") - 1
        same = tars[1:] == tars[:-1]
        near = same & (np.abs(np.diff(indices)) <= NEAR_ROWS)
        by_step = np.sort(tars.reshape(-1, GLOBAL_SIZE), axis=1)
        a_step = (np.diff(by_step, axis=1) != 0).sum(axis=1).mean() + 1
        name = "all" if block_tars == len(sizes) else block_tars
        print(f"{name:>16}{same.mean():>12.4%}{near.mean():>17.4%}{a_step:>15.1f}")


if __name__ == "__main__":
    main()
