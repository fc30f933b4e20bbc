"""Answer a launcher's questions about a configuration: the run folder, and which numbers of processes have a
layout, for a job that may go on with fewer hosts. A launcher composes no configuration by itself.

    python -m llmtrain.cli.elastic 2,4,6 OVERRIDES…

prints {"run_dir": folder, "memory_dir": folder, "remote": URL, "problems": […], "refused": {"2": why no
layout fits}} as JSON. memory_dir is null without copies in memory (checkpoint.memory.every), remote without
a copy elsewhere; with "" in place of the numbers no layout is asked for. It imports no torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from llmtrain.cli.hydra_app import composed
from llmtrain.errors import UserError
from llmtrain.train.resolve import layout_refusals


def main(arguments: Sequence[str]) -> None:
    """Print what does not fit."""
    sizes, *overrides = arguments
    said: dict[str, Any] = {
        "run_dir": None,
        "memory_dir": None,
        "remote": None,
        "problems": [],
        "refused": {},
    }
    try:
        configuration = composed("train", overrides)
        said["run_dir"] = str(configuration["run"]["dir"])
        said["remote"] = configuration["checkpoint"]["remote"]
        memory = configuration["checkpoint"]["memory"]
        said["memory_dir"] = None if memory["every"] is None else str(memory["dir"])
        if sizes:
            said["refused"] = layout_refusals(configuration, map(int, sizes.split(",")))
    except UserError as error:
        said["problems"] = [asdict(problem) for problem in error.problems]
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
