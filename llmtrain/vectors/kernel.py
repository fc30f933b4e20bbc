"""The compiled kernel of word vectors: compiled by the machine's C compiler at first use, and cached.

A C file of one page needs nothing but a compiler, is built in a second for each width of vectors, and its
calls hold no lock of Python, so that threads run at once."""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from llmtrain.errors import ConfigError, Problem

SOURCE = Path(__file__).with_name("kernel.c")
FLAGS = ("-O3", "-march=native", "-ffast-math", "-funroll-loops", "-fPIC", "-shared", "-std=gnu11")
LANES = 16
"""Rows have a multiple of so many float32: one register of AVX-512."""
COMPILERS = ("cc", "gcc", "clang")
BUILD_SECONDS = 300
_P, _I64, _I32, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


def _fields(*groups: tuple[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Return (name, type) of each field, from names that stand together with their type."""
    return tuple((name, kind) for names, kind in groups for name in names.split())


class Slice(ctypes.Structure):
    """The struct of the same name in kernel.c."""

    _fields_ = _fields(
        ("tokens", _P),
        ("begin end", _I64),
        ("seed", ctypes.c_uint64),
        ("rate last_rate", _F),
        ("window negatives is_cbow is_dynamic is_shared", _I32),
        ("keep", _P),
        ("num_words", _I64),
        ("alias_limit alias path_start path_node path_label gram_start gram", _P),
        ("in_rows out_rows gram_rows", _P),
        ("loss", ctypes.c_double),
        ("losses trained", _I64),
    )


class Pairs(ctypes.Structure):
    """The struct of the same name in kernel.c."""

    _fields_ = _fields(
        ("word other count", _P),
        ("begin end", _I64),
        ("rate x_max power", _F),
        ("in_rows out_rows in_bias out_bias", _P),
        ("in_square out_square in_bias_square out_bias_square", _P),
        ("loss", ctypes.c_double),
    )


def width_of(dimensions: int) -> int:
    """Return the float32 numbers that a row of so many dimensions takes."""
    return -(-dimensions // LANES) * LANES


def rows(count: int, dimensions: int) -> np.ndarray:
    """Return zeros, (count, width) float32, each row beginning at a multiple of 64 bytes."""
    width = width_of(dimensions)
    raw = np.zeros(count * width + LANES, np.float32)
    skipped = (-raw.ctypes.data % 64) // raw.itemsize
    return raw[skipped : skipped + count * width].reshape(count, width)


def address(array: np.ndarray | None, dtype: Any = None) -> int | None:
    """Return the address of a contiguous array of this dtype; None for None."""
    if array is None:
        return None
    assert array.flags.c_contiguous
    assert dtype is None or array.dtype == dtype
    return int(array.ctypes.data)


@cache
def library(width: int) -> ctypes.CDLL:
    """Return the kernel for rows of `width`; build it where it is not yet in the user's cache.

    Raise ConfigError if there is no C compiler, or it fails."""
    compiler = find_compiler()
    content = SOURCE.read_bytes()
    said = subprocess.run([*compiler, "--version"], capture_output=True, timeout=BUILD_SECONDS)  # noqa: S603
    built_for = repr((FLAGS, width, said.stdout, platform.machine(), _processor())).encode()
    name = f"vectors-{width}-{xxhash.xxh3_128_hexdigest(content + built_for)}.so"
    folder = _cache_folder()
    path = folder / name
    if not path.exists():
        _build(compiler, width, path)
    found = ctypes.CDLL(str(path))
    found.train_slice.argtypes = [ctypes.POINTER(Slice)]
    found.train_pairs.argtypes = [ctypes.POINTER(Pairs)]
    found.learn_word.argtypes = [ctypes.POINTER(Slice), _P, _I32, _P, _P, _I32, _F, _P]
    for function in (found.train_slice, found.train_pairs, found.learn_word):
        function.restype = None
    return found


def find_compiler() -> list[str]:
    """Return the command of the C compiler: that of $CC, else the first of COMPILERS. Raise ConfigError if
    there is none."""
    named = shlex.split(os.environ.get("CC", ""))
    for command in [named] if named else [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    got = f"CC={named[0]}, which is not found" if named else f"none of {', '.join(COMPILERS)} on PATH"
    remedy = "install one (apt-get install gcc), or name it by CC=…"
    raise ConfigError(Problem("C compiler", got, "one that builds the kernel of word vectors", remedy))


def _processor() -> str:
    """Return what distinguishes processors: the flags of the first one, if Linux reports them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(base) / "llmtrain" / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="llmtrain-kernels-"))


def _build(compiler: Sequence[str], width: int, path: Path) -> None:
    """Compile the kernel to `path`, atomically."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [*compiler, *FLAGS, f"-DWIDTH={width}", "-o", str(made), str(SOURCE), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS)  # noqa: S603
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[0]
            got = f"{compiler[0]} fails on the kernel of word vectors: {last}"
            raise ConfigError(Problem("C compiler", got, "gcc or clang for C11", "name another by CC=…"))
        os.replace(made, path)


def run_all(function: Callable[[Any], None], pieces: Sequence[Any]) -> None:
    """Call a function of the kernel on each piece, at once on as many threads."""
    if len(pieces) == 1:
        function(ctypes.byref(pieces[0]))
        return
    with ThreadPoolExecutor(len(pieces)) as threads:
        list(threads.map(lambda piece: function(ctypes.byref(piece)), pieces))
