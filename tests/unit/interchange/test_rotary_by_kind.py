"""Rotary sections of Gemma 3 and OLMo 3, whose layers with a window turn otherwise than those without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmtrain.errors import CheckpointError
from llmtrain.models.huggingface.form import Settings
from llmtrain.models.huggingface.keys import Asked
from llmtrain.models.huggingface.rotary_by_kind import read_rope_by_kind

LINEAR = {"rope_theta": 1e6, "factor": 8.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def read(content: Any) -> dict[str, Any]:
    windows = {"sliding_window": 5}
    settings = Settings(Path("config.json"), content)
    return read_rope_by_kind(settings, windows, theta=1e6, local_theta=1e4, longest=128)


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_what_layers_with_a_window_cannot_have(key: str) -> None:
    local = LINEAR | {key: "linear"}
    with pytest.raises(CheckpointError, match=rf"sliding_attention\.{key}: got 'linear'; allowed: default"):
        read({"rope_parameters": {"sliding_attention": local}})


def test_a_share_of_a_head_in_layers_with_a_window() -> None:
    with pytest.raises(CheckpointError, match=r"sliding_attention\.partial_rotary_factor: got 0\.5"):
        read({"rope_parameters": {"sliding_attention": {"partial_rotary_factor": 0.5}}})


def test_an_older_name_on_which_releases_differ() -> None:
    """transformers 4 scaled by it, 5 leaves it out, unless its section is there too."""
    scaling = {"type": "linear", "factor": 8.0}
    with pytest.raises(CheckpointError, match=r"rope_scaling\.type: got 'linear'.* set rope_type"):
        read({"rope_scaling": scaling})
    named = read({"rope_scaling": {"rope_type": "linear", "factor": 8.0}})
    assert named["rope_scaling"] == {"kind": "linear", "factor": 8.0}
    assert (
        read({"rope_scaling": scaling, "rope_parameters": {"full_attention": {"rope_theta": 1e6}}}) == named
    )


def test_the_original_context_beside_the_sections_is_of_no_account() -> None:
    found = read({"rope_parameters": {"full_attention": YARN}, "original_max_position_embeddings": 64})
    assert found["rope_scaling"]["original_max_sequence_length"] == 16


def test_no_key_counts_as_asked_for_that_nobody_read() -> None:
    asked = Asked({"rope_theta": 1e6, "odd": 1})
    read(asked)
    assert asked.unasked() == {"odd": 1}
