"""The pages of this repository, as Markdown."""

from __future__ import annotations

import re

from tests.support.training import REPOSITORY

FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
"""A block: its language and its lines."""

FOLDERS = ("", "cluster/", "conf/", "launch/", "llmtrain/**/", "tests/**/")
PAGES = sorted(
    str(path.relative_to(REPOSITORY)) for folder in FOLDERS for path in REPOSITORY.glob(f"{folder}*.md")
)
