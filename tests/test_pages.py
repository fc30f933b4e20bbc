"""Pages lead somewhere: every relative link and every heading that one names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.pages import PAGES
from tests.support.training import REPOSITORY

BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
LONGEST_README = 300


def prose(path: Path) -> str:
    """A page without its blocks of commands, whose comments look like headings."""
    return BLOCK.sub("", path.read_text())


def anchors(path: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = [re.sub(r"[^\w\s-]", "", heading.lower()) for heading in HEADING.findall(prose(path))]
    return {heading.strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str):
    path = REPOSITORY / page
    broken = []
    for link in LINK.findall(prose(path)):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, heading = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        is_there = target.is_relative_to(REPOSITORY) and target.exists()
        if not is_there or (heading and heading not in anchors(target)):
            broken.append(link)
    assert not broken


def test_the_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) < LONGEST_README


def test_the_map_of_rooms_is_complete():
    package = REPOSITORY / "llmtrain"
    rows = re.findall(r"^\| (`[^|]*) \|", (package / "README.md").read_text(), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)", row)}
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    assert folders <= named
    assert named <= folders | {path.stem for path in package.glob("*.py")}


def test_every_page_is_linked():
    """From the README, or from a page that it leads to."""
    found: set[Path] = set()
    waiting = [REPOSITORY / "README.md"]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        links = [(path.parent / link.partition("#")[0]).resolve() for link in LINK.findall(prose(path))]
        waiting += [link / "README.md" if link.is_dir() else link for link in links]
        waiting = [link for link in waiting if link.suffix == ".md" and link.exists()]
    assert {REPOSITORY / page for page in PAGES} <= found
