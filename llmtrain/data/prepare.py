"""Raw text → tokenizer and sharded corpus: `llmtrain prepare`.

Five stages, each over all cores, each in memory that does not grow with the corpus:

1. read        sources → clean documents in blocks, with their hashes
2. duplicates  the hashes, one range at a time → documents to drop
3. tokenizer   a sample of the training documents → a sentencepiece model
4. encode      blocks → token ids
5. shards      token ids → webdataset tars and their index

Their work stands in OUTPUT/.prepare until the corpus is whole; a run that was killed goes on from
there. What is written depends on sources and settings alone, not on workers, time or kills.
The disk holds the clean text and about as much again while prepare works.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from llmtrain.config import encode as encode_config
from llmtrain.data import blocks as block_files
from llmtrain.data import encode as encoding
from llmtrain.data.blocks import Block, BlockWriter
from llmtrain.data.clean import CleanCounts, clean
from llmtrain.data.config import PrepareConfig, SplitConfig, TokenizerConfig
from llmtrain.data.corpus import FORMAT, MANIFEST_NAME, STAMP_NAME, UNFINISHED_NAME, VERSION
from llmtrain.data.encode import SPLITS, EncodedBlock
from llmtrain.data.files import disk_errors, write_marker
from llmtrain.data.report import Progress, Report, SplitReport
from llmtrain.data.shards import INDEX_DTYPE, token_dtype, write_index, write_lengths
from llmtrain.data.sources import (
    AUTO_DOCUMENT_BYTES,
    SourceFile,
    Unit,
    contents_fingerprint,
    find_files,
    plan_units,
    read_part,
    undecodable,
)
from llmtrain.data.tokenizer import Tokenizer, train
from llmtrain.data.workers import Workers, count
from llmtrain.errors import DataError, Problem, UserError
from llmtrain.files import lock, sync_folder, write_atomically, write_json_atomically

NO_EFFECT = ("workers", "overwrite", "output", "source")
"""Settings on which the corpus does not depend; sources are compared by their contents."""


def prepare(config: PrepareConfig) -> Report:
    """Make the corpus that `config` describes, go on with one that was interrupted, or leave a
    finished one as it is; prints progress and the report.

    Raises DataError for sources, tokenizers and output folders that cannot be used.
    """
    started = time.monotonic()
    files, skipped = find_files(config.source, exclude=config.output)
    given_model = None if config.tokenizer.model is None else Tokenizer.load(config.tokenizer.model)
    identity = _identity(config, files, given_model)
    source_bytes = sum(file.size for file in files)
    needed = 2 * sum(file.size * (4 if file.compression or file.kind == "parquet" else 1) for file in files)
    with Progress() as progress, disk_errors(config.output, needed), _locked(config.output):
        report = _finished(config, identity)
        if report is None:
            work = _open_work(config, identity, files, progress)
            if not (work / MANIFEST_NAME).exists():
                workers = os.cpu_count() or 1 if config.workers is None else config.workers
                with _tidied(work), Workers(workers, config.output, needed) as pool:
                    run = _Run(config, files, work, pool, progress)
                    manifest = run.manifest(identity, skipped, source_bytes, given_model)
                write_json_atomically(work / MANIFEST_NAME, manifest)
            manifest = json.loads((work / MANIFEST_NAME).read_text())
            _commit(work, config.output)
            report = Report.from_recorded(manifest["report"])
            report.seconds, report.stages = time.monotonic() - started, progress.seconds
    report.output = str(config.output)
    for line in report.lines():
        progress.say(line)
    return report


# ------------------------------------------------------------------------------------ output folder


def _identity(config: PrepareConfig, files: list[SourceFile], model: Tokenizer | None) -> dict[str, Any]:
    """What two corpora must share to be the same."""
    settings = _settings(config)
    if model is not None:
        settings["tokenizer"] = {"model": model.sha256}
    return {
        "settings": settings,
        "sources": {
            "files": len(files),
            "bytes": sum(file.size for file in files),
            "contents": contents_fingerprint(files),
        },
    }


def _settings(config: PrepareConfig) -> dict[str, Any]:
    return {key: value for key, value in encode_config(config).items() if key not in NO_EFFECT}


def _differences(theirs: dict[str, Any], ours: dict[str, Any], prefix: str = "") -> Iterator[str]:
    # A given tokenizer has fewer settings than one to be trained: what both have tells them apart.
    for key in (key for key in theirs if key in ours):
        a, b = theirs[key], ours[key]
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix.removeprefix('settings.')}{key} is {_short(a)} there and {_short(b)} here"


def _short(value: Any) -> str:
    return json.dumps(value) if len(json.dumps(value)) < 40 else json.dumps(value)[:37] + "…"


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Only one process at a time works in an output folder."""
    made = not output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        got = f"a place where no folder can be made ({error.strerror})"
        raise DataError(Problem(str(output), got, "", "choose another output")) from error
    descriptor = os.open(output, os.O_RDONLY)
    try:
        try:
            lock(descriptor, output)
        except BlockingIOError as error:
            raise DataError(
                Problem(str(output), "a folder in which another prepare is at work", "", "wait for it to end")
            ) from error
        yield
    finally:
        os.close(descriptor)
        if made and not any(output.iterdir()):
            output.rmdir()


