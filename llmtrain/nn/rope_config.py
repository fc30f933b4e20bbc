"""Config of rotary positions beyond the context that a model was trained on. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from llmtrain.config import require
from llmtrain.errors import Problem


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of rotary wavelengths for texts longer than the original context."""

    kind: Literal["llama3", "linear", "dynamic", "yarn", "longrope"] = "llama3"
    """Method. llama3: scales long wavelengths only (arXiv:2407.21783); linear: scales all by `factor`,
    i.e. interpolates positions (arXiv:2306.15595); dynamic: increases theta with the text's length beyond
    the original context; yarn: scales wavelengths by their rotations within the original context
    (arXiv:2309.00071); longrope: scales each by its own factor (arXiv:2402.13753)."""
    factor: float = 8.0
    """Ratio of the longest text to the original context; longrope does not use it for wavelengths."""
    original_max_sequence_length: int = 8192
    """Original context, in tokens; unused by linear."""
    low_frequency_factor: float = 1.0
    """llama3: wavelengths with fewer rotations than this within the original context are scaled fully,
    those with more than `high_frequency_factor` not at all."""
    high_frequency_factor: float = 4.0
    """llama3: see `low_frequency_factor`."""
    beta_slow: float = 1.0
    """yarn: as `low_frequency_factor`."""
    beta_fast: float = 32.0
    """yarn: as `high_frequency_factor`."""
    truncate: bool = True
    """yarn: round the ends of the transition to whole dims."""
    attention_factor: float | None = None
    """yarn and longrope: factor of queries and keys; null: 0.1 · ln(factor) + 1 for yarn, sqrt(1 +
    ln(factor) / ln(original_max_sequence_length)) for longrope."""
    short_factors: tuple[float, ...] = ()
    """longrope: factor of each wavelength in texts within the original context."""
    long_factors: tuple[float, ...] = ()
    """longrope: factor of each wavelength in longer texts."""

    @property
    def depends_on_length(self) -> bool:
        """Return whether a token's angle depends on the length of its text, not only on its position."""
        return self.kind in ("dynamic", "longrope")

    @property
    def changes_beyond(self) -> int | None:
        """Return the length of a text, in tokens, beyond which the angles of all its tokens are others; None:
        they never are."""
        return self.original_max_sequence_length if self.kind == "longrope" else None

    def problems(self) -> Iterator[Problem]:
        yield from require(self.factor >= 1, "factor", self.factor, "1 or more")
        longest = self.original_max_sequence_length
        # The formula divides by its logarithm.
        yield from require(longest >= 2, "original_max_sequence_length", longest, "2 or more")
        low, high = self.low_frequency_factor, self.high_frequency_factor
        yield from require(high > low, "high_frequency_factor", high, f"more than low_frequency_factor={low}")
        yield from require(self.beta_slow > 0, "beta_slow", self.beta_slow, "more than 0")
        yield from require(self.beta_fast > 0, "beta_fast", self.beta_fast, "more than 0")
        factor = self.attention_factor
        yield from require(factor is None or factor > 0, "attention_factor", factor, "more than 0, or null")

    def width_problems(self, width: int) -> Iterator[Problem]:
        """Yield what is incompatible with `width` rotated dims per head."""
        if self.kind == "dynamic":
            yield from require(width > 2, "kind", "dynamic", f"another with {width} rotary dims of a head")
        if self.kind == "longrope":
            for name in ("short_factors", "long_factors"):
                factors = getattr(self, name)
                fits = len(factors) == width // 2 and all(factor > 0 for factor in factors)
                got = f"{len(factors)} numbers, the least {min(factors, default=0)}"
                allowed = f"{width // 2} numbers above 0: half of a head's {width} rotary dims"
                yield from require(fits, name, got, allowed)
