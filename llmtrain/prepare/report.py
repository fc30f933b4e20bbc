"""Progress display and final report of `llmtrain prepare`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from llmtrain.prepare.clean import CleanCounts
from llmtrain.standard_streams import clean, unescaped


@dataclass
class SplitReport:
    documents: int
    tokens: int
    bytes: int


@dataclass
class Report:
    """Counts of one corpus. All but the last four fields depend on sources and settings only."""

    files: int = 0
    source_bytes: int = 0
    cleaning: CleanCounts = field(default_factory=CleanCounts)
    duplicates_dropped: int = 0
    near_duplicates_dropped: int = 0
    documents_kept: int = 0
    paired: bool = False
    """Whether the counts are of pairs; the counts of the splits are of texts even then."""
    vocab_size: int = 0
    unknown_tokens: int = 0
    tokenless_dropped: int = 0
    """Documents dropped because the tokenizer gives no token for them."""
    specials: dict[str, int] = field(default_factory=dict)
    """Special token → number of occurrences of its spelling in the texts."""
    specials_are_text: bool = True
    """Whether these occurrences were encoded as ordinary text."""
    splits: dict[str, SplitReport] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    output: str = ""
    seconds: float = 0.0
    phase_seconds: dict[str, float] = field(default_factory=dict)
    """Duration of each phase of this run."""
    reused: bool = False
    """Whether the corpus already existed, with the same sources and settings."""

    def recorded(self) -> dict[str, Any]:
        """Return the part that is stored in the manifest."""
        return {
            k: v for k, v in asdict(self).items() if k not in ("output", "seconds", "phase_seconds", "reused")
        }

    @classmethod
    def from_recorded(cls, recorded: dict[str, Any]) -> Report:
        values = dict(recorded)
        values["cleaning"] = CleanCounts(**values["cleaning"])
        values["splits"] = {name: SplitReport(**counts) for name, counts in values["splits"].items()}
        return cls(**values)

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        clean = self.cleaning
        what, texts, each = ("pairs", "texts", 2) if self.paired else ("documents", "documents", 1)
        one_sided = f", {clean.one_sided_dropped:,} one-sided" if self.paired else ""
        text = [
            f"read       {self.files:,} files, {self.source_bytes:,} bytes, {clean.documents_read:,} {what}",
            f"cleaned    {clean.controls_removed:,} control characters removed, "
            f"{clean.documents_normalized:,} {texts} changed by Unicode normalization, "
            f"{clean.spaces_replaced:,} U+2581 made a space",
            f"dropped    {clean.empty_dropped:,} empty{one_sided} and "
            f"{self.duplicates_dropped:,} duplicate {what}",
        ]
        if clean.surrogates_replaced:
            text[1] += f", {clean.surrogates_replaced:,} lone surrogates made U+FFFD"
        if self.tokenless_dropped:
            text.append(f"dropped    {self.tokenless_dropped:,} {what} without a token")
        if self.near_duplicates_dropped:
            text.append(f"dropped    {self.near_duplicates_dropped:,} near-duplicates")
        if clean.filtered:
            text.append(f"filtered   {sum(clean.filtered.values()):,} {what}: {clean.filtered_text}")
        if clean.tokenized:
            text.append(f"tokenized  {clean.tokenized:,} documents were given as token ids")
        if clean.members_ignored:
            text.append(f"ignored    {clean.members_ignored:,} members of tar files without a document")
        if clean.members_repeated:
            text.append(
                f"repeated   {clean.members_repeated:,} members of tar files repeat the name of the previous "
                "one; each is a document"
            )
        for name, split in self.splits.items():
            ratio = f", {split.bytes / split.tokens:.2f} bytes a token" if split.tokens else ""
            text.append(
                f"{name:<10} {split.documents // each:,} {what}, {split.tokens:,} tokens, "
                f"{split.bytes:,} bytes{ratio}"
            )
        text.append(
            f"tokenizer  {self.vocab_size:,} ids"
            + (f", {self.unknown_tokens:,} unknown tokens" if self.unknown_tokens else "")
        )
        if self.specials:
            named = ", ".join(f"{token} {count:,}" for token, count in sorted(self.specials.items())[:8])
            taken, other = ("text", "special") if self.specials_are_text else ("special tokens", "text")
            text.append(
                f"specials   {sum(self.specials.values()):,} special tokens spelled out in texts, encoded as "
                f"{taken}: {named} (tokenizer.typed_specials={other} encodes them as {other})"
            )
        text += [f"note       {note}" for note in self.notes]
        text += [f"warning    {warning}" for warning in self.warnings]
        text.append(
            f"unchanged  {self.output}: same sources and settings"
            if self.reused
            else f"written    {self.output} in {self.seconds:.1f} s"
        )
        return text


class Progress:
    """Shows one bar per phase on a terminal, or occasional lines elsewhere."""

    PLAIN_INTERVAL_S = 30.0

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        """Print nothing, because another process does."""
        self.seconds: dict[str, float] = {}
        """Duration of each finished phase."""
        self.bars: Any = None
        if sys.stdout.isatty() and not quiet:
            from rich import progress
            from rich.console import Console

            self.bars = progress.Progress(
                progress.TextColumn("{task.description:<10}"),
                progress.BarColumn(),
                progress.TaskProgressColumn(),
                progress.TextColumn("{task.fields[detail]}"),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
                console=Console(file=unescaped(sys.stdout)),
            )

    def phase(self, name: str, total: int, detail: Callable[[], str] = str) -> Phase:
        return Phase(self, name, total, detail)

    def say(self, line: str) -> None:
        if self.bars is not None:
            self.bars.console.print(clean(line), highlight=False, soft_wrap=True, markup=False)
        elif not self.quiet:
            print(clean(line), flush=True)

    def __enter__(self) -> Progress:
        if self.bars is not None:
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bars is not None:
            self.bars.stop()


class Phase:
    """Progress of one phase."""

    def __init__(self, progress: Progress, name: str, total: int, detail: Callable[[], str]) -> None:
        """total: amount of work, in any unit; detail: returns a few words to show after the percentage."""
        self._progress, self._name, self._total, self._detail = progress, name, max(total, 1), detail
        self._bars = bars = progress.bars
        self._done = 0
        self._started = self._said = time.monotonic()
        if bars is not None:
            self._task = bars.add_task(name, total=self._total, detail="")
        else:
            progress.say(f"{name} …")

    def advance(self, amount: int) -> None:
        self._done += amount
        self.tick()

    def tick(self) -> None:
        if self._bars is not None:
            self._bars.update(self._task, completed=self._done, detail=self._detail())
        elif time.monotonic() - self._said >= Progress.PLAIN_INTERVAL_S:
            self._said = time.monotonic()
            self._progress.say(f"{self._name} {100 * self._done / self._total:.0f}% {self._detail()}")

    def __enter__(self) -> Phase:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        seconds = self._progress.seconds[self._name] = time.monotonic() - self._started
        if kind is None and self._bars is None:
            self._progress.say(f"{self._name} {seconds:.1f} s {self._detail()}")
        elif kind is None:
            self._bars.update(self._task, completed=self._total, detail=self._detail())
