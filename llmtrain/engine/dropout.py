"""Seeds of torch's generators for the dropout of a micro-batch."""

from __future__ import annotations

import hashlib

import torch


def dropout_seed(seed: int, first_sample: int, stage: int = 0) -> int:
    """Return the dropout seed of a micro-batch for torch's generator. It depends on the run's seed, on the
    global number of the first sample, so that ranks and restarts don't change it, and on the pipeline
    stage, since stages have different layers."""
    place = f"{first_sample}" if stage == 0 else f"{first_sample}/{stage}"
    digest = hashlib.blake2b(f"dropout/{seed}/{place}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seed torch's generators. On a CPU, torch.manual_seed takes a millisecond to record its caller."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)
