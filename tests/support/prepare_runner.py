"""`prepare` in small pieces, which dies where it is told to: `python -m` of this, with settings as JSON.

Small units make many steps of little text. Spawned workers run the part above `main` too. Of the environment:

- RANK and SIZE: which process of a job this is, of how many. Its workers are forked, which takes a tenth of
  a spawned one's start; others are spawned, as llmtrain does.
- DIE_AT=n: the process kills itself and its whole group at its n-th rename, before it (DIE=before) or after:
  every step of the work ends with a rename. With DIE_IN=name only renames to paths with that name count.
- FILE_BYTES: no file may grow beyond this, which is how a quota answers; workers inherit it.
- SLOW: half a second for each batch of documents.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from typing import Any

from llmtrain.prepare import document_blocks, near_duplicates, peers, source_file, tasks

source_file.UNIT_BYTES, document_blocks.BLOCK_BYTES, near_duplicates.RANGE_DOCUMENTS = 6_000, 2_500, 90
peers.HEARTBEAT_SECONDS, peers.LONGEST_LOOK = 0.1, 0.1

_RENAMES = 0
_replace, _clean = os.replace, tasks.clean


def _replace_and_die(source: Any, target: Any) -> None:
    global _RENAMES
    # Signs of life come by the clock, not by the work.
    counts = os.environ.get("DIE_IN", "") in str(target) and "/peers/" not in str(target)
    _RENAMES += counts
    if os.environ["DIE"] == "after":
        _replace(source, target)
    if counts and int(os.environ["DIE_AT"]) == _RENAMES:
        os.killpg(0, signal.SIGKILL)
    if os.environ["DIE"] == "before":
        _replace(source, target)


def _clean_slowly(*arguments: Any) -> Any:
    time.sleep(0.5)
    return _clean(*arguments)


if "DIE_AT" in os.environ:
    os.replace = _replace_and_die  # type: ignore[assignment]
if "FILE_BYTES" in os.environ:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["FILE_BYTES"]), hard))
if "SIZE" in os.environ:
    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: fork  # type: ignore[assignment]
if "SLOW" in os.environ:
    tasks.clean = _clean_slowly

if __name__ == "__main__":
    from llmtrain.config import decode
    from llmtrain.errors import UserError
    from llmtrain.prepare.config import PrepareConfig
    from llmtrain.prepare.job import prepare

    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("SIZE", "1"))
    try:
        prepare(decode(PrepareConfig, json.loads(sys.argv[1])), rank, size, "job")
    except UserError as error:
        sys.exit(str(error))
