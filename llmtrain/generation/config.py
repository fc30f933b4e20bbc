"""How text is written: sampled, or searched for. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from llmtrain.config import require
from llmtrain.errors import Problem

TEMPERATURE = 0.8
"""Of a continuation, unless one is given."""


@dataclass(frozen=True)
class GenerateConfig:
    """A prompt's continuation, or what answers a source: how long, and how each token is found."""

    max_new_tokens: int = 128
    """Most tokens after each prompt; the end-of-text token stops earlier."""
    min_new_tokens: int = 0
    """The end-of-text token is not taken before so many others."""
    temperature: float | None = None
    """0 takes the likeliest token (greedy); 1 samples the model's own distribution; null: 0.8, and 0 with
    beams and for encoder–decoders."""
    top_k: int | None = None
    """Sample among the k likeliest tokens; null: among all."""
    top_p: float | None = None
    """Sample among the likeliest tokens that together reach this probability (arXiv:1904.09751)."""
    num_beams: int = 1
    """Texts followed side by side; of those that end, the best is taken. 1: none but the one."""
    length_penalty: float = 1.0
    """A text's score is the sum of its tokens' log probabilities over (tokens, with the end)^length_penalty:
    more favours longer texts."""
    early_stopping: bool = False
    """Stop when num_beams texts have ended; else when what is still open, scored at its length, is below
    all of them."""
    seed: int = 0
    batch_size: int = 16
    """Most prompts run together: those of equal length, and sources of similar."""

    def resolved(self, *, has_sources: bool) -> GenerateConfig:
        """The same with a temperature."""
        if self.temperature is not None:
            return self
        return replace(self, temperature=0.0 if has_sources or self.num_beams > 1 else TEMPERATURE)

    def problems(self) -> Iterator[Problem]:
        for name in ("max_new_tokens", "num_beams", "batch_size"):
            yield from require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        allowed = f"0 up to max_new_tokens={self.max_new_tokens}"
        short_enough = 0 <= self.min_new_tokens <= self.max_new_tokens
        yield from require(short_enough, "min_new_tokens", self.min_new_tokens, allowed)
        yield from require(
            self.temperature is None or self.temperature >= 0,
            "temperature",
            self.temperature,
            "0 or more, or null",
        )
        yield from require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "1 or more, or null")
        yield from require(
            self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "above 0, up to 1, or null"
        )
        if self.num_beams > 1:
            got, remedy = self.temperature, "beams are not sampled: leave it out, or give num_beams=1"
            yield from require(not got, "temperature", got, f"0 with num_beams={self.num_beams}", remedy)
        if self.num_beams > 1 or self.temperature == 0:
            reason = f"num_beams={self.num_beams}" if self.num_beams > 1 else "temperature=0"
            remedy = "give num_beams=1" if self.num_beams > 1 else "set a temperature, say 0.8"
            for name in ("top_k", "top_p"):
                value = getattr(self, name)
                yield from require(value is None, name, value, f"null with {reason}", remedy)
        if self.num_beams == 1:
            for name, plain in (("length_penalty", 1.0), ("early_stopping", False)):
                value = getattr(self, name)
                allowed = f"{str(plain).lower()} with num_beams=1"
                yield from require(value == plain, name, value, allowed, "give num_beams, say 4")
