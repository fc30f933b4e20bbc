"""The same tokens in the formats of other stream libraries, and each library's readers of them.

Rows hold W tokens. Shuffling is on as a user of the library turns it on. Where a library knows several ways
to write or read, the faster ones stand here.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SEED = 0
BATCH_ROWS = 64
SHARD_BYTES = 1 << 23
SHUFFLE_ROWS = 1000
"""Of libraries that shuffle through a buffer: what webdataset's examples take."""

Reader = Callable[[Path, int], Iterator[int]]
"""(folder, W) → without end, how many tokens each item brought."""


@dataclass(frozen=True)
class Format:
    write: Callable[[Path, Path, int], None]
    """(corpus, folder, W): writes the training split's tokens into the folder."""
    readers: dict[str, Reader]
    """Written with the arguments that a user would give."""
    forget: Callable[[], None] = lambda: None
    """Remove the shared memory that killed earlier runs left in the system."""


def samples_of(corpus: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens, document ends) of the training split's samples in order: a corpus is plain webdataset."""
    import webdataset as wds

    tars = json.loads((corpus / "manifest.json").read_text())["splits"]["train"]["shards"]
    urls = [str(corpus / tar["file"]) for tar in tars]
    for sample in wds.WebDataset(urls, shardshuffle=False).decode():
        yield sample["tokens.npy"], sample["ends.npy"]


def rows_of(corpus: Path, width: int) -> Iterator[np.ndarray]:
    """The split's tokens, end to end, in rows of `width`; what is left over is dropped."""
    rest = np.empty(0, dtype=np.uint16)
    for tokens, _ in samples_of(corpus):
        stream = np.concatenate([rest, tokens])
        whole = len(stream) // width * width
        yield from stream[:whole].reshape(-1, width)
        rest = stream[whole:]


def _allow_any_torchvision() -> None:
    """Lets `streaming` import torchvision, for datasets of images, beside a torch of another build.

    PyPI's torchvision can't load its operators beside a CPU torch, and fails at import where it gives two
    of them shape functions. Nothing here calls these.
    """
    import torch

    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(
                f"torchvision::{name}", "(Tensor boxes, Tensor scores, float limit) -> Tensor"
            )


def write_mds(corpus: Path, folder: Path, width: int) -> None:
    _allow_any_torchvision()
    from streaming import MDSWriter

    for name, encoding in (("ndarray", f"ndarray:uint16:{width}"), ("bytes", "bytes")):
        with MDSWriter(out=str(folder / name), columns={"tokens": encoding}, size_limit=SHARD_BYTES) as out:
            for row in rows_of(corpus, width):
                out.write({"tokens": row if name == "ndarray" else row.tobytes()})


def forget_mds() -> None:
    _allow_any_torchvision()
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()


def read_mds(column: str, algorithm: str) -> Reader:
    def read(folder: Path, width: int) -> Iterator[int]:
        _allow_any_torchvision()
        from streaming import StreamingDataset

        # Processes that read one folder share memory by its name: each reader has a name of its own.
        own = folder / f"{column}-{algorithm}"
        if not own.exists():
            own.symlink_to(folder / column)
        dataset = StreamingDataset(
            local=str(own),
            shuffle=True,
            shuffle_algo=algorithm,
            shuffle_seed=SEED,
            batch_size=BATCH_ROWS,
            num_canonical_nodes=1,
        )
        for _ in itertools.count():
            for sample in dataset:
                tokens = sample["tokens"]
                yield len(np.frombuffer(tokens, np.uint16) if column == "bytes" else tokens)

    return read


def write_webdataset(corpus: Path, folder: Path, width: int) -> None:
    import webdataset as wds

    for name in ("npy", "bytes"):
        (folder / name).mkdir()
        pattern = str(folder / name / "%06d.tar")
        with wds.ShardWriter(pattern, maxsize=SHARD_BYTES, maxcount=1 << 30, verbose=0) as out:
            for number, row in enumerate(rows_of(corpus, width)):
                sample = {"npy": row} if name == "npy" else {"bytes": row.tobytes()}
                out.write({"__key__": f"{number:09d}", **sample})


def read_webdataset(column: str) -> Reader:
    def read(folder: Path, width: int) -> Iterator[int]:
        import webdataset as wds

        urls = sorted(map(str, (folder / column).iterdir()))
        dataset = wds.WebDataset(urls, shardshuffle=len(urls), seed=SEED).shuffle(SHUFFLE_ROWS)
        if column == "npy":
            rows = dataset.decode().to_tuple("npy").repeat()
        else:
            rows = dataset.map(lambda sample: (np.frombuffer(sample["bytes"], np.uint16),)).repeat()
        for (tokens,) in rows:
            yield len(tokens)

    return read


def write_litdata(corpus: Path, folder: Path, width: int) -> None:
    os.environ["LITDATA_DISABLE_VERSION_CHECK"] = "1"
    from litdata import TokensLoader, optimize

    for name, chunk_bytes in (("small", SHARD_BYTES), ("large", 8 * SHARD_BYTES)):
        optimize(
            fn=_documents,
            inputs=[str(corpus)],
            output_dir=str(folder / name),
            chunk_bytes=chunk_bytes,
            item_loader=TokensLoader(),
            num_workers=1,
            verbose=False,
        )


def _documents(corpus: str) -> Iterator[Any]:
    for tokens, ends in samples_of(Path(corpus)):
        yield from np.split(tokens, ends[:-1])


