"""Fixtures that many rooms share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.training import llmtrain


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


TEXT = """the film was a quiet story about people who never say what they mean and the actors made every
scene feel honest while music kept slow time with rain on a window somewhere near the sea"""
WORDS = TEXT.split()


def write_text(path: Path, num_documents: int = 400) -> Path:
    """A .jsonl file of small documents with some structure to learn; the same at every call."""
    import json
    import random

    source = random.Random(0)
    with path.open("w") as file:
        for number in range(num_documents):
            words = source.choices(WORDS, k=source.randint(20, 60))
            file.write(json.dumps({"text": f"{number}: " + " ".join(words) + "."}) + "\n")
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus that `llmtrain prepare` made."""
    folder = tmp_path_factory.mktemp("corpus")
    source = write_text(folder / "text.jsonl")
    output = folder / "prepared"
    done = llmtrain(
        "prepare",
        f"source={source}",
        f"output={output}",
        "tokenizer.vocab_size=320",
        "split.validation=0.1",
        "split.test=0.05",
        "workers=1",
    )
    assert done.returncode == 0, done.stderr
    return output
