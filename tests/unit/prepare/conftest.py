"""Fixtures of several tests of `prepare`."""

from pathlib import Path

import pytest

from tests.support.preparing import texts, write


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "texts.jsonl", texts(200))
