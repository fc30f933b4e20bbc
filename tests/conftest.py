"""Fixtures that many rooms share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.corpora import prepare_small_corpus


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus that `llmtrain prepare` made."""
    return prepare_small_corpus(tmp_path_factory.mktemp("corpus"))
