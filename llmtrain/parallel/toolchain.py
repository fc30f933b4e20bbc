"""What this machine needs in order to compile DeepSpeed's kernels at first use; asked without torch."""

from __future__ import annotations

import os
import shutil
import sysconfig
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
