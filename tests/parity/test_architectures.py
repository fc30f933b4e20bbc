"""Every architecture and variant against transformers, and in and out bit for bit; see architectures.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration

from llmtrain.generation.config import GenerateConfig
from llmtrain.generation.generate import generate
from llmtrain.interchange.huggingface import export_folder, import_folder
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
IN_TURNS = pytest.mark.in_turns(2)


@IN_TURNS
@EACH
def test_logits_are_theirs(architecture: Architecture, tmp_path: Path) -> None:
    found = differences(architecture, tmp_path)
    assert max(found.values()) <= TOLERANCE, found


@IN_TURNS
@EACH
def test_in_and_out_changes_no_bit(architecture: Architecture, tmp_path: Path) -> None:
    assert changed_tensors(architecture, tmp_path / "single", 10**9) == []
    assert changed_tensors(architecture, tmp_path / "sharded", 20_000) == []
    assert len(list((tmp_path / "sharded" / "theirs").glob("*.safetensors"))) > 1
    assert len(list((tmp_path / "sharded" / "ours").glob("*.safetensors"))) > 1


@IN_TURNS
@EACH
def test_no_key_of_theirs_is_unknown(architecture: Architecture, tmp_path: Path) -> None:
    architecture.theirs().save_pretrained(tmp_path)
    assert import_folder(tmp_path).unknown == ()


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
    assert imported.unknown == ()
    export_folder(imported.config, imported.weights, None, tmp_path / "ours", origin=imported.origin)
    assert import_folder(tmp_path / "ours").config == imported.config
    again = Gemma3ForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.config.model_type == "gemma3_text"
    assert difference(again(tokens_BT).logits, expected) <= TOLERANCE


@torch.no_grad()
def test_a_mistral_whose_layers_are_told_apart(tmp_path: Path) -> None:
    """transformers' Auto classes take it for a ministral."""
    (architecture,) = (a for a in ARCHITECTURES if a.name == "ministral")
    architecture.theirs().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "model_type": "mistral"}))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert theirs.config.model_type == "ministral"
    ours = ours_from(tmp_path)
    for compare in architecture.comparisons.values():
        assert compare(ours, theirs) <= TOLERANCE


def test_writing_past_the_original_context_of_a_phi(tmp_path: Path) -> None:
    """As a text grows past it, the frequencies of all its tokens change."""
    (architecture,) = (a for a in ARCHITECTURES if a.name == "phi3, longrope")
    theirs = architecture.theirs()
    theirs.save_pretrained(tmp_path)
    ours = ours_from(tmp_path)
    for length in (5, 16, 20):
        prompts = [tokens(length, seed=seed).tolist() for seed in range(2)]
        found = generate(ours, prompts, GenerateConfig(max_new_tokens=24, temperature=0.0))
        for prompt, text in zip(prompts, found, strict=True):
            prompt_1T = torch.tensor([prompt])
            (expected,) = theirs.generate(
                prompt_1T,
                attention_mask=torch.ones_like(prompt_1T),
                max_new_tokens=24,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            assert text == expected[length:].tolist()
