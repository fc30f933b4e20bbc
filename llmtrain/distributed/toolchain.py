"""Check that this machine can compile the kernels of DeepSpeed, and remove locks left by killed compilations.

Does not import torch, except to find the build folder.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import time
from pathlib import Path
from typing import NamedTuple

USUAL_CUDA_HOME = "/usr/local/cuda"


class Flaw(NamedTuple):
    """A missing part of the toolchain."""

    what: str
    remedy: str


def executables() -> str:
    """Return PATH with the scripts folder of this Python, where pip installs ninja, appended."""
    return os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])


def compiler_flaw() -> Flaw | None:
    """Return what prevents the compilation of C++ extensions of Python; None if nothing does."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler, path=executables()) is None:
        return Flaw(f"there is no compiler {compiler}", "install g++")
    if shutil.which("ninja", path=executables()) is None:
        return Flaw("there is no build tool ninja", "pip install ninja")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        return Flaw(f"there is no {header}", "install Python's headers (python3-dev)")
    return None


def cuda_compiler_flaw() -> Flaw | None:
    """Return what prevents the compilation of CUDA kernels; None if nothing does."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    folders = [os.path.join(home, "bin") for home in (*homes, USUAL_CUDA_HOME)]
    if shutil.which("nvcc", path=os.pathsep.join([*folders, executables()])) is None:
        return Flaw("there is no nvcc", "install the CUDA toolkit, or set CUDA_HOME to its folder")
    return compiler_flaw()


def build_folder(kernel: str) -> Path:
    """Return the folder in which torch compiles `kernel`; create it if it is missing."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(kernel, verbose=False))


def drop_stale_locks(folder: Path) -> None:
    """Remove lock files that no process of this host holds.

    folder: contains one folder per kernel.
    torch creates a lock file when it starts to compile and removes it at the end; after a killed process all
    later compilations would wait for it forever.
    """
    found = {lock: _inode(lock) for lock in folder.glob("*/lock")}
    if not found or found.keys() <= _open_files():
        return
    time.sleep(1)  # torch closes the file a moment before it removes it
    held = _open_files()
    for lock, inode in found.items():
        if lock not in held and inode is not None and _inode(lock) == inode:
            print(f"removing {lock}, which a killed process left behind", file=sys.stderr, flush=True)
            lock.unlink(missing_ok=True)


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None


def _open_files() -> set[Path]:
    """Return the open files of all processes of this user on this host."""
    found = set()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            found.add(Path(os.readlink(descriptor)))
        except OSError:  # the process has ended, or belongs to another user
            continue
    return found
