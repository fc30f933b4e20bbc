"""Learning-rate schedules: pure functions from step to multiplier of the peak learning rate.

Steps count from 0: optimizer step k uses `multiplier(config, k, total)`. Warm-up does not start at 0, and
decay reaches `min_ratio` only at step `total`, so no step of the run has a learning rate of 0.
"""

from __future__ import annotations

import math

from llmtrain.optim.config import ScheduleConfig


def multiplier(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """Return the multiple of the peak learning rate for optimizer step `step` of `total_steps`.

    constant: 1. linear and cosine (arXiv:1608.03983): from 1 to min_ratio over the steps after warm-up.
    wsd (warm-up, stable, decay; arXiv:2404.06395): 1, then over the last decay_steps the 1 - sqrt cooldown
    that arXiv:2405.18392 found best. noam (arXiv:1706.03762, section 5.3): linear warm-up, then the inverse
    square root of the step, independent of `total_steps`; the rate of the paper, D^-0.5 · min(s^-0.5, s ·
    warmup^-1.5) at step s from 1, results from a peak of (D · warmup)^-0.5.
    """
    if config.name == "noam":
        warmup, s = max(1, config.warmup(total_steps)), step + 1
        return min(s / warmup, math.sqrt(warmup / s))
    warmup_steps = config.warmup(total_steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if config.name == "constant":
        return 1.0
    decay_steps = config.decay(total_steps) if config.name == "wsd" else total_steps - warmup_steps
    if step >= total_steps:
        return config.min_ratio
    progress = max(0.0, 1.0 - (total_steps - step) / decay_steps) if decay_steps else 0.0
    return config.min_ratio + (1.0 - config.min_ratio) * _remaining(config.name, progress)


def _remaining(name: str, progress: float) -> float:
    """Return the remaining share of the decay: 1 at progress 0, 0 at progress 1."""
    if name == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if name == "wsd":
        return 1.0 - math.sqrt(progress)
    return 1.0 - progress
