"""Fixtures of several tests of corpora from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtrain.prepare.config import PrepareConfig, SplitConfig
from llmtrain.prepare.job import prepare
from llmtrain.tokenizers.config import TokenizerConfig
from tests.support.corpora import write_text
from tests.support.servers import FileServer


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 17 shards of training text."""
    folder = tmp_path_factory.mktemp("remote")
    prepare(
        PrepareConfig(
            source=(str(write_text(folder / "text.jsonl")),),
            output=folder / "corpus",
            tokenizer=TokenizerConfig(vocab_size=320),
            split=SplitConfig(validation=0.1, test=0.05),
            sample_tokens=500,
            tar_bytes=8000,
            workers=1,
        )
    )
    return folder / "corpus"


@pytest.fixture
def served(prepared: Path) -> Iterator[FileServer]:
    with FileServer(prepared.parent) as server:
        yield server
