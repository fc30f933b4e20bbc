"""Data files that installed Python packages carry: `package:NAME/path/in/package`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from llmtrain.errors import DataError, Problem

PREFIX = "package:"


def resolve_package_path(path: str) -> Path:
    """`package:NAME/rest` → the path inside the installed package, found without importing it; any
    other path as it is. The path need not exist.

    Raises DataError when the package is not installed.
    """
    if not path.startswith(PREFIX):
        return Path(path).expanduser()
    name, _, rest = path[len(PREFIX) :].partition("/")
    # A dotted name would make find_spec import the parent package.
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        remedy = "install it: pip install PACKAGE (the demo's data: pip install 'llmtrain[demo]')"
        raise DataError(Problem(path, f"no installed package {name!r}", "package:NAME/path", remedy))
    return Path(next(iter(spec.submodule_search_locations))) / rest
