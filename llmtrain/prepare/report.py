"""What prepare tells: progress while it works, and a report at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from llmtrain.prepare.clean import CleanCounts
from llmtrain.standard_streams import clean, unchanged


@dataclass
class SplitReport:
    documents: int
    tokens: int
    bytes: int


@dataclass
class Report:
    """Counts of one corpus. They depend on sources and settings alone, but for the last four."""

    files: int = 0
    source_bytes: int = 0
    cleaning: CleanCounts = field(default_factory=CleanCounts)
    duplicates_dropped: int = 0
    near_duplicates_dropped: int = 0
    documents_kept: int = 0
    paired: bool = False
    """What is counted here, but for the splits' documents, are pairs."""
    vocab_size: int = 0
    unknown_tokens: int = 0
    tokenless_dropped: int = 0
    """Documents in which the tokenizer finds nothing."""
    specials: dict[str, int] = field(default_factory=dict)
    """Special token → how often it is spelled out in texts."""
    specials_are_text: bool = True
    """They were taken for text like any other."""
    splits: dict[str, SplitReport] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    output: str = ""
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    """Seconds each stage took in this run."""
    reused: bool = False
    """The corpus stood there already, made from the same sources and settings."""

    def recorded(self) -> dict[str, Any]:
        """The part that goes into the manifest."""
        return {k: v for k, v in asdict(self).items() if k not in ("output", "seconds", "stages", "reused")}

    @classmethod
    def from_recorded(cls, recorded: dict[str, Any]) -> Report:
        values = dict(recorded)
        values["cleaning"] = CleanCounts(**values["cleaning"])
        values["splits"] = {name: SplitReport(**counts) for name, counts in values["splits"].items()}
        return cls(**values)

    def lines(self) -> list[str]:
        """The report as text, one fact a line."""
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
            text.append(f"dropped    {self.tokenless_dropped:,} {what} in which the tokenizer finds nothing")
        if self.near_duplicates_dropped:
            text.append(f"dropped    {self.near_duplicates_dropped:,} near-duplicates")
        if clean.filtered:
            text.append(f"filtered   {sum(clean.filtered.values()):,} {what}: {clean.filtered_text}")
        if clean.tokenized:
            text.append(f"tokenized  {clean.tokenized:,} documents came as token ids")
        if clean.members_ignored:
            text.append(f"ignored    {clean.members_ignored:,} members of tars that hold no document")
        if clean.members_repeated:
            text.append(
                f"repeated   {clean.members_repeated:,} members of tars have the name of the one before: "
                "each is a document"
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
                f"specials   {sum(self.specials.values()):,} special tokens spelled out in texts, taken for "
                f"{taken}: {named} (tokenizer.typed_specials={other} takes them for {other})"
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
    """One bar a stage on a terminal; a plain line now and then elsewhere."""

    PLAIN_INTERVAL_S = 30.0

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        """Say nothing: another process tells for this one."""
        self.seconds: dict[str, float] = {}
        """Seconds each ended stage took."""
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
                console=Console(file=unchanged(sys.stdout)),
            )

    def stage(self, name: str, total: int, detail: Callable[[], str] = str) -> Stage:
        return Stage(self, name, total, detail)

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


class Stage:
    """Progress of one stage: `total` in any unit; `detail` gives a few words more."""

    def __init__(self, progress: Progress, name: str, total: int, detail: Callable[[], str]) -> None:
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

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        seconds = self._progress.seconds[self._name] = time.monotonic() - self._started
        if kind is None and self._bars is None:
            self._progress.say(f"{self._name} {seconds:.1f} s {self._detail()}")
        elif kind is None:
            self._bars.update(self._task, completed=self._total, detail=self._detail())
