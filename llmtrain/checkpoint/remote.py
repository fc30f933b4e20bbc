"""The copy of a run elsewhere: its checkpoints, metrics and events, below a URL.

    URL/checkpoints/step-00000100/rank-00000.safetensors …
    URL/checkpoints/step-00000100/manifest.json    put there last, and deleted first
    URL/metrics.jsonl, events.jsonl, config.yaml …

A checkpoint counts once its manifest is there, which is after all files that it lists were read back and have
the right checksums. The manifests of those that count have a copy in the run folder, the mirror, by which one
knows without asking what is there. Nothing here is a collective.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmtrain import files
from llmtrain.checkpoint import retention
from llmtrain.checkpoint.manifest import MANIFEST, MANIFEST_BYTES, MANIFEST_VALUES, read_manifest, step_folder
from llmtrain.corpus.remote_folder import RemoteFolder
from llmtrain.errors import CheckpointError, DataError, Problem
from llmtrain.reading import parse_object, read_bytes

CHECKPOINTS = "checkpoints"
MIRROR = ".remote"
"""Folder in that of the checkpoints: the mirror."""
RECORD = (
    "config.yaml",
    "data.json",
    "environment.json",
    "git.json",
    "git.diff",
    "events.jsonl",
    "metrics.jsonl",
)
"""Files of a run folder that are copied with each checkpoint."""
RUN_ID = "run.json"
"""File there and in the mirror: a random name, by which a run knows its own copy."""
CONTINUED = ("events.jsonl", "metrics.jsonl")
"""Those of them that a run on a new machine goes on with."""
PARALLEL = 4
"""Files that are uploaded at once."""
_PROGRESS_BYTES = 64 << 20


class RemoteRun:
    """The copy of one run. One process writes there; several threads may fetch files."""

    def __init__(self, url: str, run_dir: Path, verify: bool = True) -> None:
        """verify: whether each uploaded file is read back. Raise DataError for a URL that cannot be written
        to."""
        self.folder = RemoteFolder(url)
        self._run_dir = run_dir
        self._mirror = run_dir / CHECKPOINTS / MIRROR
        self._own_id = self._mirror / RUN_ID
        self._verify = verify

    def refresh(self) -> list[str]:
        """Look at what is there and renew the mirror. Return the names of whole checkpoints, oldest first.

        Raise DataError for missing access.
        """
        found: dict[str, dict[str, int]] = {}
        for name, size in self.folder.sizes(CHECKPOINTS).items():
            step, _, file = name.removeprefix(f"{CHECKPOINTS}/").partition("/")
            if retention.is_name(step):
                found.setdefault(step, {})[file] = size
        for step, sizes in found.items():
            with suppress(CheckpointError):
                if MANIFEST in sizes:
                    self._note_there(
                        step, self.folder.read(f"{CHECKPOINTS}/{step}/{MANIFEST}", MANIFEST_BYTES)
                    )
                    listed = {entry["file"]: entry["bytes"] for entry in self._manifest(step)["files"]}
                    if listed.items() <= sizes.items():
                        continue
            self._forget(step)
        for path in retention.list_steps(self._mirror):
            if path.name not in found:
                self._forget(path.name)
        return [path.name for path in retention.list_steps(self._mirror)]

    def belongs(self) -> bool:
        """Return whether what is there is the copy of this run, or may become it: nothing is there, or the
        run folder has no checkpoint and goes on with what is there. Both get the same name of the run."""
        own = _run_id(self._own_id.read_bytes()) if self._own_id.exists() else None
        there = _run_id(self.folder.read(RUN_ID, 1000)) if RUN_ID in self.folder.sizes() else None
        if there is not None and own != there and (own or retention.list_steps(self._own_id.parents[1])):
            return False
        name = there or own or secrets.token_hex(8)
        content = json.dumps({"run": name}).encode()
        if own != name:
            self._mirror.mkdir(parents=True, exist_ok=True)
            files.write_atomically(self._own_id, content)
        if there != name:
            self.folder.write(RUN_ID, content)
        return True

    def upload(self, path: Path) -> bool:
        """Copy a checkpoint of the run folder, and the record of the run; return whether it was not there.
        What an upload that was cut has copied is not copied again.

        Raise DataError for a store that refuses, fails or gives back other bytes; InterruptedError after
        `folder.stop`; FileNotFoundError and CheckpointError if the checkpoint is not whole.
        """
        step, content = path.name, read_bytes(path / MANIFEST, MANIFEST_BYTES)
        mirrored = self._mirror / step / MANIFEST
        if mirrored.exists() and mirrored.read_bytes() == content:
            return False
        listed = read_manifest(path)["files"]
        remote = f"{CHECKPOINTS}/{step}"
        there = self.folder.sizes(remote)
        is_same = mirrored.exists() and self._manifest(step)["files"] == listed
        if not is_same and f"{remote}/{MANIFEST}" in there:
            # Another checkpoint of this step: from here on it is not whole.
            self.folder.delete([f"{remote}/{MANIFEST}"])
            self._forget(step)
        if not is_same:
            done = self._read_progress(step)
            left = [
                entry
                for entry in listed
                if there.get(f"{remote}/{entry['file']}") != entry["bytes"]
                or done.get(entry["file"]) != entry["xxh3_128"]
            ]
            changes = threading.Lock()

            def put(entry: dict[str, Any]) -> None:
                self._put(path, remote, entry)
                # Here, not in the order of the files: one that fails must not hide what others have done.
                with changes:
                    done[entry["file"]] = entry["xxh3_128"]
                    self._write_progress(step, done)

            with ThreadPoolExecutor(PARALLEL, thread_name_prefix="upload") as pool:
                for _ in pool.map(put, left):
                    continue
        self._put_record()
        self.folder.write(f"{remote}/{MANIFEST}", content)
        if self.folder.read(f"{remote}/{MANIFEST}", MANIFEST_BYTES) != content:
            self.folder.delete([f"{remote}/{MANIFEST}"])
            raise DataError(
                Problem(f"{self.folder.url}/{remote}/{MANIFEST}", "another content than was written")
            )
        self._note_there(step, content)
        self._progress(step).unlink(missing_ok=True)
        return True

    def prune(self, current: Path, rules: retention.Rules) -> None:
        """Delete the checkpoints that no rule keeps, but never that of the name of `current`."""
        for path in retention.unkept(self._mirror, self._mirror / current.name, rules):
            self.delete(path.name)

    def delete_after(self, step: int) -> None:
        """Delete what is there of checkpoints later than `step`."""
        sizes = self.folder.sizes(CHECKPOINTS)
        for name in sorted({name.split("/")[1] for name in sizes if name.count("/") > 1}):
            if retention.is_name(name) and name > step_folder(step):
                self.delete(name)

    def delete(self, step: str) -> None:
        """Delete a checkpoint, its manifest first."""
        remote = f"{CHECKPOINTS}/{step}"
        names = sorted(self.folder.sizes(remote), key=lambda name: not name.endswith(f"/{MANIFEST}"))
        self.folder.delete(names)
        self._forget(step)

    def listed(self, step: str) -> list[dict[str, Any]]:
        """Return the files of a whole checkpoint that is there, as its manifest lists them."""
        found: list[dict[str, Any]] = self._manifest(step)["files"]
        return found

    def set_aside(self, steps: Iterable[str]) -> list[str]:
        """Return those of the whole checkpoints there that the run folder has set aside since, when the run
        went back to an earlier one."""
        return [step for step in steps if self._is_set_aside(step)]

    def _is_set_aside(self, step: str) -> bool:
        for path in (self._run_dir / CHECKPOINTS / retention.SUPERSEDED).glob(f"{step}-*"):
            with suppress(CheckpointError, OSError, ValueError):
                # Not by read_manifest, which takes a folder of another name for an altered one.
                content = read_bytes(path / MANIFEST, MANIFEST_BYTES)
                own, there = parse_object(content, most=MANIFEST_VALUES), self._manifest(step)
                # A later evaluation changes a manifest, but neither of these; a run that comes to the same
                # weights once more saves them at another time.
                if all(own.get(key) == there.get(key) for key in ("saved_at", "files")):
                    return True
        return False

    def fetch_file(self, step: str, entry: Mapping[str, Any], folder: Path) -> str | None:
        """Copy one file of a checkpoint there into `folder`. Return what is wrong with it, or None.

        Raise DataError for a store that refuses or fails, and OSError if `folder` cannot be written: neither
        says anything of the checkpoint.
        """
        name = f"{CHECKPOINTS}/{step}/{entry['file']}"
        try:
            found = self.folder.get(name, folder / entry["file"])
        except DataError:
            if name in self.folder.sizes(f"{CHECKPOINTS}/{step}"):
                raise
            return f"{entry['file']}: nothing there"
        return None if found == entry["xxh3_128"] else f"{entry['file']}: another checksum"

    def settle(self, step: str, folder: Path) -> Path:
        """Make a checkpoint of `folder`, which holds all its fetched files, and return its path."""
        files.write_atomically(folder / MANIFEST, (self._mirror / step / MANIFEST).read_bytes())
        final = self._run_dir / CHECKPOINTS / step
        shutil.rmtree(final, ignore_errors=True)  # a damaged one
        os.replace(folder, final)
        files.sync_folder(final.parent)
        return final

    def fetch_record(self) -> None:
        """Replace the metrics and events of the run folder by those that are there."""
        there = self.folder.sizes()
        for name in CONTINUED:
            if name in there:
                fetched = self._run_dir / f".{name}.fetched"
                self.folder.get(name, fetched)
                os.replace(fetched, self._run_dir / name)

    def _put(self, path: Path, remote: str, entry: dict[str, Any]) -> None:
        name = f"{remote}/{entry['file']}"
        self.folder.put(name, path / entry["file"])
        if self._verify:
            is_good = self.folder.checksum(name) == entry["xxh3_128"]
        else:
            is_good = self.folder.sizes(remote).get(name) == entry["bytes"]
        if not is_good:
            self.folder.delete([name])
            got = f"other bytes than those of {path / entry['file']}"
            raise DataError(Problem(f"{self.folder.url}/{name}", got, "", "verify the local checkpoint"))

    def _put_record(self) -> None:
        for name in RECORD:
            with suppress(FileNotFoundError):
                self.folder.put(name, self._run_dir / name)

    def _manifest(self, step: str) -> dict[str, Any]:
        return read_manifest(self._mirror / step)

    def _note_there(self, step: str, content: bytes) -> None:
        (self._mirror / step).mkdir(parents=True, exist_ok=True)
        files.write_atomically(self._mirror / step / MANIFEST, content)

    def _forget(self, step: str) -> None:
        shutil.rmtree(self._mirror / step, ignore_errors=True)

    def _progress(self, step: str) -> Path:
        return self._mirror / f"{step}.json"

    def _read_progress(self, step: str) -> dict[str, Any]:
        """Return file → checksum, of the files that were uploaded and found good."""
        with suppress(OSError, ValueError):
            return parse_object(read_bytes(self._progress(step), _PROGRESS_BYTES))
        return {}

    def _write_progress(self, step: str, done: Mapping[str, Any]) -> None:
        self._mirror.mkdir(parents=True, exist_ok=True)
        files.write_atomically(self._progress(step), json.dumps(done))


def _run_id(content: bytes) -> str | None:
    """Return the random name of a run; None if it cannot be read."""
    with suppress(ValueError):
        found = parse_object(content).get("run")
        return found if isinstance(found, str) else None
    return None
