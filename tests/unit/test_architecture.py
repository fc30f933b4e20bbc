"""Imports run downward through the packages, heavy libraries stay in theirs, and files are short."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import llmtrain

PACKAGE = Path(llmtrain.__file__).parent
ORDER = (
    {"urls"},
    {"errors"},
    {"config", "files", "git", "hashing", "labels", "orphans", "standard_streams", "sweeps", "tensor_boxes"},
    {"reading"},
    {"safetensors_files"},
    {"optim", "tokenizers", "track"},
    {"distributed"},
    {"watch"},
    {"chat", "corpus"},
    {"prepare"},
    {"tables", "vectors"},
    {"data"},
    {"nn"},
    {"adapt"},
    {"models", "scoring"},
    {"objectives"},
    {"parallel"},
    {"plan"},
    {"engine"},
    {"checkpoint"},
    {"interchange"},
    {"features", "generation", "output", "preflight", "report"},
    {"harness"},
    {"train"},
    {"dry_run"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
"""From the ground up: a module imports only its own package and those of earlier sets."""

ONLY_IN = {
    "hydra": {"cli"},
    "omegaconf": {"cli"},
    "deepspeed": {"engine", "parallel"},
    "wandb": {"track"},
    "sentencepiece": {"tokenizers", "interchange"},
    "lm_eval": {"harness"},
    "datasets": {"harness"},
    "transformers": set(),
}

LONGEST = 400
"""Lines of a file of llmtrain/ or tests/, unless LONGER names it."""

LONGER = {
    "tests/parity/architectures.py": "one table of all compared architectures, with their configs",
    "tests/parity/matrix.py": "one table of all cells of the parity matrix, with what each is held to",
    "tests/unit/nn/test_attention.py": "one reference that every kernel is compared with",
}
"""File → why it is longer than LONGEST."""


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports() -> Iterator[tuple[Path, str]]:
    """(file, imported module) over the whole package, imports inside functions included."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                module = node.module or ""
                if module == "llmtrain":
                    yield from ((path, f"llmtrain.{alias.name}") for alias in node.names)
                else:
                    yield path, module


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_run_one_way():
    level = {name: i for i, names in enumerate(ORDER) for name in names}
    wrong = []
    for path, module in imports():
        parts = module.split(".")
        if parts[0] != "llmtrain" or len(parts) == 1 or parts[1] == "__version__" or room(path) == "__init__":
            continue
        if parts[1] != room(path) and level[parts[1]] >= level[room(path)]:
            wrong.append(f"{path.relative_to(PACKAGE)} imports {module}")
    assert not wrong


def test_no_circle_of_files():
    """Also within a room, and by imports inside functions; those for types alone do not count."""
    names = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
    }
    below = {name: needed_by(path, names.keys()) - {name} for name, path in names.items()}
    TopologicalSorter(below).prepare()  # raises CycleError, which names the circle


def needed_by(path: Path, known: Collection[str]) -> set[str]:
    """The modules of the package that a file imports when it runs."""
    tree = tree_of(path)
    checks = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    ]
    for_types = {id(inner) for node in checks for inner in ast.walk(node)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and id(node) not in for_types:
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and id(node) not in for_types:
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & set(known)


def test_heavy_libraries_stay_in_their_rooms():
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {module}"
        for path, module in imports()
        if room(path) not in ONLY_IN.get(module.split(".")[0], {room(path)})
    ]
    assert not wrong


def test_every_room_is_packaged():
    text = (PACKAGE.parent / "pyproject.toml").read_text()
    for file in PACKAGE.rglob("__init__.py"):
        name = ".".join(file.parent.relative_to(PACKAGE.parent).parts)
        assert f'"{name}"' in text, f"{name} is missing from pyproject.toml"


def test_files_are_short():
    root = PACKAGE.parent
    paths = [path for folder in (PACKAGE, root / "tests") for path in sorted(folder.rglob("*.py"))]
    lengths = {str(path.relative_to(root)): len(path.read_text().splitlines()) for path in paths}
    too_long = {name: lines for name, lines in lengths.items() if lines > LONGEST and name not in LONGER}
    assert not too_long, f"longer than {LONGEST} lines: divide them by what they are about"
    needless = [name for name in LONGER if lengths.get(name, 0) <= LONGEST]
    assert not needless, "short by now, or gone: take them out of LONGER"
