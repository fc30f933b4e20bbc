"""Data files that installed Python packages carry: `package:NAME/path/in/the/package`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from llmtrain.errors import DataError, Problem
from llmtrain.files import expand_home

PREFIX = "package:"


def package_root(source: str) -> tuple[Path, str]:
    """Return the folder of the package in `package:NAME/inside`, and `inside`, without importing the package.

    Raises DataError for an incomplete name, a package that is not installed, a module without a folder.
    """
    name, _, inside = source.removeprefix(PREFIX).partition("/")
    if not name or not inside:
        raise DataError(Problem(source, "an incomplete name", f"{PREFIX}NAME/path/in/the/package"))
    # A dotted name would make find_spec import the parent package.
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None:
        install = f"pip install {name.replace('_', '-')}"
        raise DataError(Problem(source, f"no installed package {name!r}", "", install))
    roots = [Path(location) for location in spec.submodule_search_locations or []]
    if not roots:
        raise DataError(Problem(source, f"{name}, a single module", "a package with files inside"))
    return next((root for root in roots if (root / inside).exists()), roots[0]), inside


def resolve_package_path(path: str) -> Path:
    """Return the path of the file in `package:NAME/inside`; any other path unchanged. The path need not
    exist.

    Raises DataError as `package_root`.
    """
    if not path.startswith(PREFIX):
        return expand_home(path)
    root, inside = package_root(path)
    return root / inside