def _finished(config: PrepareConfig, identity: dict[str, Any]) -> Report | None:
    """The report of the finished corpus in the output folder when it is the one wanted.

    Raises DataError when it is another one and may not be replaced, or when something else stands there.
    """
    path = config.output / MANIFEST_NAME
    if not path.exists():
        taken = [name for name in (*SPLITS, "tokenizer.model") if (config.output / name).exists()]
        if taken and not (config.output / UNFINISHED_NAME).exists():
            got = f"a folder that holds {', '.join(taken)} but no corpus"
            raise DataError(
                Problem(str(config.output), got, "an empty or new folder", "choose another output")
            )
        return None
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] != FORMAT:
            raise ValueError(manifest["format"])
        theirs = manifest["config"]["identity"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            Problem(str(path), "a file that is no corpus' manifest", "", "choose another output")
        ) from error
    if config.overwrite:
        return None
    if theirs != identity:
        differences = list(_differences(theirs, identity)) or ["made by another version"]
        raise DataError(
            Problem(
                str(config.output),
                f"a corpus of other sources or settings: {'; '.join(differences)}",
                "",
                "choose another output, or overwrite=true to replace it",
            )
        )
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            file = config.output / shard["file"]
            if not file.is_file() or file.stat().st_size != shard["bytes"]:
                raise DataError(
                    Problem(
                        str(file),
                        "a missing or truncated shard",
                        f"{shard['bytes']:,} bytes",
                        "overwrite=true makes it again",
                    )
                )
    if (config.output / UNFINISHED_NAME).exists():
        # Killed after the corpus was whole, or other settings were tried and left.
        shutil.rmtree(config.output / UNFINISHED_NAME)
    report = Report.from_recorded(manifest["report"])
    report.reused = True
    return report


def _open_work(
    config: PrepareConfig, identity: dict[str, Any], files: list[SourceFile], progress: Progress
) -> Path:
    """The folder of unfinished work, emptied when it belongs to other sources or settings."""
    work = config.output / UNFINISHED_NAME
    stamps = xxhash.xxh3_128_hexdigest(json.dumps([[f.name, f.size, f.mtime_ns] for f in files]).encode())
    request = {"version": VERSION, "identity": identity, "stamps": stamps}
    path = work / "request.json"
    if work.exists():
        earlier = json.loads(path.read_text()) if path.exists() else None
        if earlier == request:
            progress.say(f"going on with the unfinished work in {work}")
            return work
        _empty(work)
    work.mkdir(exist_ok=True)
    write_json_atomically(path, request)
    return work


def _empty(work: Path) -> None:
    """Remove what is in `work`, the request first, without which nobody goes on with the rest."""
    (work / "request.json").unlink(missing_ok=True)
    for entry in work.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


@contextmanager
def _tidied(work: Path) -> Iterator[None]:
    """Remove work in which nothing is finished when a user's error ends it."""
    try:
        yield
    except UserError:
        if not any(work.glob("read/*/*.hashes.npy")):
            _empty(work)
            work.rmdir()
        raise


def _commit(work: Path, output: Path) -> None:
    """Put the whole corpus in its place, its manifest last; may be killed and called again at any moment."""
    for name in (MANIFEST_NAME, STAMP_NAME):
        (output / name).unlink(missing_ok=True)
    for name in (*SPLITS, "tokenizer.model"):
        ready, place = work / "corpus" / name, output / name
        if not ready.exists():
            continue
        if place.is_dir():
            shutil.rmtree(place)
        os.replace(ready, place)
    sync_folder(output)
    os.replace(work / MANIFEST_NAME, output / MANIFEST_NAME)
    sync_folder(output)
    _empty(work)
    work.rmdir()


# ------------------------------------------------------------------------------------------- stages


