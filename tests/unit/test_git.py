"""What is recorded of a checkout, and that its repository runs nothing meanwhile."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from llmtrain.git import cut, git_state

IDENTITY = ("-c", "user.name=a", "-c", "user.email=a@b")


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *IDENTITY, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of two files, one of them in a folder; the working folder."""
    folder = tmp_path / "checkout"
    (folder / "package").mkdir(parents=True)
    (folder / "code.py").write_text("old\n")
    (folder / "package/more.py").write_text("more\n")
    git(folder, "init", "-q", "-b", "main")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    monkeypatch.chdir(folder)
    return folder


def test_what_git_says_itself(checkout: Path, monkeypatch: pytest.MonkeyPatch):
    head = git(checkout, "rev-parse", "HEAD")
    assert git_state() == ({"commit": head, "branch": "main", "clean": True}, b"")
    (checkout / "code.py").write_text("new\n")
    (checkout / "staged.py").write_text("staged\n")
    (checkout / "code.py").chmod(0o755)
    (checkout / "package/more.py").unlink()
    git(checkout, "add", "staged.py")
    expected = git(checkout, "diff", "HEAD").encode() + b"\n"
    for folder in (checkout, checkout / "package"):
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        assert git_state() == ({"commit": head, "branch": "main", "clean": False}, expected)


def test_settings_that_decide_what_a_change_is(checkout: Path):
    git(checkout, "config", "core.fileMode", "false")
    (checkout / "code.py").chmod(0o755)
    assert git_state()[0]["clean"] is True
    git(checkout, "config", "core.fileMode", "true")
    assert git_state()[0]["clean"] is False


def test_another_worktree_and_a_split_index(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    git(checkout, "worktree", "add", "-q", "-b", "other", str(tmp_path / "tree"))
    git(tmp_path / "tree", "update-index", "--split-index")
    monkeypatch.chdir(tmp_path / "tree")
    assert git_state()[0] == {"commit": git(checkout, "rev-parse", "HEAD"), "branch": "other", "clean": True}
    (tmp_path / "tree/code.py").write_text("new\n")
    assert b"+new" in git_state()[1]


def test_no_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert git_state() == ({"commit": None, "branch": None, "clean": None}, b"")
    git(tmp_path, "init", "-q")
    assert git_state()[0]["commit"] is None


def test_a_repository_runs_nothing(checkout: Path, tmp_path: Path):
    """Every way that we know in which a repository names a program."""
    ran = tmp_path / "ran"
    program = tmp_path / "program"
    program.write_text(f'#!/bin/sh\necho "$0 $@" >> {ran}\ncat\n')
    program.chmod(0o755)
    (checkout / "module").mkdir()
    module = checkout / "module"
    (module / "file").write_text("old\n")
    for folder in (module, checkout):
        if folder == module:
            git(folder, "init", "-q")
            git(folder, "add", ".")
            git(folder, "commit", "-qm", "first")
        else:
            (folder / ".gitattributes").write_text("*.py filter=mine diff=mine\n")
            git(folder, "add", ".")
            git(folder, "commit", "-qm", "second")
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    for name in ("post-index-change", "reference-transaction", "post-checkout", "fsmonitor-watchman"):
        (hooks / name).symlink_to(program)
    for folder in (module, checkout):
        for key, value in {
            "core.fsmonitor": program,
            "core.hooksPath": hooks,
            "core.pager": program,
            "core.sshCommand": program,
            "diff.external": program,
            "diff.mine.command": program,
            "diff.mine.textconv": program,
            "filter.mine.clean": program,
            "filter.mine.process": program,
            "filter.mine.required": "true",
            "alias.diff": f"!{program}",
            "alias.rev-parse": f"!{program}",
            "extensions.partialClone": "origin",
            "remote.origin.promisor": "true",
            "remote.origin.url": f"ext::{program}",
            "remote.origin.uploadpack": program,
            "credential.helper": program,
            "pager.diff": program,
        }.items():
            git(folder, "config", key, str(value))
    (module / "file").write_text("new\n")
    (checkout / "code.py").write_text("new\n")
    ran.unlink(missing_ok=True)
    state, diff = git_state()
    assert not ran.exists(), ran.read_text()
    assert state["clean"] is False
    assert b"-old\n+new\n" in diff

    subprocess.run(["git", "diff", "HEAD"], cwd=checkout, capture_output=True)
    assert ran.exists(), "this test shows nothing where git itself would run nothing"
    ran.unlink()

    # An object of the partial clone is missing: no way to its remote may be tried.
    blob = git(checkout, "rev-parse", "HEAD:package/more.py")
    (checkout / ".git/objects" / blob[:2] / blob[2:]).unlink()
    (checkout / "package/more.py").write_text("changed\n")
    git_state()
    assert not ran.exists(), ran.read_text()


@pytest.mark.parametrize("part", ["HEAD", "config", "packed-refs", "index", "objects/info/alternates"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_a_device_within_a_repository_costs_no_time(checkout: Path, part: str, kind: str):
    path = checkout / ".git" / part
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    began = time.monotonic()
    assert git_state()[0]["commit"] is None
    assert time.monotonic() - began < 30


def test_a_work_tree_elsewhere_is_not_shown(checkout: Path, tmp_path: Path):
    """The repository names a folder of the user's, and holds an empty file of the name of one there."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home/id_rsa").write_text("s3cret\n")
    empty = git(checkout, "hash-object", "-w", "--stdin", "--no-filters", "/dev/null").splitlines()[0]
    git(checkout, "update-index", "--add", "--cacheinfo", f"100644,{empty},id_rsa")
    git(checkout, "commit", "-qm", "second")
    git(checkout, "config", "core.worktree", str(tmp_path / "home"))
    state, diff = git_state()
    assert (state["clean"], diff) == (None, b"")


def test_a_large_diff_is_read_in_part(checkout: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("llmtrain.git.MAX_READ_BYTES", 10_000)
    monkeypatch.setattr("llmtrain.git.MAX_DIFF_BYTES", 5_000)
    (checkout / "code.py").write_text("new\n" * 100_000)
    state, diff = git_state()
    assert (state["clean"], len(diff)) == (False, 10_000)
    assert cut(diff).startswith(b"# cut: the first 5,000 of more than 10,000 bytes\n")
