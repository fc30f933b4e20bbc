"""How text is sampled. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmtrain.config import require
from llmtrain.errors import Problem


@dataclass(frozen=True)
class GenerateConfig:
    """A prompt's continuation: how long, and how each token is drawn."""

    max_new_tokens: int = 128
    """Most tokens after each prompt; the end-of-text token stops earlier."""
    temperature: float = 0.8
    """0 takes the likeliest token (greedy); 1 samples the model's own distribution."""
    top_k: int | None = None
    """Sample among the k likeliest tokens; null: among all."""
    top_p: float | None = None
    """Sample among the likeliest tokens that together reach this probability (arXiv:1904.09751)."""
    seed: int = 0
    batch_size: int = 16
    """Most prompts run together; those of equal length are."""

    def problems(self) -> Iterator[Problem]:
        yield from require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "1 or more")
        yield from require(self.temperature >= 0, "temperature", self.temperature, "0 or more")
        yield from require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "1 or more, or null")
        yield from require(
            self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "above 0, up to 1, or null"
        )
        yield from require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        if self.temperature == 0:
            for name in ("top_k", "top_p"):
                value = getattr(self, name)
                yield from require(
                    value is None, name, value, "null with temperature=0", "set a temperature, say 0.8"
                )
