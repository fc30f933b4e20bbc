"""Check what this machine needs to compile DeepSpeed's kernels, without importing torch; remove the locks
that killed compilations left."""

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
    """Something that is not there."""

    what: str
    remedy: str


def executables() -> str:
    """PATH with this Python's own programs, where pip puts ninja even if no environment is activated."""
    return os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])


def compiler_flaw() -> Flaw | None:
    """What keeps C++ extensions of Python from being compiled."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler, path=executables()) is None:
        return Flaw(f"there is no compiler {compiler}", "install g++")
    if shutil.which("ninja", path=executables()) is None:
        return Flaw("there is no ninja, which runs the compiler", "pip install ninja")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        return Flaw(f"there is no {header}", "install Python's headers (python3-dev)")
    return None


def cuda_compiler_flaw() -> Flaw | None:
    """What keeps CUDA kernels from being compiled."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    places = [os.path.join(home, "bin") for home in (*homes, USUAL_CUDA_HOME)]
    if shutil.which("nvcc", path=os.pathsep.join([*places, executables()])) is None:
        return Flaw("there is no nvcc", "install the CUDA toolkit or set CUDA_HOME to where it lies")
    return compiler_flaw()


def build_folder(kernel: str) -> Path:
    """Return the folder in which torch compiles `kernel`; make it if it is missing."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(kernel, verbose=False))


def drop_stale_locks(folder: Path) -> None:
    """Remove the locks in `folder`, which holds a folder a kernel, that no process of this host holds.

    torch makes a file while it compiles and removes it in the end; where a killed process could not, all
    later ones would wait for ever.
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
    """Those of all processes that this one may look into: its user's, on this host."""
    found = set()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            found.add(Path(os.readlink(descriptor)))
        except OSError:  # it ended meanwhile, or is another user's
            continue
    return found
