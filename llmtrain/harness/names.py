"""The names of tasks, read from their .yaml files without the harness, whose import takes seconds."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from llmtrain.errors import Problem, nearest
from llmtrain.files import expand_home

MODULE = "lm_eval"
Files = dict[str, list[Path]]
_NAME = re.compile(
    r"""^["']?(?:task|group|tag)["']?[ \t]*:[ \t]*["']?([^\s"'#\[{|>][^"'#\n]*)""", re.MULTILINE
)
"""A name at the first level of a file."""
_NAMES = re.compile(r"^(?:group|tag)[ \t]*:[ \t]*(?:#.*)?\n((?:[ \t]*-[ \t]*\S.*(?:\n|$))+)", re.MULTILINE)
"""A list of names, one a line."""
_IN_BRACKETS = re.compile(r"^(?:group|tag)[ \t]*:[ \t]*\[([^\]]*)\]", re.MULTILINE)


def task_problems(tasks: Sequence[str], tasks_path: Path | None) -> Iterator[Problem]:
    """Yield a problem if the harness is not installed, the folder has no tasks, or a task is unknown."""
    if not tasks:
        remedy = "give tasks=[…], such as tasks=[hellaswag], or those of a folder, tasks_path=…"
        yield Problem("tasks", "nothing", "names of tasks", remedy)
        return
    twice = sorted({name for name in tasks if tasks.count(name) > 1})
    if twice:
        yield Problem("tasks", f"{', '.join(twice)} twice", "each task once")
    folder = package_folder()
    if folder is None:
        got = "tasks of the lm-evaluation-harness, which is not installed"
        yield Problem("tasks", got, remedy="pip install 'llmtrain[harness]'")
        return
    own: Files = {}
    if tasks_path is not None:
        found = list(_folder_problems(tasks_path))
        yield from found
        if found:
            return
        own = files_of(expand_home(tasks_path))
    foreign = [name for name in tasks if not fitting(name, own)]
    if not foreign:
        return
    known = {**own, **files_of_package()}
    for name in foreign:
        if not fitting(name, known):
            where = f"tasks of {tasks_path} or of the harness" if tasks_path else "tasks of the harness"
            similar = nearest(name, sorted(own)) if own else nearest(name, sorted(known))
            yield Problem("tasks", f"{name!r}, which is no task", f"{where}; similar: {similar}")


def _folder_problems(tasks_path: Path) -> Iterator[Problem]:
    folder = expand_home(tasks_path)
    allowed = "a folder with a .yaml file for each task"
    if not folder.is_dir():
        yield Problem(
            "tasks_path", f"{tasks_path}, {'a file' if folder.exists() else 'no such folder'}", allowed
        )
    elif not any(folder.rglob("*.yaml")):
        yield Problem("tasks_path", f"{tasks_path}, which has no .yaml file", allowed)


def package_folder() -> Path | None:
    """Return the folder of the harness's own tasks; None if it is not installed."""
    spec = find_spec(MODULE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "tasks"


def files_of(folder: Path) -> Files:
    """Return name of a task, group or tag → the files of a folder that give it to themselves."""
    found: Files = {}
    for path in folder.rglob("*.yaml"):
        text = path.read_text(encoding="utf-8", errors="replace")
        names = [name.strip() for name in _NAME.findall(text)]
        for listed in _NAMES.findall(text):
            names += [line.partition("#")[0].strip(" \t-\"'") for line in listed.splitlines()]
        for listed in _IN_BRACKETS.findall(text):
            names += [name.strip(" \t\n\"'") for name in listed.split(",")]
        for name in filter(None, names):
            found.setdefault(name, []).append(path)
    return found


@cache
def files_of_package() -> Files:
    """Return the files of the harness's own tasks, of which there are 14,000; {} if it is not installed."""
    folder = package_folder()
    return {} if folder is None else files_of(folder)


def fitting(name: str, known: Files) -> list[str]:
    """Return the known names that match a name or a pattern."""
    if name in known:
        return [name]
    return sorted(fnmatch.filter(known, name)) if "*" in name else []
