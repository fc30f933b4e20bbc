"""NVIDIA GPUs of this host and their errors, as the driver's own programs tell them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

BASIC = ("index", "name", "driver_version", "memory.total", "memory.used")
HEALTH = (
    "ecc.errors.uncorrected.volatile.total",
    "remapped_rows.pending",
    "remapped_rows.failure",
    "clocks_throttle_reasons.hw_slowdown",
    "clocks_throttle_reasons.sw_thermal_slowdown",
)
"""Fields of `nvidia-smi --query-gpu`; drivers that lack one of HEALTH refuse all of it."""
ASKING_SECONDS = 20.0
"""How long nvidia-smi may take: it hangs where a GPU has fallen off its bus."""

XID = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)")
HARDWARE_XIDS = {
    48: "a double-bit ECC error",
    63: "a row of memory was remapped",
    64: "a row of memory could not be remapped",
    74: "an NVLink error",
    79: "the GPU has fallen off its bus",
    92: "a high rate of single-bit ECC errors",
    94: "a contained ECC error",
    95: "an uncontained ECC error",
    119: "its processor GSP timed out",
    120: "its processor GSP failed",
}
"""Xid → what it means, of those that do not come from programs (NVIDIA, "Xid Errors", r580)."""


def ask_driver() -> list[dict[str, str]]:
    """Return name → value of BASIC, and of HEALTH where the driver has it, for each GPU of this host.

    Return [] without nvidia-smi. Raise OSError with the reason if it fails.
    """
    try:
        return parse_table(_said("nvidia-smi", *_query((*BASIC, *HEALTH))), (*BASIC, *HEALTH))
    except FileNotFoundError:
        return []
    except OSError:
        return parse_table(_said("nvidia-smi", *_query(BASIC)), BASIC)


def _query(names: Sequence[str]) -> tuple[str, str]:
    return f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"


def parse_table(text: str, names: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows of nvidia-smi's table without header, by the names of its columns."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    return [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)]


def kernel_log() -> str:
    """Return the kernel's messages since the start of this host; "" for a user who may not read them."""
    try:
        return _said("dmesg")
    except OSError:
        return ""


def _said(*command: str) -> str:
    try:
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=ASKING_SECONDS, errors="replace"
        )
    except subprocess.TimeoutExpired:
        raise OSError(f"{command[0]} gave no answer in {ASKING_SECONDS:g} s") from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[:200]
        raise OSError(f"{command[0]} ended with {done.returncode}: {said}")
    return done.stdout


def errors_of(gpus: Sequence[Mapping[str, str]], log: str) -> list[str]:
    """Return a line for each sign of a fault in what `ask_driver` and `kernel_log` gave."""
    found = []
    for gpu in gpus:
        name = f"GPU {gpu['index']}"
        count = gpu.get("ecc.errors.uncorrected.volatile.total", "")
        if count.isdigit() and int(count):
            found.append(f"{name}: {count} ECC errors that could not be corrected")
        if gpu.get("remapped_rows.failure") in ("Yes", "1"):
            found.append(f"{name}: a row of its memory could not be remapped")
        if gpu.get("remapped_rows.pending") in ("Yes", "1"):
            found.append(f"{name}: a row of its memory waits for a reset to be remapped")
        for field, what in (("hw_slowdown", "power or heat"), ("sw_thermal_slowdown", "heat")):
            if gpu.get(f"clocks_throttle_reasons.{field}") == "Active":
                found.append(f"{name}: slowed down by {what}")
    seen = {(place, int(number)) for place, number in XID.findall(log)}
    for place, number in sorted(seen):
        if number in HARDWARE_XIDS:
            found.append(f"GPU at {place}: Xid {number} in the kernel's log, {HARDWARE_XIDS[number]}")
    return found


def describe(local_rank: int) -> dict[str, Any]:
    """Return the driver's version, the number of GPUs and their errors; only a host's first rank asks."""
    if local_rank:
        return {}
    try:
        gpus = ask_driver()
    except OSError as error:
        return {"count": 0, "driver": None, "errors": [str(error)], "memory_used_mib": []}
    drivers = {gpu["driver_version"] for gpu in gpus}
    return {
        "count": len(gpus),
        "driver": ", ".join(sorted(drivers)) or None,
        "errors": errors_of(gpus, kernel_log()) if gpus else [],
        "memory_used_mib": [int(gpu["memory.used"]) for gpu in gpus if gpu["memory.used"].isdigit()],
    }
