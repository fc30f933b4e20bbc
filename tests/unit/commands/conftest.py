"""Fixtures of several tests of verbs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmtrain.interchange.huggingface import export_folder
from llmtrain.models.gpt.model import GPT
from tests.support.huggingface import random_weights
from tests.support.imports import LLAMA


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama in bf16, in several files."""
    export_folder(
        LLAMA, random_weights(GPT(LLAMA)), None, tmp_path / "theirs", dtype=torch.bfloat16, file_bytes=20_000
    )
    return tmp_path / "theirs"
