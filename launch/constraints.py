"""Print pip constraints for the environment of the Python that runs this: the lock of tested versions.

    python launch/constraints.py            print the constraints, one per line
    python launch/constraints.py --torch    print the version of the installed torch if llmtrain supports it

An environment with another version of torch than the lock (a container, a module of a cluster) keeps it and
all
installed packages: the constraints then cover only packages that are added.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
OF_TORCH = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)==")
"""torch and the packages of its CUDA builds."""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    """Return the versions of installed packages by normalized name."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        if name := distribution.metadata["Name"]:  # missing if pip was interrupted
            found.setdefault(normal(name), distribution.version)
    return found


def constraints(lock: Iterable[str], present: Mapping[str, str]) -> list[str]:
    """Return the lines of `lock` that apply next to the packages that are `present`."""
    lines = [line for line in map(str.strip, lock) if line and not line.startswith("#")]
    torch = present.get("torch")
    if torch is None or f"torch=={torch.partition('+')[0]}" in lines:
        return lines
    added = [line for line in lines if not OF_TORCH.match(line) and line.partition("==")[0] not in present]
    return [f"torch=={torch}", *added]


def is_taken(torch: str) -> bool:
    """Return whether pyproject.toml admits this version."""
    from pip._vendor.packaging.specifiers import SpecifierSet

    found = re.search(r'"torch([^"\w][^"]*)"', (FOLDER.parent / "pyproject.toml").read_text("utf-8"))
    assert found
    return SpecifierSet(found[1]).contains(torch, prereleases=True)


def main(arguments: list[str]) -> int:
    present = installed()
    torch = present.get("torch")
    if arguments == ["--torch"]:
        if torch is not None and is_taken(torch):
            print(torch)
        return 0
    if torch is not None and not is_taken(torch):
        print(f"got torch {torch} in {sys.prefix}, which would be replaced; allowed: the range in", end=" ")
        print("pyproject.toml; install another torch there, or activate another environment")
        return 2
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    lock = FOLDER / "constraints" / f"{version}.txt"
    if not lock.exists():
        print(f"llmtrain: no lock for Python {version}; pip takes the newest versions", file=sys.stderr)
    lines = constraints(lock.read_text("utf-8").splitlines() if lock.exists() else [], present)
    print(*lines, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
