"""`llmtrain report RUN… output=FILE.html`: one page about runs that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain import files
from llmtrain.config import decode, require
from llmtrain.errors import Problem
from llmtrain.files import expand_home
from llmtrain.output import check_new_output, write_output
from llmtrain.report.record import read_run
from llmtrain.standard_streams import print_note


@dataclass(frozen=True)
class ReportConfig:
    runs: tuple[Path, ...]
    """Run folders."""
    output: Path
    """An .html file."""
    overwrite: bool = False
    """Replace a file."""

    def problems(self) -> Iterator[Problem]:
        yield from require(len(self.runs) > 0, "runs", "none", "one run folder or more")
        named = self.output.suffix in (".html", ".htm")
        yield from require(named, "output", str(self.output), "a name with .html")


def run(mapping: Mapping[str, Any]) -> None:
    """Write the page. Raise UserError for whatever a user can fix."""
    config = decode(ReportConfig, mapping)
    output = expand_home(config.output)
    check_new_output(output, config.overwrite)
    records = [read_run(expand_home(path)) for path in config.runs]

    from llmtrain.report.page import page_of

    content = page_of(records)
    write_output(output, lambda path: files.write_atomically(path, content))
    print_note(f"wrote {output}, about {len(records)} run{'s' if len(records) > 1 else ''}")
