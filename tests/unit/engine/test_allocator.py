"""Freed memory that is kept, and given back where too much of it is in pieces."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")

PIECES = """
import json, sys
import numpy as np
from llmtrain.engine.allocator import Heap, keep_freed_memory
from llmtrain.track.throughput import memory_bytes

assert keep_freed_memory()
start, mib = memory_bytes("cpu"), 2**20
heap = Heap(start + int(sys.argv[1]) * mib)
kept, held, given_back = [], [], []
for step in range(30):
    # The first step's blocks leave pieces between what stays, each too small for a block of the next steps.
    size, count = (100_000, 1_000) if step == 0 else (200_000, 100)
    blocks = []
    for i in range(count):
        blocks.append(np.ones(size, np.uint8))
        kept.append(np.ones(1_000, np.uint8))
    del blocks
    given_back.append(heap.after_step())
    held.append((memory_bytes("cpu") - start) // mib)
print(json.dumps({"held": held, "given_back": given_back, "limit": (heap.limit_bytes - start) // mib}))
"""


def run(forecast_mib: int) -> dict[str, list[int]]:
    done = subprocess.run(
        [sys.executable, "-c", PIECES, str(forecast_mib)], capture_output=True, text=True, check=True
    )
    result: dict[str, list[int]] = json.loads(done.stdout)
    return result


def test_a_heap_in_pieces_is_given_back():
    """Of 96 MiB in pieces, no later step, which takes 19 MiB, can use most."""
    free, bounded = run(10_000), run(60)
    assert not any(free["given_back"])
    assert free["held"][-1] > 85
    assert bounded["given_back"] == [True] + 29 * [False]
    assert max(bounded["held"]) <= 60


def test_a_forecast_below_the_use_is_raised():
    """Else memory would be given back at each step, and cleared anew at the next."""
    found = run(0)
    assert 2 <= sum(found["given_back"]) <= 4
    assert found["limit"] > 19
