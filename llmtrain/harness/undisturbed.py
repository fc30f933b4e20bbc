"""Run the harness without side effects on this process."""

from __future__ import annotations

import contextlib
import os
import random
import sys
from collections.abc import Iterator

import numpy as np
import torch

SEED = 1234
"""The harness's default."""
_ALONE = "DISABLE_MULTIPROC"
"""Variable that keeps the harness from forking this process, whose libraries have threads."""


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, random numbers begin as in a run of the harness, and what is printed goes to stderr; afterwards
    generators and variables are as before. No bar is shown for making requests."""
    states = random.getstate(), np.random.get_state()
    import lm_eval.api.task as building

    bar = building.tqdm
    building.tqdm = lambda documents, **_: documents  # the requests of a task are made in a moment
    before = os.environ.get(_ALONE)
    os.environ[_ALONE] = "1"
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices), contextlib.redirect_stdout(sys.stderr):
        random.seed(0)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        try:
            yield
        finally:
            building.tqdm = bar
            random.setstate(states[0])
            np.random.set_state(states[1])
            if before is None:
                del os.environ[_ALONE]
            else:
                os.environ[_ALONE] = before
