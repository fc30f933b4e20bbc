"""Every architecture and variant against transformers, and in and out bit for bit; see architectures.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration

from llmtrain.checkpoint.huggingface import export_folder, import_folder
from tests.parity.architectures import (
    ARCHITECTURES,
    TOLERANCE,
    Architecture,
    T,
    V,
    changed_tensors,
    difference,
    differences,
    ours_from,
    tokens,
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


@torch.no_grad()
def test_the_text_model_of_one_that_sees_images(tmp_path: Path) -> None:
    """Gemma 3's folders of 4 billion parameters and more; what it sees by is left out, and said to be."""
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 2}
    text = {
        **settings,
        "vocab_size": V,
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    vision = {**settings, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    ids = {f"{kind}_token_index": V - 1 for kind in ("image", "boi", "eoi")}
    theirs = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **ids)
    ).eval()
    for parameter in theirs.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    imported = import_folder(tmp_path / "theirs")
    assert {name.split(".")[0] for name in imported.left_out} == {"vision_tower", "multi_modal_projector"}
    tokens_BT = tokens(3, T) - 1
    expected = theirs(input_ids=tokens_BT).logits
    assert difference(ours_from(tmp_path / "theirs")(tokens_BT), expected) <= TOLERANCE
    export_folder(imported.config, imported.weights, None, tmp_path / "ours")
    again = Gemma3ForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.config.model_type == "gemma3_text"
    assert difference(again(tokens_BT).logits, expected) <= TOLERANCE