def read_litdata(chunks: str, batched: bool) -> Reader:
    def read(folder: Path, width: int) -> Iterator[int]:
        os.environ["LITDATA_DISABLE_VERSION_CHECK"] = "1"
        from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

        dataset = StreamingDataset(
            str(folder / chunks), item_loader=TokensLoader(block_size=width), shuffle=True, seed=SEED
        )
        items = StreamingDataLoader(dataset, batch_size=BATCH_ROWS) if batched else dataset
        for _ in itertools.count():
            for item in items:
                yield item.numel() if batched else item.size

    return read


def write_arrow(corpus: Path, folder: Path, width: int) -> None:
    import pyarrow as pa
    from datasets import Dataset

    tokens = np.concatenate(list(rows_of(corpus, width)))
    column = pa.FixedSizeListArray.from_arrays(pa.array(tokens), width)
    Dataset(pa.table({"tokens": column})).save_to_disk(str(folder / "arrow"), max_shard_size=SHARD_BYTES)


def read_arrow(iterable: bool) -> Reader:
    def read(folder: Path, width: int) -> Iterator[int]:
        from datasets import load_from_disk

        dataset = load_from_disk(str(folder / "arrow")).with_format("numpy")
        for epoch in itertools.count():
            if iterable:
                shuffled = dataset.to_iterable_dataset(num_shards=16).shuffle(SEED, buffer_size=SHUFFLE_ROWS)
                shuffled.set_epoch(epoch)
            else:
                shuffled = dataset.shuffle(SEED + epoch)
            for batch in shuffled.iter(BATCH_ROWS):
                yield batch["tokens"].size

    return read


def read_stream_rows(packing: str) -> Reader:
    def read(corpus: Path, width: int) -> Iterator[int]:
        dataset, stream = _stream(corpus, width, packing)
        for step in itertools.count():
            stream.enter(step)
            yield dataset.tokens(stream.origins(stream.samples(step), step).indices).size

    return read


def read_batches(micro_size: int, workers: int) -> Reader:
    def read(corpus: Path, width: int) -> Iterator[int]:
        from llmtrain.data.loader import Loader
        from llmtrain.engine.allocator import keep_freed_memory
        from llmtrain.objectives.causal_lm import CausalLM

        keep_freed_memory()  # as `llmtrain train` does
        _, stream = _stream(corpus, width, "concat")
        loader = Loader(stream, CausalLM().collate, micro_size=micro_size, workers=workers)
        for step in loader.steps():
            yield sum(micro_batch.batch["labels"].numel() for micro_batch in step.micro_batches)

    return read


def _stream(corpus: Path, width: int, packing: str) -> tuple[Any, Any]:
    from llmtrain.corpus.corpus import Corpus
    from llmtrain.data.datasets.base import TokenSequences
    from llmtrain.data.mixture import begin
    from llmtrain.data.stream import Stream

    dataset = TokenSequences(Corpus.open(corpus).split("train"), width - 1, packing=packing)  # type: ignore[arg-type]
    timeline = begin(BATCH_ROWS, {"corpus": 1.0}, {})
    return dataset, Stream({"corpus": dataset}, timeline, seed=SEED, shuffle_tars=4)


OURS, ROWS = "llmtrain", "rows"

FORMATS = {
    OURS: Format(
        lambda corpus, folder, width: None,
        {
            ROWS: read_stream_rows("concat"),
            "rows, best_fit": read_stream_rows("best_fit"),
            f"training batches of {BATCH_ROWS}": read_batches(BATCH_ROWS, 0),
            f"training batches of {BATCH_ROWS}, 2 threads": read_batches(BATCH_ROWS, 2),
            "training batches of 8": read_batches(8, 0),
        },
    ),
    "mosaicml-streaming": Format(
        write_mds,
        {
            f"{column}, {algorithm}": read_mds(column, algorithm)
            for column in ("ndarray", "bytes")
            for algorithm in ("py1e", "py1s")
        },
        forget_mds,
    ),
    "webdataset": Format(write_webdataset, {column: read_webdataset(column) for column in ("npy", "bytes")}),
    "litdata": Format(
        write_litdata,
        {
            f"{chunks} chunks, {'batches' if batched else 'rows'}": read_litdata(chunks, batched)
            for chunks in ("small", "large")
            for batched in (False, True)
        },
    ),
    "datasets": Format(write_arrow, {"map, shuffled": read_arrow(False), "iterable": read_arrow(True)}),
}


def write_once(library: str, corpus: Path, folder: Path, width: int) -> Path:
    """The library's copy of the corpus in `folder`, made unless it stands there whole; no reader may be open
    yet."""
    FORMATS[library].forget()
    target = folder / f"{library}-{width}"
    if not target.exists():
        partial = target.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        FORMATS[library].write(corpus, partial, width)
        partial.rename(target)
    return target


_OPEN: dict[tuple[str, str], Iterator[int]] = {}
"""Readers that go on where they were, in this process."""


@dataclass(frozen=True)
class Turn:
    tokens: int
    seconds: float
    cpu_seconds: float
    """Of all threads of the process."""

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    @property
    def cpu_rate(self) -> float:
        return self.tokens / self.cpu_seconds


def take_turn(library: str, reader: str, folder: Path, width: int, seconds: float) -> Turn:
    """Read on from where the last turn ended; epochs come as they come."""
    key = (library, reader)
    if key not in _OPEN:
        _OPEN[key] = FORMATS[library].readers[reader](folder, width)
        next(_OPEN[key])
    started, cpu_started, tokens = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - started < seconds:
        tokens += sum(itertools.islice(_OPEN[key], 16))
    return Turn(tokens, time.perf_counter() - started, time.process_time() - cpu_started)
