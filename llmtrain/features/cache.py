"""A cache on disk of the vectors of a split's texts, in chunks of rows.

A folder is named by a hash of all that determines the vectors. A chunk is one file, NUMBER-CHECKSUM.npy,
written under another name and renamed: it is whole or absent, and its name tells whether it has changed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from llmtrain.errors import DataError
from llmtrain.files import disk_problem, write_atomically

ROWS = 1024
"""Rows of a chunk; a killed run loses at most those in work."""
VERSION = 1


def vectors_key(said: Mapping[str, Any]) -> str:
    """Return the name of the folder of vectors. said: everything that determines them, as JSON."""
    text = json.dumps({"version": VERSION, **said}, sort_keys=True)
    return f"vectors-{xxhash.xxh3_128_hexdigest(text.encode())}"


class VectorCache:
    """The chunks of one folder. Only one process of a run uses it."""

    def __init__(self, folder: Path, rows: int, width: int) -> None:
        """rows, width: shape of all vectors together. Raise DataError if the folder cannot be made."""
        self._folder, self._rows, self._width = folder, rows, width
        self._chunks = [range(first, min(rows, first + ROWS)) for first in range(0, rows, ROWS)]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(disk_problem(error, folder, key="data.cache.dir")) from error

    def read(self) -> tuple[np.ndarray, list[range]]:
        """Return the vectors, fp32 (rows, width), and the rows of each chunk that is absent or damaged, which
        are undefined."""
        vectors_ND = np.empty((self._rows, self._width), np.float32)
        absent: list[range] = []
        files = {path.name.split("-")[0]: path for path in self._folder.glob("*.npy")}
        for chunk in self._chunks:
            path = files.get(_prefix(chunk))
            found = None if path is None else self._of(path, chunk)
            if found is None:
                absent.append(chunk)
            else:
                vectors_ND[chunk.start : chunk.stop] = found
        return vectors_ND, absent

    def write(self, chunk: range, vectors_ND: np.ndarray) -> None:
        """Store the vectors of the rows `chunk`. Raise DataError if the disk refuses it."""
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(vectors_ND, np.float32))
        content = buffer.getvalue()
        path = self._folder / f"{_prefix(chunk)}-{xxhash.xxh3_128_hexdigest(content)}.npy"
        try:
            for damaged in self._folder.glob(f"{_prefix(chunk)}-*.npy"):
                damaged.unlink()
            write_atomically(path, content)
        except OSError as error:
            raise DataError(disk_problem(error, self._folder, key="data.cache.dir")) from error

    def _of(self, path: Path, chunk: range) -> np.ndarray | None:
        """Return the vectors of a file, or None if it is not as it was written."""
        try:
            content = path.read_bytes()
            if xxhash.xxh3_128_hexdigest(content) != path.stem.split("-")[-1]:
                return None
            found: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
        except (OSError, ValueError):
            return None
        return found if found.shape == (len(chunk), self._width) else None


def _prefix(chunk: range) -> str:
    return f"{chunk.start // ROWS:06d}"
