"""Which numbers of processes have a layout, for a launcher whose job may go on with fewer hosts:

    python -m llmtrain.cli.elastic 2,4,6 OVERRIDES…

prints {"problems": […], "refused": {"2": why no layout fits}} as JSON. It imports no torch.
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
    said: dict[str, Any]
    try:
        refused = layout_refusals(composed("train", overrides), map(int, sizes.split(",")))
        said = {"problems": [], "refused": refused}
    except UserError as error:
        said = {"problems": [asdict(problem) for problem in error.problems], "refused": {}}
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
