"""Load tasks of the lm-evaluation-harness with their data."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llmtrain.errors import DataError, Problem
from llmtrain.files import expand_home
from llmtrain.harness.names import files_of, files_of_package, fitting, package_folder
from llmtrain.harness.undisturbed import undisturbed

CONNECT_SECONDS = 3.0
HUB_OFFLINE = "HF_HUB_OFFLINE"
OFFLINE = (HUB_OFFLINE, "HF_DATASETS_OFFLINE")
"""Variables that make the libraries of Hugging Face work offline."""
_OF_FILES = ("json", "csv", "parquet", "text", "arrow", "webdataset", "imagefolder")
"""Names of data sets that are read from files which a task names."""


def load_tasks(names: Sequence[str], tasks_path: Path | None, num_fewshot: int | None) -> dict[str, Any]:
    """Return the tasks as the harness's `evaluate` takes them.

    Raise DataError for a task that does not load, because its data cannot be had or its file is wrong.
    """
    if not _reaches_network():
        _do_without_network()
    with undisturbed():
        return _load_all(names, tasks_path, num_fewshot)


def _load_all(names: Sequence[str], tasks_path: Path | None, num_fewshot: int | None) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    _say_less()
    own = [] if tasks_path is None else [expand_home(tasks_path)]
    files = {name: paths for folder in own for name, paths in files_of(folder).items()}
    chosen: dict[str, list[Path]] = {}
    for name in names:
        # What a folder has goes before what the harness has, also of a pattern.
        known = files if fitting(name, files) else files_of_package()
        chosen |= {each: known[each] for each in fitting(name, known)}
    # The harness takes long to read all of its own files: those of the tasks suffice, unless a group has
    # members elsewhere.
    manager = TaskManager(include_path=[*_folders(chosen), *own], include_defaults=False)
    index = manager.task_index
    if chosen.keys() <= index.keys() and not all(_is_whole(name, index) for name in chosen):
        manager = TaskManager(include_path=own)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in chosen:
        found = _load(name, manager)
        for section, entries in loaded.items():
            entries.update(found.get(section, {}))
    for task in loaded["tasks"].values():
        _refuse_unusable(task)
        if num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


def _folders(files: Mapping[str, Sequence[Path]]) -> list[Path]:
    """Return the folders, at the first level of the harness's own tasks, that have any of these files."""
    package = package_folder()
    assert package is not None
    paths = [path for of_name in files.values() for path in of_name if path.is_relative_to(package)]
    return sorted({package / path.relative_to(package).parts[0] for path in paths})


def _is_whole(name: str, index: Any) -> bool:
    """Return whether all tasks of a group are in the index; a task is whole."""
    entry = index.get(name)
    if entry is None or entry.kind.name != "GROUP":
        return entry is not None
    members = (entry.cfg or {}).get("task")
    names = [each if isinstance(each, str) else each.get("task", each.get("group")) for each in members or ()]
    return all(isinstance(each, str) and each != name and _is_whole(each, index) for each in names)


def _load(name: str, manager: Any) -> Any:
    if name not in manager.task_index:
        remedy = "look at the file that names it: it has an error, or lacks what a task needs"
        raise DataError(Problem("tasks", f"{name}, which the harness does not find", remedy=remedy))
    try:
        return manager.load([name])
    except Exception as error:  # whatever a file of a task, its functions or a library of data may raise
        raise DataError(_problem(name, manager, error)) from error


def _problem(name: str, manager: Any, error: Exception) -> Problem:
    data = (manager.task_index[name].cfg or {}).get("dataset_path")
    is_fetched = data is not None and data not in _OF_FILES and isinstance(error, OSError)
    if is_fetched or isinstance(error, ConnectionError):
        which = f"set {data} is" if is_fetched else "are"
        got = f"{name}, whose data {which} not on this machine and cannot be fetched ({said(error)})"
        remedy = (
            "fetch it where there is a network, with the same HF_HOME, or give tasks of files: tasks_path=…"
        )
        return Problem("tasks", got, "tasks whose data can be had", remedy)
    remedy = "correct its file"
    if isinstance(error, FileNotFoundError):
        remedy = "data_files of a task are relative to the folder that the command is given in"
    return Problem("tasks", f"{name}, which does not load ({said(error)})", "", remedy)


def _refuse_unusable(task: Any) -> None:
    """Raise DataError for a task that runs what a model writes, or that has pictures or sounds."""
    if getattr(task, "UNSAFE_CODE", False):
        got = f"{task.task_name}, which runs the code that a model writes"
        raise DataError(Problem("tasks", got, "tasks that run no code", "leave it out"))
    if getattr(task, "MULTIMODAL", False):
        raise DataError(Problem("tasks", f"{task.task_name}, a task of pictures or sounds", "tasks of texts"))


def said(error: BaseException) -> str:
    """Return the message of an error of a library, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _reaches_network() -> bool:
    """Return whether the hub of data sets answers; True through a proxy, which is not asked, False where a
    variable says so."""
    if any(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in OFFLINE):
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _do_without_network() -> None:
    """Let the libraries of Hugging Face say at once that something cannot be fetched, instead of trying."""
    os.environ.update(dict.fromkeys(OFFLINE, "1"))
    # Where they are imported, they have read the variables.
    for module in ("huggingface_hub.constants", "datasets.config"):
        if module in sys.modules:
            setattr(sys.modules[module], HUB_OFFLINE, True)


def _say_less() -> None:
    """Silence the progress bars and notes of the libraries; errors are still raised."""
    import datasets

    datasets.disable_progress_bars()
    for name in ("lm_eval", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
