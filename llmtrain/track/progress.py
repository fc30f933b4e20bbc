"""Show the progress of a run: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.live import Live
from rich.text import Text

from llmtrain.standard_streams import clean, unescaped

_GIB = 2**30


class Progress:
    """Shows the progress of a run every `every` steps.

    `update` shows loss, lr, grad_norm, tokens_per_second, mfu and memory_bytes if given. The remaining time
    is estimated from the steps of this process, including evaluations and checkpoints between them.
    """

    def __init__(
        self, total_steps: int, *, start_step: int = 0, every: int = 1, console: Console | None = None
    ) -> None:
        self._total_steps = total_steps
        self._every = max(1, every)
        self._console = console or Console(file=unescaped(sys.stderr), highlight=False)
        self._live: Live | None = None
        self._start_step = start_step
        self._started = time.monotonic()
        self._is_warm = False

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report that step number `step`, counted from 1, is done."""
        done = step - self._start_step
        seconds = time.monotonic() - self._started
        if not self._is_warm:
            # The first step is slow: measure from its end.
            self._is_warm = True
            self._start_step, self._started = step, time.monotonic()
        if step % self._every and step != self._total_steps:
            return
        seconds_left = seconds / done * (self._total_steps - step) if done > 0 else None
        self._show(progress_line(step, self._total_steps, metrics, seconds_left))

    def message(self, text: str) -> None:
        """Print a separate, permanent line."""
        self._console.print(Text(clean(text)), soft_wrap=True)

    def close(self) -> None:
        """Stop updating; the last line stays visible."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _show(self, line: str) -> None:
        if not self._console.is_terminal:
            self.message(line)
            return
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)


def progress_line(
    step: int, total_steps: int, metrics: Mapping[str, float], seconds_left: float | None
) -> str:
    """Return the line that `Progress` shows, without missing metrics."""
    parts = [f"step {step:>{len(str(total_steps))}}/{total_steps}"]
    for name, form in _FORMS.items():
        if metrics.get(name) is not None:
            parts.append(form(metrics[name]))
    if seconds_left is not None:
        parts.append(f"eta {duration(seconds_left)}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Format as 1:02:03 or 4 d 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hour}:{minute:02}:{second:02}"


_FORMS = {
    "loss": lambda v: f"loss {v:.4f}",
    "lr": lambda v: f"lr {v:.2e}",
    "grad_norm": lambda v: f"grad norm {v:.3f}",
    "tokens_per_second": lambda v: f"{v:,.0f} tokens/s",
    "mfu": lambda v: f"mfu {v:.1%}",
    "memory_bytes": lambda v: f"{v / _GIB:.2f} GiB",
}
