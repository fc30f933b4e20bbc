"""Raw text → tokenizer and sharded corpus: `llmtrain prepare`.

The work is done by stages (preparation/stages.py), each over all cores of all processes of a job, each
in memory that does not grow with the corpus. It stands in OUTPUT/.prepare until the corpus is whole; a
run that was killed goes on from there, with as many processes as it likes. What is written depends on
sources and settings alone, not on workers, processes, time or kills. The disk holds the clean text and
about as much again while prepare works.
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
from llmtrain.prepare import filters, near
from llmtrain.prepare.config import PrepareConfig
from llmtrain.prepare.files import disk_errors
from llmtrain.prepare.folder import commit, locked_output, open_work, remove_work, tidied
from llmtrain.prepare.opening import refuse_long_windows
from llmtrain.prepare.peers import Peers
from llmtrain.prepare.phases import Prepared, Stages
from llmtrain.prepare.report import Progress, Report, SplitReport
from llmtrain.prepare.scan import LeftOut, shown
from llmtrain.prepare.sources import (
    check_fields,
    contents_fingerprint,
    find_files,
    find_line_pairs,
)
from llmtrain.prepare.streams import SourceFile
from llmtrain.prepare.texts import AUTO_DOCUMENT_BYTES
from llmtrain.prepare.workers import Workers
from llmtrain.tokenizers.base import Tokenizer
from llmtrain.tokenizers.folder import load_tokenizer
from llmtrain.urls import without_credentials

STREAM_VERSION = 2
"""Changes with the documents and tokens that sources and settings give."""
PAIRED = ("target_field", "target_source")
"""Settings that corpora of single texts lack."""
NO_EFFECT = ("workers", "overwrite", "output", "source", "target_source", "peer_timeout")
"""Settings on which the corpus does not depend; sources are compared by their contents."""


def prepare(config: PrepareConfig, rank: int = 0, size: int = 1, job: str = "") -> Report | None:
    """Make the corpus that `config` describes, go on with one that was interrupted, or leave a
    finished one as it is; prints progress and the report.

    With a size over 1 this is one of so many processes of the job that `job` names; each returns once the
    corpus is whole, rank 0 with the report.

    Raise DataError for sources, tokenizers and output folders that cannot be used, and for a process of
    the job that failed or is gone.
    """
    started = time.monotonic()
    filters.require(config.filters)
    if config.near_duplicates.threshold is not None:
        near.require_library()
    left_out = LeftOut()
    if config.target_source:
        files = find_line_pairs(config.source, config.target_source)
    else:
        files, left_out = find_files(config.source, exclude=config.output)
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
            run = _Run(config, files, left_out, given, needed, peers, progress)
            if rank:
                run.follow()
                return None
            report = run.lead()
        report.output, report.seconds = str(config.output), time.monotonic() - started
        for line in report.lines():
            progress.say(line)
    return report


class _Run:
    """What this process does in the output folder."""

    def __init__(
        self,
        config: PrepareConfig,
        files: list[SourceFile],
        left_out: LeftOut,
        given: Tokenizer | None,
        bytes_needed: int,
        peers: Peers,
        progress: Progress,
    ) -> None:
        self.config, self.files, self.left_out, self.given = config, files, left_out, given
        self.bytes_needed, self.peers, self.progress = bytes_needed, peers, progress
        self.work = config.output / UNFINISHED_NAME

    def lead(self) -> Report:
        """Rank 0: find out what is to be done, do a share of it, put the corpus in its place."""
        identity = self._identity()
        report = _finished(self.config, identity)
        if report is None:
            stamps = _hash([[f.name, f.size, f.mtime_ns, f.version] for f in _read(self.files)])
            request = {"version": STREAM_VERSION, "identity": identity, "stamps": stamps}
            open_work(self.work, request, self.progress)
        is_made = report is not None or (self.work / MANIFEST_NAME).exists()
        self.peers.wait("" if is_made else self._request())
        if not is_made:
            with tidied(self.work, self.peers):
                manifest = self._manifest(identity)
            write_json_atomically(self.work / MANIFEST_NAME, manifest)
        self.peers.await_end()
        if report is None:
            manifest = json.loads((self.work / MANIFEST_NAME).read_text())
            commit(self.work, self.config.output)
            report = Report.from_recorded(manifest["report"])
            report.stages = self.progress.seconds
        self.peers.leave()
        if self.work.exists():
            # Or killed after the corpus was whole, or other settings were tried and left.
            remove_work(self.work)
        return report

    def _identity(self) -> dict[str, Any]:
        """What two corpora must share to be the same."""
        read = _read(self.files)
        size = sum(file.size for file in read)
        with self.progress.stage("hashing", size) as stage:

            def on_piece(count: int) -> None:
                stage.advance(count)
                self.peers.check()

            contents = contents_fingerprint(read, on_piece)
        return {
            "settings": _settings(self.config, self.given),
            "sources": {"files": len(read), "bytes": size, "hash": contents},
        }

    def follow(self) -> None:
        """Every other rank: do a share of the work, see rank 0 end it."""
        word = self.peers.wait()
        if word:
            if word != self._request():
                remedy = "start all processes with one command, on hosts that see the same sources"
                got = "other settings or sources than rank 0 has"
                raise DataError(Problem(f"rank {self.peers.rank}", got, remedy=remedy))
            self._stages()
        self.peers.leave()
        self.peers.await_end()

    def _request(self) -> str:
        """Hash of settings, tokenizer and the names and sizes of the sources: equal in all processes."""
        named = [[file.name, file.size] for file in _read(self.files)]
        return _hash([STREAM_VERSION, _settings(self.config, self.given), named])

    def _stages(self) -> Prepared | None:
        workers = os.cpu_count() or 1 if self.config.workers is None else self.config.workers
        # With peers this process stays free to tell them that it lives.
        spawn = self.peers.size > 1
        with Workers(workers, self.config.output, self.bytes_needed, spawn) as pool:
            stages = Stages(self.config, self.files, self.work, pool, self.peers, self.progress)
            return stages.run(self.given)

    def _manifest(self, identity: dict[str, Any]) -> dict[str, Any]:
        """Run all stages; the manifest of the corpus that then stands in work/corpus."""
        made = self._stages()
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
                (shard["xxh3_128"] for split in made.splits.values() for shard in split["shards"]),
                made.tokenizer.sha256,
            ),
            "splits": made.splits,
            "report": report.recorded(),
            "config": {
                **_settings(self.config, None),
                "source": [*(shown(without_credentials(source)) for source in self.config.source)],
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
        notes += self.left_out.notes()
        empty = [file.name for file in _read(self.files) if not file.size]
        if empty:
            notes.append(f"{len(empty):,} files of no bytes: {', '.join(empty[:8])}")
        counts = report.cleaning
        if counts.quotes_kept:
            notes.append(
                f"{counts.quotes_kept:,} values stand in quotes, which are kept: quoting=double drops them"
            )
        if counts.like_rows:
            number, places = sum(counts.like_rows.values()), ", ".join([*counts.like_rows][:8])
            warnings.append(
                f"{number:,} quoted values hold lines that look like rows ({places}): an unclosed quote?"
            )
        for name, split in report.splits.items():
            if not split.documents:
                warnings.append(f"the split {name} has no document: too little text, or a share of 0")
        whose = "given" if self.given else "trained"
        if not tokenizer.is_lossless:
            warnings.append(f"the {whose} tokenizer does not give every text back as it was")
        if report.unknown_tokens:
            warnings.append(f"{report.unknown_tokens:,} tokens are unknown to the {whose} tokenizer")
        return notes, warnings


# ---------------------------------------------------------------------------------- what is there


def _read(files: list[SourceFile]) -> list[SourceFile]:
    """Every file that is read: of pairs of files both."""
    return [each for file in files for each in file.files]


def _settings(config: PrepareConfig, model: Tokenizer | None) -> dict[str, Any]:
    """Settings on which the corpus depends; a given tokenizer is one by its contents."""
    settings = {key: value for key, value in encode_config(config).items() if key not in NO_EFFECT}
    if settings["target_field"] is None:
        # As corpora have it that were prepared before there were pairs.
        del settings["target_field"]
    if config.target_source:
        settings["target_source"] = len(config.target_source)
    if config.near_duplicates.threshold is not None:
        # Its signatures change with the library's algorithm.
        settings["near_duplicates"]["rensa"] = near.require_library()
    typed = settings["tokenizer"].pop("typed_specials")
    if model is not None:
        settings["tokenizer"] = {"model": model.sha256, "typed_specials": typed}
    return settings


def _hash(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value).encode())


def _differences(theirs: dict[str, Any], ours: dict[str, Any], prefix: str = "") -> Iterator[str]:
    # A given tokenizer has fewer settings than one to be trained: what both have tells them apart.
    for key in (key for key in theirs | ours if key in PAIRED or (key in theirs and key in ours)):
        a, b = theirs.get(key), ours.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix.removeprefix('settings.')}{key} is {_short(a)} there and {_short(b)} here"


def _short(value: Any) -> str:
    return json.dumps(value) if len(json.dumps(value)) < 40 else json.dumps(value)[:37] + "…"


def _finished(config: PrepareConfig, identity: dict[str, Any]) -> Report | None:
    """The report of the finished corpus in the output folder when it is the one wanted.

    Raise DataError if it is another one and may not be replaced, or when something else stands there.
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
    report = Report.from_recorded(manifest["report"])
    report.reused = True
    return report
