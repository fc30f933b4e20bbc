"""How rotary positions are stretched beyond the context that a model was trained on; free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from llmtrain.config import require
from llmtrain.errors import Problem


@dataclass(frozen=True)
class RopeScaling:
    """Stretching of rotary wavelengths beyond the original context."""

    kind: Literal["llama3", "linear", "dynamic", "yarn", "longrope"] = "llama3"
    """llama3: Llama 3.1's, of long wavelengths alone (arXiv:2407.21783); linear: all by `factor`, positions
    interpolated (arXiv:2306.15595); dynamic: by a larger theta, which grows with the text's length beyond the
    original context; yarn: wavelengths by how often they turn within it (arXiv:2309.00071); longrope: each by
    a number of its own (arXiv:2402.13753)."""
    factor: float = 8.0
    """How many times longer texts are than the original context; longrope has it in its numbers."""
    original_max_sequence_length: int = 8192
    """Context, in tokens, before stretching; of no use to linear."""
    low_frequency_factor: float = 1.0
    """llama3 stretches in full what turns less often within the original context, and nothing that turns more
    often than `high_frequency_factor`."""
    high_frequency_factor: float = 4.0
    """llama3: see `low_frequency_factor`."""
    beta_slow: float = 1.0
    """yarn: as `low_frequency_factor`, in turns within the original context."""
    beta_fast: float = 32.0
    """yarn: as `high_frequency_factor`."""
    truncate: bool = True
    """yarn: between the two it begins and ends at whole dims."""
    attention_factor: float | None = None
    """yarn and longrope: queries and keys are multiplied by it; null: yarn 0.1 · ln(factor) + 1, longrope
    sqrt(1 + ln(factor) / ln(original_max_sequence_length))."""
    short_factors: tuple[float, ...] = ()
    """longrope: what each wavelength is multiplied by in texts within the original context."""
    long_factors: tuple[float, ...] = ()
    """longrope: the same in longer texts."""

    @property
    def depends_on_length(self) -> bool:
        """A token's angle is not its position's alone, but also that of the length of its text."""
        return self.kind in ("dynamic", "longrope")

    def problems(self) -> Iterator[Problem]:
        yield from require(self.factor >= 1, "factor", self.factor, "1 or more")
        longest = self.original_max_sequence_length
        # Its logarithm is divided by.
        yield from require(longest >= 2, "original_max_sequence_length", longest, "2 or more")
        low, high = self.low_frequency_factor, self.high_frequency_factor
        yield from require(high > low, "high_frequency_factor", high, f"more than low_frequency_factor={low}")
        yield from require(self.beta_slow > 0, "beta_slow", self.beta_slow, "more than 0")
        yield from require(self.beta_fast > 0, "beta_fast", self.beta_fast, "more than 0")
        factor = self.attention_factor
        yield from require(factor is None or factor > 0, "attention_factor", factor, "more than 0, or null")

    def width_problems(self, width: int) -> Iterator[Problem]:
        """What does not go with `width` dims of a head that are turned."""
        if self.kind == "dynamic":
            yield from require(width > 2, "kind", "dynamic", f"another with {width} rotary dims of a head")
        if self.kind == "longrope":
            for name in ("short_factors", "long_factors"):
                factors = getattr(self, name)
                fits = len(factors) == width // 2 and all(factor > 0 for factor in factors)
                got = f"{len(factors)} numbers, the least {min(factors, default=0)}"
                allowed = f"{width // 2} numbers above 0: half of a head's {width} rotary dims"
                yield from require(fits, name, got, allowed)
