"""Run the phases of `llmtrain prepare`, each over all workers of all processes.

1. read             sources → document blocks with hashes
2. duplicates       hashes, one range at a time → documents to drop
3. near-duplicates  if configured: signatures, bands, pairs, clusters → documents to drop
4. tokenizer        a sample of the training documents → a tokenizer, unless one is given
5. encode           document blocks → token ids
6. tar files        token ids → webdataset tar files and their index

Each phase reuses the pieces of work that an earlier run finished, does this process' share of the others, and
waits for the other processes. The number of a piece determines the process that does it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.corpus.tar_files import INDEX_DTYPE, token_dtype, write_index, write_lengths
from llmtrain.errors import DataError, Problem
from llmtrain.prepare import document_blocks, near_duplicates, tasks
from llmtrain.prepare import encode as encoding
from llmtrain.prepare.clean import CleanCounts
from llmtrain.prepare.config import PrepareConfig
from llmtrain.prepare.document_blocks import DocumentBlock
from llmtrain.prepare.encode import SPLITS, EncodedBlock, SamplePieces
from llmtrain.prepare.peers import Peers
from llmtrain.prepare.report import Phase, Progress
from llmtrain.prepare.source_file import SourceFile
from llmtrain.prepare.sources import plan_units
from llmtrain.prepare.tars import Vocabulary
from llmtrain.prepare.workers import Workers
from llmtrain.tokenizers.base import BUNDLE_FILE, SENTENCEPIECE_FILE, Tokenizer
from llmtrain.tokenizers.folder import load_tokenizer

Task = tuple[Any, ...]


@dataclass
class Prepared:
    """The result of all phases in work/corpus."""

    cleaning: CleanCounts
    documents_kept: int
    duplicates_dropped: int
    near_duplicates_dropped: int
    tokenizer: Tokenizer
    unknown_tokens: int
    tokenless_dropped: int
    specials: dict[str, int]
    splits: dict[str, Any]
    """The section `splits` of the manifest."""


@dataclass
class Phases:
    config: PrepareConfig
    files: list[SourceFile]
    work: Path
    pool: Workers
    peers: Peers
    progress: Progress

    def run(self, given: Tokenizer | None) -> Prepared | None:
        """Run all phases. Return their result on rank 0, once work/corpus is complete, and None elsewhere."""
        blocks, counts = self.read(None if given is None else Vocabulary(given.vocab_size, given.eos_id))
        kept = sum(block.num_documents for block in blocks)
        if not kept:
            names = ", ".join(file.name for file in self.files[:3])
            problem = Problem("source", f"no text in {len(self.files)} files ({names})", "some text")
            if counts.filtered:
                problem = Problem("filters", f"no document that passes all rules: {counts.filtered_text}")
            error = DataError(problem)
            error.everywhere = True
            raise error
        dropped_paths = self.find_duplicates(blocks)
        near_paths = self.find_near_duplicates(blocks, dropped_paths)
        num_exact, num_near = (
            sum(len(np.load(path, mmap_mode="r")) for path in paths) for paths in (dropped_paths, near_paths)
        )
        dropped_paths += near_paths
        tokenizer = self.make_tokenizer(blocks, dropped_paths, given)
        encoded = self.encode(blocks, dropped_paths, tokenizer)
        tokenless = sum(block.num_tokenless for block in encoded)
        specials = sum((Counter(block.specials) for block in encoded), Counter())
        if not any(sum(block.num_documents) for block in encoded):
            what = "pairs" if self.config.is_paired else "documents"
            got = f"{tokenless:,} {what} for which the tokenizer gives no token"
            remedy = "give another tokenizer.model, or other text"
            error = DataError(Problem("source", got, "text that the tokenizer covers", remedy))
            error.everywhere = True
            raise error
        tar_files = self.write_tar_files(encoded, tokenizer)
        if self.peers.rank:
            return None
        return Prepared(
            cleaning=counts,
            documents_kept=kept - num_exact - num_near - tokenless,
            duplicates_dropped=num_exact,
            near_duplicates_dropped=num_near,
            tokenizer=tokenizer,
            unknown_tokens=sum(block.num_unknown for block in encoded),
            tokenless_dropped=tokenless,
            specials=dict(specials),
            splits=self.write_indexes(encoded, tar_files),
        )

    # ---------------------------------------------------------------------------------- single phases

    def read(self, vocabulary: Vocabulary | None) -> tuple[list[DocumentBlock], CleanCounts]:
        folder = self._folder("read")
        units = list(plan_units(self.files, self.config.txt_document))
        sizes = [sum(part.size for part in unit) for unit in units]
        config = self.config
        settings = (
            config.fields,
            config.txt_document,
            config.quoting,
            config.normalization,
            vocabulary,
            config.filters,
        )
        self._run(
            "reading",
            sizes,
            tasks.read_unit,
            lambda number: (number, units[number], folder, *settings),
            lambda number: tasks.finished_unit(folder / f"{number:06d}") is not None,
            lambda: f"{self.pool.counted:,} documents",
        )
        blocks: list[DocumentBlock] = []
        counts = CleanCounts()
        finished = lambda number: tasks.finished_unit(folder / f"{number:06d}")  # noqa: E731
        for unit_blocks, unit_counts in self.peers.await_visible(finished, range(len(units))):
            blocks.extend(unit_blocks)
            counts.add(unit_counts)
        return blocks, counts

    def find_duplicates(self, blocks: list[DocumentBlock]) -> list[Path]:
        folder = self._folder("duplicates")
        ranges = document_blocks.num_ranges(blocks)
        paths = [folder / f"{number:06d}.npy" for number in range(ranges)]
        self._run(
            "duplicates",
            [1] * ranges,
            tasks.find_duplicates,
            lambda number: (blocks, number, ranges, paths[number]),
            lambda number: paths[number].exists(),
        )
        return self._visible(paths)

    def find_near_duplicates(self, blocks: list[DocumentBlock], dropped_paths: list[Path]) -> list[Path]:
        """Return the files that list the documents to drop; none if near-duplicates are kept."""
        config = self.config.near_duplicates
        if config.threshold is None:
            return []
        folder = self._folder("near")
        signed = [near_duplicates.SignedBlock(folder / f"{number:06d}") for number in range(len(blocks))]
        dropped_path = folder / "dropped.npy"
        self._run(
            "signing",
            [block.num_bytes for block in blocks],
            near_duplicates.sign_block,
            lambda number: (blocks[number], number, dropped_paths, config, signed[number].path),
            # The text of a block is deleted after encoding; by then its signatures are no longer needed.
            lambda number: dropped_path.exists() or signed[number].is_finished,
        )
        if not dropped_path.exists():
            self._visible(block.path for block in signed)
        ranges = near_duplicates.num_ranges(sum(block.num_documents for block in blocks))
        pieces = ranges * near_duplicates.bands_of(config.threshold)[0]
        paths = [folder / f"pairs-{number:06d}.npy" for number in range(pieces)]
        self._run(
            "comparing",
            [1] * pieces,
            near_duplicates.find_pairs,
            lambda number: (number, signed, ranges, config, paths[number]),
            lambda number: paths[number].exists(),
        )
        self._run(
            "joining",
            [1],
            near_duplicates.join_pairs,
            lambda _: (self._visible(paths), dropped_path),
            lambda _: dropped_path.exists(),
        )
        return self._visible([dropped_path])

    def make_tokenizer(
        self, blocks: list[DocumentBlock], dropped_paths: list[Path], given: Tokenizer | None
    ) -> Tokenizer:
        made = BUNDLE_FILE if self.config.tokenizer.kind == "words" else SENTENCEPIECE_FILE
        path = self._folder("corpus") / (made if given is None else given.file_name)
        if given is not None:
            if self.peers.rank == 0 and not path.exists():
                given.save(path.parent)
            self.peers.barrier()
        else:
            task = (blocks, dropped_paths, self.config.split, self.config.tokenizer, self.config.seed, path)
            self._run("tokenizer", [1], tasks.train_tokenizer, lambda _: task, lambda _: path.exists())
        return load_tokenizer(self._visible([path])[0])

    def encode(
        self, blocks: list[DocumentBlock], dropped_paths: list[Path], tokenizer: Tokenizer
    ) -> list[EncodedBlock]:
        folder = self._folder("encoded")
        dtype = token_dtype(tokenizer.vocab_size)
        tokenizer_path = self.work / "corpus" / tokenizer.file_name
        finished = lambda number: encoding.finished_block(folder / f"{number:06d}", dtype)  # noqa: E731
        self._run(
            "encoding",
            [block.num_bytes for block in blocks],
            encoding.encode_block,
            lambda number: (
                blocks[number],
                number,
                dropped_paths,
                self.config.split,
                tokenizer_path,
                tokenizer.sha256,
                self.config.tokenizer.typed_specials == "text",
                self.config.is_paired,
                folder / f"{number:06d}",
            ),
            lambda number: finished(number) is not None,
        )
        return list(self.peers.await_visible(finished, range(len(blocks))))

    def write_tar_files(
        self, encoded: list[EncodedBlock], tokenizer: Tokenizer
    ) -> dict[str, list[dict[str, Any]]]:
        """Write the tar files; return the recorded results of each, by split."""
        dtype = token_dtype(tokenizer.vocab_size)
        done_folder = self._folder("shards")
        names: list[tuple[str, int]] = []

        def finished(number: int) -> dict[str, Any] | None:
            name, index = names[number]
            path = self.work / "corpus" / name / f"{name}-{index:06d}.tar"
            return encoding.finished_tar_file(path, done_folder / f"{path.stem}.json")

        def unfinished(phase: Phase) -> Iterator[Task]:
            for name, index, first_sample, planned in self._planned(encoded, dtype):
                number = len(names)
                names.append((name, index))
                if not self.peers.is_mine(number):
                    continue
                done = finished(number)
                if done is None:
                    path = self.work / "corpus" / name / f"{name}-{index:06d}.tar"
                    done_path = done_folder / f"{path.stem}.json"
                    yield path, index, first_sample, planned, dtype, done_path
                else:
                    phase.advance(done["entry"]["num_tokens"])

        num_tokens = sum(sum(block.num_tokens) for block in encoded)
        with self.progress.phase("tar files", num_tokens // self.peers.size) as phase:
            work = unfinished(phase)
            for done in self.pool.map(encoding.write_planned_tar_file, work, self._tick(phase)):
                phase.advance(done["entry"]["num_tokens"])
            self.peers.barrier()
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLITS}
        for done in self.peers.await_visible(finished, range(len(names))):
            results[done["split"]].append(done)
        return results

    def _planned(
        self, encoded: Sequence[EncodedBlock], dtype: np.dtype
    ) -> Iterator[tuple[str, int, int, list[SamplePieces]]]:
        """Yield (split, number of the tar file in the split, its first sample, its samples) of every tar
        file."""
        for split, name in enumerate(SPLITS):
            first_sample = 0
            together = 2 if self.config.is_paired else 1
            samples = encoding.plan_samples(encoded, split, self.config.sample_tokens, together)
            for index, planned in enumerate(encoding.plan_tar_files(samples, dtype, self.config.tar_bytes)):
                yield name, index, first_sample, planned
                first_sample += len(planned)

    def write_indexes(
        self, encoded: list[EncodedBlock], tar_files: dict[str, list[dict[str, Any]]]
    ) -> dict[str, Any]:
        """Write the index files; return the section `splits` of the manifest."""
        splits = {}
        for split, name in enumerate(SPLITS):
            folder = self.work / "corpus" / name
            rows = [tuple(row) for tar_file in tar_files[name] for row in tar_file["rows"]]
            index_checksum = write_index(folder / "index.npy", np.array(rows, dtype=INDEX_DTYPE))
            num_documents = sum(block.num_documents[split] for block in encoded)
            lengths = encoding.split_lengths(encoded, split)
            lengths_checksum = write_lengths(folder / "lengths.npy", num_documents, lengths)
            for leftover in folder.glob(".*.tmp"):
                # Left by a killed worker of an earlier run.
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
                "shards": [tar_file["entry"] for tar_file in tar_files[name]],
            }
        return splits

    # ------------------------------------------------------------------------------------- all phases

    def _run(
        self,
        name: str,
        sizes: Sequence[int],
        function: Callable[..., Any],
        task: Callable[[int], Task],
        is_finished: Callable[[int], bool],
        detail: Callable[[], str] = str,
    ) -> None:
        """Do the unfinished pieces of work of this process, and wait for the other processes.

        sizes: cost of each piece, in any unit, for the progress display.
        function: does a piece and returns its number; task: returns its arguments.
        """
        mine = [number for number in range(len(sizes)) if self.peers.is_mine(number)]
        with self.progress.phase(name, sum(sizes[number] for number in mine), detail) as phase:
            unfinished = []
            for number in mine:
                if is_finished(number):
                    phase.advance(sizes[number])
                else:
                    unfinished.append(number)
            for number in self.pool.map(function, map(task, unfinished), self._tick(phase)):
                phase.advance(sizes[number])
            self.peers.barrier()

    def _tick(self, phase: Phase) -> Callable[[], None]:
        def tick() -> None:
            phase.tick()
            self.peers.check()

        return tick

    def _folder(self, name: str) -> Path:
        path = self.work / name
        path.mkdir(exist_ok=True)
        return path

    def _visible(self, paths: Iterable[Path]) -> list[Path]:
        paths = list(paths)
        find = lambda number: paths[number] if paths[number].exists() else None  # noqa: E731
        return list(self.peers.await_visible(find, range(len(paths))))
