"""Read commit, branch and uncommitted changes of the working folder, without running programs of its
repository.

The configuration of a repository can name programs that git runs: file system monitor, diff and text
converters, filters, hooks, remotes of partial clones. It comes with an unpacked foreign repository, without
the user's consent. Therefore git gets a folder with its own configuration, and only commit, index and objects
of the repository. The user's ~/.gitconfig applies as usual.
"""

from __future__ import annotations

import os
import resource
import subprocess
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

MAX_DIFF_BYTES = 2**20
MAX_READ_BYTES = 2**24
"""Maximum bytes of output that are read from git."""
MEMORY_BYTES = 2**30
"""Memory limit of git."""
_SECONDS, _DIFF_SECONDS = 5, 20
_PARTS = ("HEAD", "config", "packed-refs", "index", "objects/info/alternates", "info/attributes", "commondir")

_READ = ("core.filemode", "core.symlinks", "core.ignorecase", "core.autocrlf", "core.eol", "core.safecrlf")
"""Settings of the repository that determine what counts as a change and do not run programs."""

_UNKNOWN: dict[str, Any] = {"commit": None, "branch": None, "clean": None}


def git_state() -> tuple[dict[str, Any], bytes]:
    """Return commit, branch and cleanness of the git checkout in the working folder, and the uncommitted
    changes."""
    commit = head_commit()
    if commit is None:
        return dict(_UNKNOWN), b""
    diff = _diff(commit)
    branch = _line("rev-parse", "--abbrev-ref", "HEAD") or ""
    return {"commit": commit, "branch": branch, "clean": None if diff is None else diff == b""}, diff or b""


def head_commit() -> str | None:
    """Return the commit that is checked out in the working folder; None outside of a checkout."""
    return _line("rev-parse", "HEAD") if _is_plain() else None


def cut(diff: bytes) -> bytes:
    """Return the diff, truncated to MAX_DIFF_BYTES with a note in the first line."""
    if len(diff) <= MAX_DIFF_BYTES:
        return diff
    more = "more than " if len(diff) >= MAX_READ_BYTES else ""
    note = f"# cut: the first {MAX_DIFF_BYTES:,} of {more}{len(diff):,} bytes\n"
    return note.encode() + diff[:MAX_DIFF_BYTES]


def _diff(commit: str) -> bytes | None:
    """Return the changes since `commit`; None if git cannot determine them."""
    top = _line("rev-parse", "--show-toplevel")
    index = _path("index")
    objects = _path("objects")
    if top is None or index is None or objects is None or not _belongs_to(top):
        return None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "refs").mkdir()
        (folder / "HEAD").write_text(f"{commit}\n")
        (folder / "config").write_text(_config())
        for shared in index.parent.glob("sharedindex.*"):
            (folder / shared.name).symlink_to(shared)
        own = {
            "GIT_DIR": str(folder),
            "GIT_WORK_TREE": top,
            "GIT_INDEX_FILE": str(index),
            "GIT_OBJECT_DIRECTORY": str(objects),
            "GIT_OPTIONAL_LOCKS": "0",  # do not write the user's index
            "GIT_ALLOW_PROTOCOL": "none",  # do not fetch missing objects of a partial clone
        }
        # Submodules are repositories with their own configurations.
        return _git(
            "-C",
            top,
            "diff",
            "--no-ext-diff",
            "--ignore-submodules=all",
            commit,
            "--",
            seconds=_DIFF_SECONDS,
            **own,
        )


def _belongs_to(top: str) -> bool:
    """Return whether the working folder is in `top`, and `top` belongs to this repository. Settings of the
    repository may name any folder as its top, whose contents the diff would show."""
    own = _line("rev-parse", "--absolute-git-dir")
    is_inside = Path.cwd().is_relative_to(Path(top).resolve())
    return is_inside and own is not None and _line("-C", top, "rev-parse", "--absolute-git-dir") == own


def _config() -> str:
    settings = {name: value for name in _READ if (value := _line("config", "--get", name)) is not None}
    lines = ["[core]", "\trepositoryformatversion = 1", "\tbare = false", "\tfsmonitor = false"]
    # Larger files are only reported as different, not compared line by line.
    lines += [f"\thooksPath = {os.devnull}", "\tbigFileThreshold = 8m"]
    lines += [f"\t{name.partition('.')[2]} = {value}" for name, value in settings.items() if value.isalpha()]
    lines += ["[extensions]", f"\tobjectFormat = {_line('rev-parse', '--show-object-format') or 'sha1'}"]
    return "\n".join(lines) + "\n"


def _path(name: str) -> Path | None:
    found = _line("rev-parse", "--git-path", name)
    return None if found is None else Path(found).absolute()


def _line(*arguments: str) -> str | None:
    """Run a git command that starts no other program; return its line of output, None if it fails."""
    output = _git(*arguments)
    return None if output is None else os.fsdecode(output).removesuffix("\n")


def _git(*arguments: str, seconds: float = _SECONDS, **environment: str) -> bytes | None:
    """Return the output of a git command, up to MAX_READ_BYTES; None if it fails or exceeds `seconds` or
    MEMORY_BYTES."""
    try:
        # git is found in the user's PATH; the arguments do not come from outside.
        running = subprocess.Popen(  # noqa: S603
            ["git", "--no-pager", *arguments],  # noqa: S607
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **environment},
        )
    except OSError:
        return None
    with suppress(OSError):
        resource.prlimit(running.pid, resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    assert running.stdout is not None
    timer = threading.Timer(seconds, running.kill)
    timer.start()
    try:
        output = running.stdout.read(MAX_READ_BYTES)
        if is_complete := len(output) < MAX_READ_BYTES:
            running.wait()
        running.kill()
        code = running.wait()
    finally:
        timer.cancel()
        running.stdout.close()
    return output if code == 0 or not is_complete else None


def _is_plain() -> bool:
    """Return whether the files that git reads first are regular files: git would block on a pipe or
    device."""
    folder = next(
        (parent / ".git" for parent in (Path.cwd(), *Path.cwd().parents) if (parent / ".git").exists()), None
    )
    if folder is None or not folder.is_dir():
        return True
    return all(path.is_file() or not path.exists() for path in (folder / part for part in _PARTS))