@dataclass
class _Run:
    """One run of the stages; each takes what is finished from an earlier run and makes the rest."""

    config: PrepareConfig
    files: list[SourceFile]
    work: Path
    pool: Workers
    progress: Progress

    def manifest(
        self, identity: dict[str, Any], skipped: list[str], source_bytes: int, model: Tokenizer | None
    ) -> dict[str, Any]:
        """Run all stages; returns the manifest of the corpus that then stands in work/corpus."""
        blocks, counts = self.read()
        kept = sum(block.num_documents for block in blocks)
        if not kept:
            names = ", ".join(file.name for file in self.files[:3])
            raise DataError(
                Problem("source", f"no text at all in {len(self.files)} files ({names})", "some text")
            )
        dropped_paths, num_dropped = self.find_duplicates(blocks)
        tokenizer_path = self.make_tokenizer(blocks, dropped_paths, model)
        tokenizer = Tokenizer.load(tokenizer_path)
        encoded = self.encode(blocks, dropped_paths, tokenizer)
        splits = self.write_shards(encoded, tokenizer)
        report = Report(
            files=len(self.files),
            source_bytes=source_bytes,
            cleaning=counts,
            duplicates_dropped=num_dropped,
            documents_kept=kept - num_dropped,
            vocab_size=tokenizer.vocab_size,
            unknown_tokens=sum(block.num_unknown for block in encoded),
            splits={
                name: SplitReport(split["num_documents"], split["num_tokens"], split["num_bytes"])
                for name, split in splits.items()
            },
        )
        report.notes, report.warnings = self._remarks(report, tokenizer, skipped)
        return {
            "format": FORMAT,
            "version": VERSION,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "dtype": token_dtype(tokenizer.vocab_size).name,
            "tokenizer": {"file": "tokenizer.model", "sha256": tokenizer.sha256},
            "fingerprint": _fingerprint(splits, tokenizer),
            "splits": splits,
            "report": report.recorded(),
            "config": {**_settings(self.config), "source": list(self.config.source), "identity": identity},
        }

    def read(self) -> tuple[list[Block], CleanCounts]:
        folder = self.work / "read"
        folder.mkdir(exist_ok=True)
        units = list(plan_units(self.files, self.config.txt_document))
        sizes = [
            sum((p.file.size if p.stop is None or p.file.kind == "parquet" else p.stop - p.start) for p in u)
            for u in units
        ]
        stage = self.progress.stage("reading", sum(sizes), lambda: f"{self.pool.counted:,} documents")
        with stage:
            unfinished = []
            for number in range(len(units)):
                if _finished_unit(folder / f"{number:06d}") is None:
                    unfinished.append(number)
                else:
                    stage.advance(sizes[number])
            tasks = (
                (
                    number,
                    units[number],
                    folder,
                    self.config.text_field,
                    self.config.txt_document,
                    self.config.normalization,
                )
                for number in unfinished
            )
            for number in self.pool.map(_read_unit, tasks, stage.tick):
                stage.advance(sizes[number])
        blocks: list[Block] = []
        counts = CleanCounts()
        for number in range(len(units)):
            done = _finished_unit(folder / f"{number:06d}")
            assert done is not None, number
            blocks.extend(done[0])
            counts.add(done[1])
        return blocks, counts

    def find_duplicates(self, blocks: list[Block]) -> tuple[list[Path], int]:
        folder = self.work / "duplicates"
        folder.mkdir(exist_ok=True)
        ranges = block_files.num_ranges(blocks)
        paths = [folder / f"{number:06d}.npy" for number in range(ranges)]
        with self.progress.stage("duplicates", ranges) as stage:
            tasks = ((blocks, number, ranges, path) for number, path in enumerate(paths) if not path.exists())
            for _ in self.pool.map(_find_duplicates, tasks, stage.tick):
                stage.advance(1)
        return paths, sum(len(np.load(path, mmap_mode="r")) for path in paths)

    def make_tokenizer(self, blocks: list[Block], dropped_paths: list[Path], given: Tokenizer | None) -> Path:
        path = self.work / "corpus" / "tokenizer.model"
        path.parent.mkdir(exist_ok=True)
        if path.exists():
            return path
        if given is not None:
            write_atomically(path, given.model)
            return path
        with self.progress.stage("tokenizer", 1) as stage:
            task = (blocks, dropped_paths, self.config.split, self.config.tokenizer, self.config.seed, path)
            for _ in self.pool.map(_train_tokenizer, [task], stage.tick):
                stage.advance(1)
        return path

    def encode(
        self, blocks: list[Block], dropped_paths: list[Path], tokenizer: Tokenizer
    ) -> list[EncodedBlock]:
        folder = self.work / "encoded"
        folder.mkdir(exist_ok=True)
        dtype = token_dtype(tokenizer.vocab_size)
        paths = [folder / f"{number:06d}" for number in range(len(blocks))]
        with self.progress.stage("encoding", sum(block.num_bytes for block in blocks)) as stage:
            unfinished = []
            for number, block in enumerate(blocks):
                if encoding.finished_block(paths[number], dtype) is None:
                    unfinished.append(number)
                else:
                    stage.advance(block.num_bytes)
            tokenizer_path = self.work / "corpus" / "tokenizer.model"
            tasks = (
                (
                    blocks[number],
                    number,
                    dropped_paths,
                    self.config.split,
                    tokenizer_path,
                    tokenizer.sha256,
                    paths[number],
                )
                for number in unfinished
            )
            for done in self.pool.map(encoding.encode_block, tasks, stage.tick):
                stage.advance(blocks[int(Path(done.path).name)].num_bytes)
        return [_present(encoding.finished_block(path, dtype)) for path in paths]

    def write_shards(self, encoded: list[EncodedBlock], tokenizer: Tokenizer) -> dict[str, Any]:
        """The manifest's `splits`."""
        dtype = token_dtype(tokenizer.vocab_size)
        done_folder = self.work / "shards"
        done_folder.mkdir(exist_ok=True)
        results: dict[tuple[str, int], dict[str, Any]] = {}

        def tasks() -> Iterator[tuple[Any, ...]]:
            for split, name in enumerate(SPLITS):
                first_sample = 0
                samples = encoding.plan_samples(encoded, split, self.config.sample_tokens)
                for shard, planned in enumerate(
                    encoding.plan_shards(samples, dtype, self.config.shard_bytes)
                ):
                    path = self.work / "corpus" / name / f"{name}-{shard:06d}.tar"
                    done_path = done_folder / f"{name}-{shard:06d}.json"
                    done = _finished_shard(path, done_path)
                    if done is None:
                        yield path, shard, first_sample, planned, dtype, done_path
                    else:
                        results[name, shard] = done
                    first_sample += len(planned)

        num_tokens = sum(sum(block.num_tokens) for block in encoded)
        with self.progress.stage("shards", num_tokens) as stage:
            for done in self.pool.map(encoding.write_planned_shard, tasks(), stage.tick):
                results[done["split"], done["shard"]] = done
                stage.advance(done["entry"]["num_tokens"])
        splits = {}
        for split, name in enumerate(SPLITS):
            shards = [results[key] for key in sorted(key for key in results if key[0] == name)]
            rows = [tuple(row) for shard in shards for row in shard["rows"]]
            index_path = self.work / "corpus" / name / "index.npy"
            index_checksum = write_index(index_path, np.array(rows, dtype=INDEX_DTYPE))
            num_documents = sum(block.num_documents[split] for block in encoded)
            lengths = encoding.split_lengths(encoded, split)
            lengths_path = index_path.with_name("lengths.npy")
            lengths_checksum = write_lengths(lengths_path, num_documents, lengths)
            entries = [shard["entry"] for shard in shards]
            for leftover in index_path.parent.glob(".*.tmp"):
                # From a worker of an earlier run that was killed.
                leftover.unlink()
            splits[name] = {
                "num_tokens": sum(block.num_tokens[split] for block in encoded),
                "num_documents": num_documents,
                "num_bytes": sum(block.num_bytes[split] for block in encoded),
                "num_samples": len(rows),
                "index": f"{name}/index.npy",
                "index_xxh3_128": index_checksum,
                "lengths": f"{name}/lengths.npy",
                "lengths_xxh3_128": lengths_checksum,
                "shards": entries,
            }
        return splits

    def _remarks(
        self, report: Report, tokenizer: Tokenizer, skipped: list[str]
    ) -> tuple[list[str], list[str]]:
        notes, warnings = [], []
        if any(file.kind == "txt" for file in self.files):
            meaning = {
                "auto": f"consecutive paragraphs of about {AUTO_DOCUMENT_BYTES >> 10} KiB, or a smaller file",
                "file": "a file",
                "line": "a line",
                "paragraph": "a paragraph",
            }[self.config.txt_document]
            notes.append(f"a document in .txt is {meaning} (txt_document={self.config.txt_document})")
        if skipped:
            endings = sorted({Path(name).suffix or "none" for name in skipped})
            notes.append(f"{len(skipped):,} files of other extensions left out: {', '.join(endings[:8])}")
        for name, split in report.splits.items():
            if not split.documents:
                warnings.append(f"the split {name} has no document: too little text, or a share of 0")
        if not tokenizer.is_lossless:
            warnings.append("the given tokenizer does not give every text back as it was")
        if report.unknown_tokens:
            warnings.append(f"{report.unknown_tokens:,} tokens are unknown to the given tokenizer")
        return notes, warnings


