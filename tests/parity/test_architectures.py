"""Every architecture and variant against transformers, and in and out bit for bit; see architectures.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity.architectures import (
    ARCHITECTURES,
    TOLERANCE,
    Architecture,
    changed_tensors,
    differences,
)

pytestmark = pytest.mark.slow
EACH = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.name)


@EACH
def test_logits_are_theirs(architecture: Architecture, tmp_path: Path) -> None:
    found = differences(architecture, tmp_path)
    assert max(found.values()) <= TOLERANCE, found


@EACH
def test_in_and_out_changes_no_bit(architecture: Architecture, tmp_path: Path) -> None:
    assert changed_tensors(architecture, tmp_path / "single", 10**9) == []
    assert changed_tensors(architecture, tmp_path / "sharded", 20_000) == []
    assert len(list((tmp_path / "sharded" / "theirs").glob("*.safetensors"))) > 1
    assert len(list((tmp_path / "sharded" / "ours").glob("*.safetensors"))) > 1
