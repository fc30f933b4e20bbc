"""The parts of a reference that is being computed, in a folder of the run folder.

A part is one file, SPLIT-FIRST-CHECKSUM.safetensors, with the predictions of consecutive rows from FIRST on,
written under another name and renamed: it is whole or absent, and its name tells whether it has changed.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from llmtrain.errors import CheckpointError
from llmtrain.files import disk_problem, write_atomically

FOLDER = "reference-parts"
SECONDS = 15.0
"""Least time between two parts; a killed start loses about as much work."""
_ROWS = "rows"
_KEY = "key"


class ReferenceParts:
    """The parts of one run; its main process alone uses them."""

    def __init__(self, run: Path, key: str) -> None:
        """key: a hash of what the predictions come from; parts of others are not read."""
        self._folder, self._key = run / FOLDER, key
        self._waiting: list[np.ndarray] = []
        self._written_at = time.monotonic()

    def read(self, split: str, fingerprint: str) -> np.ndarray | None:
        """Return the predictions of the first rows of a split, as many as lie there without a gap, fp32;
        None: there are none. fingerprint: of the rows."""
        found: list[np.ndarray] = []
        wanted = 0
        for path in sorted(self._folder.glob(f"{split}-*.safetensors")):
            if path.stem.split("-")[1] != f"{wanted:010d}":
                continue
            part = self._part(path, f"{self._key}/{fingerprint}")
            if part is not None:
                found.append(part)
                wanted += len(part)
        return np.concatenate(found) if found else None

    def add(self, split: str, fingerprint: str, first: int, values: np.ndarray, is_last: bool) -> bool:
        """Keep the predictions of the rows from `first` on, which follow those of the call before, and write
        what has come together once SECONDS are over or the split ends. Return whether it did.

        Raise CheckpointError if the disk refuses it."""
        self._waiting.append(values)
        if not is_last and time.monotonic() - self._written_at < SECONDS:
            return False
        part = np.concatenate(self._waiting)
        start = first + len(values) - len(part)
        content = save({_ROWS: part}, metadata={_KEY: f"{self._key}/{fingerprint}"})
        name = f"{split}-{start:010d}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for other in self._folder.glob(f"{name}-*.safetensors"):
                other.unlink()
            path = self._folder / f"{name}-{xxhash.xxh3_128_hexdigest(content)}.safetensors"
            write_atomically(path, content)
        except OSError as error:
            raise CheckpointError(disk_problem(error, self._folder, key="run.dir")) from error
        self._waiting, self._written_at = [], time.monotonic()
        return True

    def remove(self) -> None:
        """Delete all parts, once the whole is written."""
        shutil.rmtree(self._folder, ignore_errors=True)

    @staticmethod
    def _part(path: Path, key: str) -> np.ndarray | None:
        """Return the predictions of a file, or None if it is damaged or of other rows or weights."""
        try:
            if xxhash.xxh3_128_hexdigest(path.read_bytes()) != path.stem.split("-")[-1]:
                return None
            with safe_open(path, framework="numpy") as file:
                if (file.metadata() or {}).get(_KEY) != key:
                    return None
                found: np.ndarray = file.get_tensor(_ROWS)
                return found
        except (OSError, SafetensorError, ValueError):
            return None
