"""Runs one part: python -m tests.gpu.work MODULE:FUNCTION DEVICE FOLDER ROWS"""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

from tests.gpu.table import Row


def main(function: str, device: str, folder: str, rows: str) -> None:
    module, _, name = function.partition(":")
    with open(rows, "w") as file:
        for row in getattr(importlib.import_module(module), name)(device, Path(folder)):
            assert isinstance(row, Row)
            # At once: the process may die at the next one.
            print(json.dumps(asdict(row)), file=file, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