def _present(encoded: EncodedBlock | None) -> EncodedBlock:
    assert encoded is not None
    return encoded


def _fingerprint(splits: dict[str, Any], tokenizer: Tokenizer) -> str:
    """Hex over every shard's checksum and the tokenizer."""
    checksums = [shard["xxh3_128"] for split in splits.values() for shard in split["shards"]]
    return hashlib.sha256("\n".join([*checksums, tokenizer.sha256]).encode()).hexdigest()


# ----------------------------------------------------------------------------- what a worker does


def _read_unit(
    number: int, unit: Unit, folder: Path, text_field: str, txt_document: str, normalization: str
) -> int:
    """Read and clean a unit into blocks; its folder takes its name when it is whole."""
    temporary = folder / f".{number:06d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    writer = BlockWriter(temporary)
    counts = CleanCounts()
    for part in unit:
        try:
            for batch in read_part(part, text_field, txt_document, temporary):
                writer.add(clean(batch, normalization, counts))
                count(len(batch))
        except UnicodeDecodeError as error:
            raise undecodable(part) from error
    blocks = [[block.path.name, block.num_documents, block.num_bytes] for block in writer.close()]
    write_marker(temporary / "unit.json", {"blocks": blocks, "counts": asdict(counts)})
    final = folder / f"{number:06d}"
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    return number


