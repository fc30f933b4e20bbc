"""The table that the check writes: a row for each thing that was asked, and where it was asked."""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from llmtrain import files

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("deepspeed", "fairscale", "transformers", "accelerate", "numpy", "safetensors", "tokenizers")

Result = Literal["ok", "FAILED", "passed over"]


@dataclass(frozen=True)
class Row:
    part: str
    check: str
    result: Result
    detail: str = ""
    """Figures with what they are held to, or why not."""


def judged(part: str, check: str, is_good: bool, detail: str) -> Row:
    return Row(part, check, "ok" if is_good else "FAILED", detail)


def has_failed(rows: Iterable[Row]) -> bool:
    return any(row.result == "FAILED" for row in rows)


def write(folder: Path, environment: Mapping[str, str], rows: Sequence[Row]) -> None:
    """`check.md` and `check.json`, each whole at any time."""
    content = {"environment": dict(environment), "rows": [asdict(row) for row in rows]}
    files.write_json_atomically(folder / "check.json", content)
    files.write_atomically(folder / "check.md", markdown(environment, rows))


def markdown(environment: Mapping[str, str], rows: Sequence[Row]) -> str:
    lines = ["# llmtrain on a GPU", "", *(f"- {name}: {value}" for name, value in environment.items()), ""]
    table = [("part", "check", "result", "detail"), ("---",) * 4]
    table += [(row.part, row.check, row.result, row.detail) for row in rows]
    lines += ["| " + " | ".join(_cell(text) for text in line) + " |" for line in table]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def environment(device: str) -> dict[str, str]:
    """What a reader of the table must know of the machine."""
    import torch

    facts = {"device": device, "processor": _processor()}
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        facts["GPU"] = f"{torch.cuda.get_device_name()}, {memory:.1f} GiB, compute capability {major}.{minor}"
        facts["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts["CUDA of torch"] = str(torch.version.cuda)
    facts["Python"] = sys.version.split()[0]
    facts["torch"] = torch.__version__
    facts["packages"] = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    commit = _output("git", "-C", str(REPOSITORY), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(REPOSITORY), "status", "--porcelain", "--untracked-files=no")
    facts["commit"] = commit + (", with changes" if changed not in ("", UNKNOWN) else "")
    return facts


UNKNOWN = "unknown"


def _version(package: str) -> str:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return "missing"


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return UNKNOWN
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return done.stdout.strip() if done.returncode == 0 else UNKNOWN


def read_rows(path: Path) -> list[Row]:
    """The rows that a part has written so far, one a line; a last line that was cut is left out."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(Row(**json.loads(line)))
    return rows
