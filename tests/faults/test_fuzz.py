"""Files from elsewhere, changed in a hundred ways: each is read or refused in a line, and nothing else.

Each commit tries other mutations. tests/bench/fuzz.py does the same with thousands and prints a table.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmtrain.errors import DataError, Problem
from tests.support import fuzz
from tests.support.fuzz_readers import READERS, Reader
from tests.support.mutations import mutate
from tests.support.turns import this_turn

pytestmark = pytest.mark.slow

MUTATIONS = 4
"""Of each reader's files."""
SEED = 1_000_000
"""Beyond those of the benchmark."""


@pytest.fixture(scope="module")
def specimens() -> Iterator[fuzz.Specimens]:
    with fuzz.Specimens() as made:
        yield made


def test_changed_files_are_read_or_refused(specimens: fuzz.Specimens):
    first = SEED + MUTATIONS * this_turn()
    seeds = range(first, first + MUTATIONS)
    with fuzz.Fuzzer(specimens) as fuzzer:
        outcomes = [outcome for name in READERS for outcome in fuzzer.run(name, seeds)]
    assert len(outcomes) == MUTATIONS * len(READERS)
    bad = [
        f"{outcome}\n    python -m tests.bench.fuzz reader={outcome.reader} seed={outcome.seed}"
        for outcome in outcomes
        if not outcome.is_good
    ]
    assert not bad, f"{len(bad)} of {len(outcomes)} mutations:\n" + "\n".join(bad)
    # Else nothing behind the first check was reached.
    accepted = sum(outcome.kind == "accepted" for outcome in outcomes)
    assert len(outcomes) // 10 < accepted < len(outcomes) // 10 * 9


def _hang(path: Path) -> None:
    time.sleep(60)


def _grow(path: Path) -> None:
    b"\1" * (2 * fuzz.GROWTH_BYTES)


def _crash(path: Path) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _divide(path: Path) -> None:
    raise ZeroDivisionError("by\nnothing")


def _print_without_end(path: Path) -> None:
    print("a" * 1_000_000)


def _refuse_with_an_escape(path: Path) -> None:
    raise EscapingError(Problem("here", "nothing"))


class EscapingError(DataError):
    def __str__(self) -> str:
        return "\x1b[2J"


def _print_half_a_character(path: Path) -> None:
    print("\ud800")


def _refuse(path: Path) -> None:
    raise DataError(Problem("here", "nothing", "something"))


@pytest.mark.parametrize(
    ("read", "kind", "detail"),
    [
        (lambda path: None, "accepted", ""),
        (_refuse, "refused", "here: got nothing; allowed: something"),
        (_divide, "traceback", "ZeroDivisionError: by"),
        (_print_half_a_character, "traceback", "UnicodeEncodeError"),
        (_print_without_end, "unclean", "a line of 1,000,000 characters"),
        (_refuse_with_an_escape, "unclean", "'\\x1b' in"),
        (_grow, "growth", ""),
        (_crash, "crash", "SIGSEGV"),
        (_hang, "hang", "over 0.5 s"),
    ],
)
def test_what_a_reader_does_is_told(
    specimens: fuzz.Specimens,
    monkeypatch: pytest.MonkeyPatch,
    read: Callable[[Path], None],
    kind: str,
    detail: str,
):
    monkeypatch.setattr(fuzz, "GROWTH_BYTES", 50 << 20)
    if kind == "hang":
        monkeypatch.setattr(fuzz, "SECONDS", 0.5)
    # The files as they are must be taken: what is done to them begins with the second call.
    calls = iter([lambda path: None])
    reader = Reader({"images/a.csv": "bytes"}, lambda path: next(calls, read)(path))
    monkeypatch.setitem(READERS, "odd", reader)
    with fuzz.Fuzzer(specimens) as fuzzer:
        [outcome] = fuzzer.run("odd", [1])
    assert (outcome.kind, outcome.detail[: len(detail)]) == (kind, detail)
    assert outcome.is_good == (kind in ("accepted", "refused"))


def test_files_that_are_not_read_as_they_are_show_a_mistake_of_the_fuzzer(
    specimens: fuzz.Specimens, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(READERS, "odd", Reader({"images/a.csv": "bytes"}, _refuse))
    with (
        fuzz.Fuzzer(specimens) as fuzzer,
        pytest.raises(AssertionError, match="odd does not read its files as they are"),
    ):
        list(fuzzer.run("odd", [1]))


@pytest.mark.parametrize("kind", ["bytes", "json", "jsonl", "npy", "safetensors", "tar", "gz"])
def test_a_mutation_is_a_function_of_its_seed(kind: str):
    content = b'{"a": [1, 2, {"b": "text"}], "c": null}\n'
    changed = [mutate(content, kind, str(seed)) for seed in range(50)]
    assert changed == [mutate(content, kind, str(seed)) for seed in range(50)]
    assert len(set(changed)) > 20