def _finished_unit(folder: Path) -> tuple[list[Block], CleanCounts] | None:
    """The blocks and counts of a unit that an earlier run finished whole."""
    try:
        unit = json.loads((folder / "unit.json").read_text())
        blocks = [Block(folder / name, documents, size) for name, documents, size in unit["blocks"]]
        for block in blocks:
            # Text goes when a block is encoded; a power failure may leave files empty.
            if block.text_path.exists() and block.text_path.stat().st_size != block.num_bytes:
                return None
            if not block.documents_path.stat().st_size or not block.hashes_path.stat().st_size:
                return None
        return blocks, CleanCounts(**unit["counts"])
    except (OSError, ValueError):
        return None


def _find_duplicates(blocks: list[Block], number: int, ranges: int, path: Path) -> int:
    temporary = path.with_suffix(".tmp")
    block_files.save_array(temporary, block_files.duplicates(blocks, number, ranges))
    os.replace(temporary, path)
    return number


def _train_tokenizer(
    blocks: list[Block],
    dropped_paths: list[Path],
    split: SplitConfig,
    config: TokenizerConfig,
    seed: int,
    path: Path,
) -> None:
    documents = list(_training_documents(blocks, dropped_paths, split, config.train_bytes, seed))
    if not documents:
        raise DataError(
            Problem(
                "source",
                "no training document to train a tokenizer on",
                "",
                "add text or lower split.validation and split.test",
            )
        )
    write_atomically(path, train(documents, config))


def _training_documents(
    blocks: list[Block], dropped_paths: list[Path], split: SplitConfig, train_bytes: int, seed: int
) -> Iterator[str]:
    """Training documents of about train_bytes together, chosen by the document and the seed alone."""
    total = 0
    for number, block in enumerate(blocks):
        documents = block.documents()
        sizes = np.diff(documents["end"], prepend=np.uint64(0))
        total += int(sizes[block_files.splits_of_block(documents, number, dropped_paths, split)[0]].sum())
    share = min(1.0, train_bytes / max(total, 1))
    left = train_bytes
    for number, block in enumerate(blocks):
        documents = block.documents()
        chosen = block_files.splits_of_block(documents, number, dropped_paths, split)[0]
        if share < 1.0:
            chosen = chosen[_mixed(documents["key"][chosen], seed) < share * 2.0**64]
        for batch in block.read(documents, chosen):
            for document in batch:
                if len(document) <= left:
                    left -= len(document)
                    yield document.decode()


def _mixed(keys: np.ndarray, seed: int) -> np.ndarray:
    """Keys → other uniform 64-bit numbers, by seed (splitmix64, Steele et al. 2014)."""
    z = keys ^ np.uint64((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _finished_shard(path: Path, done_path: Path) -> dict[str, Any] | None:
    try:
        done = json.loads(done_path.read_text())
        return done if path.stat().st_size == done["entry"]["bytes"] else None
    except (OSError, ValueError):
        return None
