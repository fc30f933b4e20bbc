"""`llmtrain prepare`: raw text → tokenizer and sharded corpus."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtrain.config import decode
from llmtrain.data.config import PrepareConfig
from llmtrain.data.prepare import prepare


def run(mapping: Mapping[str, Any]) -> None:
    """Raises UserError for whatever a user can mend."""
    prepare(decode(PrepareConfig, mapping))
