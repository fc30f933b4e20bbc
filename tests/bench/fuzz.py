"""Run every reader of untrusted files on mutations of real ones, and report each outcome.

    OMP_NUM_THREADS=1 python -m tests.bench.fuzz [mutations=20000] [readers=gguf,bundle] [first=0]
    OMP_NUM_THREADS=1 python -m tests.bench.fuzz reader=gguf seed=17 [keep=FOLDER]

The first prints a table, each distinct failure and its first seeds; mutations are shared out among the
readers, and the exit code is 1 where any failed. The second reads one mutation again and prints all that
Python has to say of it; `keep` leaves the changed files in a new folder.

accepted and refused are good: a refusal is lines that name the file and what is wrong. traceback: another
exception; unclean: text with characters that steer a terminal, or without end; hang: over 5 s; growth: over
500 MiB; crash: the process was ended by a signal.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter

from tests.support import fuzz
from tests.support.fuzz_readers import READERS

SHOWN_SEEDS = 5


def main() -> int:
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    with fuzz.Specimens() as specimens:
        if "reader" in options:
            return again(specimens, options["reader"], int(options["seed"]), options.get("keep"))
        names = options["readers"].split(",") if "readers" in options else list(READERS)
        first = int(options.get("first", 0))
        with fuzz.Fuzzer(specimens) as fuzzer:
            return table(fuzzer, names, int(options.get("mutations", 20_000)), first)


def table(fuzzer: fuzz.Fuzzer, names: list[str], mutations: int, first: int) -> int:
    print(f"{'reader':<24}{'mutations':>10}" + "".join(f"{kind:>11}" for kind in fuzz.OUTCOMES) + f"{'s':>8}")
    failures: list[fuzz.Outcome] = []
    total: Counter[str] = Counter()
    started = time.monotonic()
    for number, name in enumerate(names):
        begun = time.monotonic()
        # The first ones take what the division leaves.
        share = mutations // len(names) + (number < mutations % len(names))
        outcomes = list(fuzzer.run(name, range(first, first + share)))
        counts = Counter(outcome.kind for outcome in outcomes)
        total += counts
        failures += [outcome for outcome in outcomes if not outcome.is_good]
        print_row(name, counts, time.monotonic() - begun)
    print_row("all", total, time.monotonic() - started)
    for line in described(failures):
        print(line)
    return 1 if failures else 0


def print_row(name: str, counts: Counter[str], seconds: float) -> None:
    cells = "".join(f"{counts[kind]:>11,}" for kind in fuzz.OUTCOMES)
    print(f"{name:<24}{counts.total():>10,}{cells}{seconds:>8.0f}", flush=True)


def described(failures: list[fuzz.Outcome]) -> list[str]:
    """Failures that are alike together."""
    groups: dict[tuple[str, str, str, str], list[fuzz.Outcome]] = {}
    for failure in failures:
        told = failure.detail.split(":")[0] if failure.kind == "traceback" else ""
        groups.setdefault((failure.reader, failure.kind, told, failure.where), []).append(failure)
    lines = []
    for alike in groups.values():
        seeds = " ".join(str(failure.seed) for failure in alike[:SHOWN_SEEDS])
        more = f" and {len(alike) - SHOWN_SEEDS:,} more" if len(alike) > SHOWN_SEEDS else ""
        lines.append(f"\n{alike[0]}\n    reader={alike[0].reader} seed={seeds}{more}")
    return lines


def again(specimens: fuzz.Specimens, name: str, seed: int, keep: str | None) -> int:
    try:
        path = fuzz.spoil(specimens, name, seed)
        print(f"changed: {path}", flush=True)
        if keep is not None:
            shutil.copytree(specimens.scratch, keep, symlinks=True)
        fuzz.reproduce(specimens, name, seed)
    except fuzz.UserError as error:
        print(f"refused: {error}")
    else:
        print("accepted")
    return 0


if __name__ == "__main__":
    sys.exit(main())
