"""Whether llmtrain does on an NVIDIA GPU what it does on a CPU, and how fast: one table in a few minutes.

    python -m tests.gpu [--output FOLDER] [--only PART,…] [--minutes 8] [--device cpu]

From a checkout, with any torch that llmtrain runs on; parts whose packages are missing are named and passed
over. Weights are random and data is made here. Each part runs in a process of its own: what fails or dies is
a row, and the rest goes on. check.md and check.json are written after each part; the exit code is 1 where
any row failed. `--device cpu` runs the same at tiny sizes, to try the check itself.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.gpu import table
from tests.gpu.parts import PARTS, run


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, default=Path("gpu_check"), metavar="FOLDER")
    parser.add_argument("--only", default="", metavar="PART,…", help=", ".join(part.name for part in PARTS))
    parser.add_argument("--minutes", type=float, default=8.0, help="parts that come later count as failed")
    options = parser.parse_args()
    only = [name.strip() for name in options.only.split(",") if name.strip()]
    if unknown := set(only) - {part.name for part in PARTS}:
        parser.error(f"--only: got {', '.join(sorted(unknown))}; allowed: {', '.join(p.name for p in PARTS)}")
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device: got cuda, and torch sees no GPU here; allowed: cpu")

    folder = options.output.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    environment = table.environment(options.device)
    parts = [part for part in PARTS if not only or part.name in only]
    for name, value in environment.items():
        print(f"{name}: {value}", flush=True)
    rows = run(
        parts,
        options.device,
        folder,
        lambda so_far: table.write(folder, environment, so_far),
        options.minutes,
    )
    print(table.markdown(environment, rows))
    print(f"written to {folder / 'check.md'} and check.json")
    return int(table.has_failed(rows))


if __name__ == "__main__":
    sys.exit(main())
