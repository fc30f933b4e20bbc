"""`llmtrain train`: from a configuration to a finished run folder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from llmtrain.checkpoint.memory_room import refuse_without_room
from llmtrain.distributed import launcher, stopping
from llmtrain.errors import INTERRUPTED_EXIT_CODE
from llmtrain.plan.estimate import estimate
from llmtrain.plan.fit import refuse_if_too_large
from llmtrain.plan.report import summary
from llmtrain.standard_streams import print_note
from llmtrain.train.auto_layout import choice_of
from llmtrain.train.resolve import resolve
from llmtrain.train.time_limit import refuse_if_too_short
from llmtrain.train.vectors_config import decode_run, is_word_vectors


def run(mapping: Mapping[str, Any]) -> int:
    """Train as `mapping`, the composed conf/train.yaml, says; return the exit code. All ranks call it alike.

    Raise UserError for whatever a user can fix.
    """
    started = time.perf_counter()
    with stopping.request.listening():
        if is_word_vectors(mapping):
            return _train_vectors(mapping)
        resolved = resolve(mapping)
        config = resolved.config
        has_copy = config.checkpoint.remote is not None
        refuse_if_too_short(config.train.time_limit, config.run.dir, config.train.steps, has_copy)
        plan = estimate(config.model, resolved.layout, config, resolved.trainable)
        if launcher.rank() == 0:
            print_note(summary(plan))
            if config.parallel.auto:
                chosen = choice_of(config, resolved.layout).overrides()
                print_note(f"parallel=auto chose {' '.join(chosen)}")
        refuse_if_too_large(plan)
        refuse_without_room(config.checkpoint.memory, plan.saved_bytes)

        # Everything above answers without importing torch.
        from llmtrain.train.session import train_run

        is_complete = train_run(resolved, plan.memory.total, started)
    return 0 if is_complete else INTERRUPTED_EXIT_CODE


def _train_vectors(mapping: Mapping[str, Any]) -> int:
    """Train word vectors, which go through a text without batches."""
    config = decode_run(mapping)
    refuse_if_too_short(config.train.time_limit, config.run.dir, config.train.steps)

    from llmtrain.train.vectors_run import train_vectors

    return 0 if train_vectors(config) else INTERRUPTED_EXIT_CODE
