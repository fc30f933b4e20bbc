"""Run `llmtrain prepare`: raw text → tokenizer and corpus of tar files.

The work is divided into phases (llmtrain/prepare/phases.py). Each uses all cores of all processes of a job,
in memory that does not grow with the corpus. Intermediate results are in OUTPUT/.prepare until the corpus is
complete; a run after an interruption continues from there, with any number of processes. The corpus depends
on sources and settings only, not on workers, processes, timing or interruptions. Disk space during the run:
about twice the size of the clean text.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from typing import Any

import xxhash

from llmtrain.config import encode as encode_config
from llmtrain.corpus.manifest import FORMAT, MANIFEST_NAME, UNFINISHED_NAME, VERSION, fingerprint_of
from llmtrain.corpus.tar_files import token_dtype
from llmtrain.errors import DataError, Problem
from llmtrain.files import checksum_of_json, write_json_atomically
from llmtrain.prepare import filters, near_duplicates
from llmtrain.prepare.config import PrepareConfig
from llmtrain.prepare.decompress import refuse_long_windows
from llmtrain.prepare.files import disk_errors
from llmtrain.prepare.folder import commit, locked_output, open_work, remove_work, tidied
from llmtrain.prepare.folder_scan import SkippedFiles, printable_path
from llmtrain.prepare.peers import Peers
from llmtrain.prepare.phases import Phases, Prepared
from llmtrain.prepare.report import Progress, Report, SplitReport
from llmtrain.prepare.source_file import SourceFile
from llmtrain.prepare.sources import (
    check_fields,
    contents_fingerprint,
    find_files,
    find_line_pairs,
)
from llmtrain.prepare.texts import AUTO_DOCUMENT_BYTES
from llmtrain.prepare.workers import Workers
from llmtrain.tokenizers.base import Tokenizer
from llmtrain.tokenizers.folder import load_tokenizer
from llmtrain.urls import without_credentials

STREAM_VERSION = 2
"""Increased when equal sources and settings give other documents or tokens than before."""
PAIRED = ("target_field", "target_source")
"""Settings that only corpora of pairs record."""
NO_EFFECT = ("workers", "overwrite", "output", "source", "target_source", "peer_timeout")
"""Settings that do not affect the corpus; sources are compared by their contents."""


def prepare(config: PrepareConfig, rank: int = 0, size: int = 1, job: str = "") -> Report | None:
    """Make the corpus that `config` describes, continue an interrupted run, or keep a finished corpus.

    Print progress and the report. Return the report on rank 0, None on other ranks, once the corpus is
    complete.

    size: number of processes of the job; job: its name, equal in all of them.
    Raise DataError if sources, tokenizer or output folder are invalid, or another process failed or is lost.
    """
    started = time.monotonic()
    filters.require(config.filters)
    if config.near_duplicates.threshold is not None:
        near_duplicates.require_library()
    skipped = SkippedFiles()
    if config.target_source:
        files = find_line_pairs(config.source, config.target_source)
    else:
        files, skipped = find_files(config.source, exclude=config.output)
        if config.target_field is not None:
            check_fields(files)
    given = None if config.tokenizer.model is None else load_tokenizer(config.tokenizer.model)
    read = _read(files)
    windows = refuse_long_windows(read, config.workers or os.cpu_count() or 1)
    needed = 2 * sum(file.size * (4 if file.compression or file.kind == "parquet" else 1) for file in read)
    peers = Peers(config.output / UNFINISHED_NAME, rank, size, job, config.peer_timeout)
    with Progress(quiet=rank > 0) as progress, disk_errors(config.output, needed):
        for note in windows:
            progress.say(f"note: {note}")
        with locked_output(config.output, peers), disk_errors(config.output, needed):
            run = _Run(config, files, skipped, given, needed, peers, progress)
            if rank:
                run.follow()
                return None
            report = run.lead()
        report.output, report.seconds = str(config.output), time.monotonic() - started
        for line in report.lines():
            progress.say(line)
    return report


class _Run:
    """The part of a prepare job that this process does in the output folder."""

    def __init__(
        self,
        config: PrepareConfig,
        files: list[SourceFile],
        skipped: SkippedFiles,
        given: Tokenizer | None,
        bytes_needed: int,
        peers: Peers,
        progress: Progress,
    ) -> None:
        self.config, self.files, self.skipped, self.given = config, files, skipped, given
        self.bytes_needed, self.peers, self.progress = bytes_needed, peers, progress
        self.work = config.output / UNFINISHED_NAME

    def lead(self) -> Report:
        """Run rank 0: determine the work, do a share of it, move the finished corpus into the output
        folder."""
        identity = self._identity()
        report = _finished(self.config, identity)
        if report is None:
            stamps = _hash([[f.name, f.size, f.mtime_ns, f.version] for f in _read(self.files)])
            request = {"version": STREAM_VERSION, "identity": identity, "stamps": stamps}
            open_work(self.work, request, self.progress)
        is_made = report is not None or (self.work / MANIFEST_NAME).exists()
        self.peers.barrier("" if is_made else self._request())
        if not is_made:
            with tidied(self.work, self.peers):
                manifest = self._manifest(identity)
            write_json_atomically(self.work / MANIFEST_NAME, manifest)
        self.peers.await_end()
        if report is None:
            manifest = json.loads((self.work / MANIFEST_NAME).read_text())
            commit(self.work, self.config.output)
            report = Report.from_recorded(manifest["report"])
            report.phase_seconds = self.progress.seconds
        self.peers.leave()
        if self.work.exists():
            # Left by a run that was killed after the corpus was complete, or by one with other settings.
            remove_work(self.work)
        return report

    def _identity(self) -> dict[str, Any]:
        """Return settings and hash of the sources; they are equal for equal corpora."""
        read = _read(self.files)
        size = sum(file.size for file in read)
        with self.progress.phase("hashing", size) as phase:

            def on_piece(count: int) -> None:
                phase.advance(count)
                self.peers.check()

            contents = contents_fingerprint(read, on_piece)
        return {
            "settings": _settings(self.config, self.given),
            "sources": {"files": len(read), "bytes": size, "hash": contents},
        }

    def follow(self) -> None:
        """Run any other rank: do a share of the work, and wait until rank 0 has finished."""
        request = self.peers.barrier()
        if request:
            if request != self._request():
                remedy = "start all processes with one command, on hosts that see the same sources"
                got = "other settings or sources than rank 0 has"
                raise DataError(Problem(f"rank {self.peers.rank}", got, remedy=remedy))
            self._phases()
        self.peers.leave()
        self.peers.await_end()

    def _request(self) -> str:
        """Return a hash of settings, tokenizer, and names and sizes of the sources; equal on all ranks."""
        named = [[file.name, file.size] for file in _read(self.files)]
        return _hash([STREAM_VERSION, _settings(self.config, self.given), named])

    def _phases(self) -> Prepared | None:
        workers = os.cpu_count() or 1 if self.config.workers is None else self.config.workers
        # With several processes, this one must be free to send heartbeats.
        spawn = self.peers.size > 1
        with Workers(workers, self.config.output, self.bytes_needed, spawn) as pool:
            phases = Phases(self.config, self.files, self.work, pool, self.peers, self.progress)
            return phases.run(self.given)

    def _manifest(self, identity: dict[str, Any]) -> dict[str, Any]:
        """Run all phases; return the manifest of the corpus in work/corpus."""
        made = self._phases()
        assert made is not None, "rank 0 has the result"
        report = Report(
            files=len(_read(self.files)),
            source_bytes=sum(file.size for file in _read(self.files)),
            paired=self.config.is_paired,
            cleaning=made.cleaning,
            duplicates_dropped=made.duplicates_dropped,
            near_duplicates_dropped=made.near_duplicates_dropped,
            documents_kept=made.documents_kept,
            vocab_size=made.tokenizer.vocab_size,
            unknown_tokens=made.unknown_tokens,
            tokenless_dropped=made.tokenless_dropped,
            specials=made.specials,
            specials_are_text=self.config.tokenizer.typed_specials == "text",
            splits={
                name: SplitReport(split["num_documents"], split["num_tokens"], split["num_bytes"])
                for name, split in made.splits.items()
            },
        )
        report.notes, report.warnings = self._remarks(report, made.tokenizer)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "vocab_size": made.tokenizer.vocab_size,
            "eos_id": made.tokenizer.eos_id,
            **({"paired": True} if self.config.is_paired else {}),
            "dtype": token_dtype(made.tokenizer.vocab_size).name,
            "tokenizer": {
                "file": made.tokenizer.file_name,
                "sha256": made.tokenizer.sha256,
                "special_ids": dict(made.tokenizer.special_ids),
                "sentinel_ids": list(made.tokenizer.sentinel_ids),
            },
            "fingerprint": fingerprint_of(
                (tar["xxh3_128"] for split in made.splits.values() for tar in split["shards"]),
                made.tokenizer.sha256,
            ),
            "splits": made.splits,
            "report": report.recorded(),
            "config": {
                **_settings(self.config, None),
                "source": [*(printable_path(without_credentials(source)) for source in self.config.source)],
                "identity": identity,
            },
        }
        return {**manifest, "checksum": checksum_of_json(manifest)}

    def _remarks(self, report: Report, tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
        notes, warnings = [], []
        if any(file.kind == "txt" and file.target is None for file in self.files):
            meaning = {
                "auto": f"consecutive paragraphs of about {AUTO_DOCUMENT_BYTES >> 10} KiB, or a smaller file",
                "file": "a file",
                "line": "a line",
                "paragraph": "a paragraph",
            }[self.config.txt_document]
            notes.append(f"a document in .txt is {meaning} (txt_document={self.config.txt_document})")
        notes += self.skipped.notes()
        empty = [file.name for file in _read(self.files) if not file.size]
        if empty:
            notes.append(f"{len(empty):,} files of no bytes: {', '.join(empty[:8])}")
        counts = report.cleaning
        if counts.quotes_kept:
            notes.append(
                f"{counts.quotes_kept:,} values are in quotes, which are kept: quoting=double drops them"
            )
        if counts.like_rows:
            number, locations = sum(counts.like_rows.values()), ", ".join([*counts.like_rows][:8])
            warnings.append(
                f"{number:,} quoted values have lines that look like rows ({locations}): an unclosed quote?"
            )
        for name, split in report.splits.items():
            if not split.documents:
                warnings.append(f"the split {name} has no document: too little text, or a share of 0")
        whose = "given" if self.given else "trained"
        if not tokenizer.is_lossless:
            warnings.append(f"the {whose} tokenizer is not lossless: decoding may change a text")
        if report.unknown_tokens:
            warnings.append(f"{report.unknown_tokens:,} tokens are unknown to the {whose} tokenizer")
        return notes, warnings


# ------------------------------------------------------------------------------- existing corpora


def _read(files: list[SourceFile]) -> list[SourceFile]:
    """Return all files that are read, including the files of targets."""
    return [each for file in files for each in file.files]


def _settings(config: PrepareConfig, model: Tokenizer | None) -> dict[str, Any]:
    """Return the settings that affect the corpus; a given tokenizer counts by its contents."""
    settings = {key: value for key, value in encode_config(config).items() if key not in NO_EFFECT}
    if settings["target_field"] is None:
        # Older corpora do not record the key.
        del settings["target_field"]
    if config.target_source:
        settings["target_source"] = len(config.target_source)
    if config.near_duplicates.threshold is not None:
        # The signatures depend on the version of the library's algorithm.
        settings["near_duplicates"]["rensa"] = near_duplicates.require_library()
    typed = settings["tokenizer"].pop("typed_specials")
    if model is not None:
        settings["tokenizer"] = {"model": model.sha256, "typed_specials": typed}
    return settings


def _hash(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value).encode())


def _differences(theirs: dict[str, Any], ours: dict[str, Any], prefix: str = "") -> Iterator[str]:
    # A given tokenizer records fewer settings than a trained one: compare only keys that both have.
    for key in (key for key in theirs | ours if key in PAIRED or (key in theirs and key in ours)):
        a, b = theirs.get(key), ours.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix.removeprefix('settings.')}{key} is {_short(a)} there and {_short(b)} here"


def _short(value: Any) -> str:
    return json.dumps(value) if len(json.dumps(value)) < 40 else json.dumps(value)[:37] + "…"


def _finished(config: PrepareConfig, identity: dict[str, Any]) -> Report | None:
    """Return the report of the finished corpus in the output folder if it matches `identity`, else None.

    Raise DataError if it does not match and overwrite is false, or the folder holds something else.
    """
    path = config.output / MANIFEST_NAME
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] != FORMAT:
            raise ValueError(manifest["format"])
        theirs = manifest["config"]["identity"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            Problem(str(path), "a file that is not the manifest of a corpus", "", "choose another output")
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
        for tar in split["shards"]:
            file = config.output / tar["file"]
            if not file.is_file() or file.stat().st_size != tar["bytes"]:
                raise DataError(
                    Problem(
                        str(file),
                        "a missing or truncated tar file",
                        f"{tar['bytes']:,} bytes",
                        "give overwrite=true to make the corpus again",
                    )
                )
    report = Report.from_recorded(manifest["report"])
    report.reused = True
    return report
