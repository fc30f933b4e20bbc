"""launch/constraints/: the locks agree with pyproject.toml, and leave an environment's own torch alone."""

from __future__ import annotations

import importlib.util
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[2]
LOCKS = sorted((REPOSITORY / "launch/constraints").glob("*.txt"))
NVIDIA = "2.13.0a0+abc.nv26.01"


def load_constraints():  # type: ignore[no-untyped-def]
    spec = importlib.util.spec_from_file_location("constraints", REPOSITORY / "launch/constraints.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


constraints = load_constraints()


def locked(path: Path) -> dict[str, str]:
    """Version by name; fails on a line that pins nothing or a name that comes twice."""
    versions: dict[str, str] = {}
    for line in path.read_text("utf-8").splitlines():
        if not line.startswith("#"):
            name, version = re.fullmatch(r"([a-z0-9-]+)==([\w.!+]+)", line).groups()  # type: ignore[union-attr]
            assert name not in versions
            versions[name] = version
    return versions


def ours() -> list[Requirement]:
    """What pyproject.toml asks for, all extras; by hand, as Python 3.10 reads no TOML."""
    text = (REPOSITORY / "pyproject.toml").read_text("utf-8")
    lists = re.search(r"^dependencies = \[$.*?(?=^\[project\.scripts\])", text, re.M | re.S)
    assert lists
    without_comments = re.sub(r"\s#.*", "", lists[0])
    requirements = [Requirement(found) for found in re.findall(r'"([^"]+)"', without_comments)]
    return [requirement for requirement in requirements if requirement.name != "llmtrain"]


def applies(requirement: Requirement, python: str, extras: tuple[str, ...] = ("",)) -> bool:
    environments = (
        {"python_version": python, "python_full_version": f"{python}.9", "extra": e} for e in extras
    )
    return requirement.marker is None or any(map(requirement.marker.evaluate, environments))


def test_each_supported_python_has_a_lock():
    text = (REPOSITORY / "launch/lock.sh").read_text("utf-8")
    pythons = re.search(r"pythons=\((.*)\)", text)
    assert pythons
    assert [path.stem for path in LOCKS] == pythons[1].split()
    assert "3.10" in pythons[1], "the oldest of pyproject.toml's requires-python"


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_a_lock_holds_what_pyproject_asks_for(lock: Path):
    versions = locked(lock)
    requirements = ours()
    assert {"torch", "moto", "mlxtend", "rensa", "sacrebleu", "gguf"} <= {r.name for r in requirements}
    for requirement in requirements:
        if applies(requirement, lock.stem):
            version = versions[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement}: {version} is locked"


def test_the_lock_of_this_python_holds_all_that_they_need_in_turn():
    """By what the installed packages say they need, which also must admit the locked versions."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    versions = locked(REPOSITORY / f"launch/constraints/{python}.txt")
    waiting = [(r.name, tuple(sorted(r.extras)) or ("",)) for r in ours()]
    seen = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        assert canonicalize_name(name) in versions, name
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # CUDA's, beside a torch without it
        for text in distribution.requires or []:
            requirement = Requirement(text)
            if not applies(requirement, python, (*extras, "")):
                continue
            waiting.append((requirement.name, tuple(sorted(requirement.extras)) or ("",)))
            version = versions.get(canonicalize_name(requirement.name), "")
            needs = f"{name} needs {requirement}"
            if distribution.version.partition("+")[0] == versions[canonicalize_name(name)]:
                assert version, needs
                assert requirement.specifier.contains(version, prereleases=True), (
                    f"{name} needs {requirement}"
                )
    assert len({name for name, _ in seen}) > 80


@pytest.mark.parametrize(
    ("torch", "taken"),
    [
        (NVIDIA, True),
        ("2.11.0a0+abc.nv25.12", True),
        ("2.11.0+cu128", True),
        ("2.12.1", True),
        ("2.14.1", True),
        ("2.10.0", False),
        ("2.15.0", False),
    ],
)
def test_which_torch_is_taken(torch: str, taken: bool):
    assert constraints.is_taken(torch) is taken


LOCK = ["# Made", "numpy==2.4.6", "torch==2.13.0", "nvidia-nccl-cu13==2.30", "triton==3.7.1", "wandb==0.31.0"]


def test_a_new_environment_and_one_with_the_locked_torch_get_the_whole_lock():
    assert constraints.constraints(LOCK, {}) == LOCK[1:]
    assert constraints.constraints(LOCK, {"torch": "2.13.0+cpu", "numpy": "1.26.4"}) == LOCK[1:]


@pytest.mark.parametrize("torch", [NVIDIA, "2.11.0+cu128"])
def test_an_environment_keeps_a_torch_of_its_own_and_what_is_beside_it(torch: str):
    found = constraints.constraints(LOCK, {"torch": torch, "numpy": "1.26.4"})
    assert found == [f"torch=={torch}", "wandb==0.31.0"]


def test_a_torch_that_would_be_replaced_stops_the_set_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(constraints, "installed", lambda: {"torch": "2.9.0"})
    assert constraints.main([]) == 2
    assert "got torch 2.9.0" in capsys.readouterr().out
    assert constraints.main(["--torch"]) == 0
    assert capsys.readouterr().out == ""
