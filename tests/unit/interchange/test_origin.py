"""What a folder said goes out again, unless training made it untrue."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.errors import CheckpointError
from llmtrain.families import family_of
from llmtrain.interchange.huggingface import export_folder, import_folder
from llmtrain.models.encoder_decoder.config import Seq2SeqConfig
from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.xlnet.config import XLNetConfig
from llmtrain.nn.initialize import initialize

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "dropout": 0.1}
BART = Seq2SeqConfig(
    **SIZES,
    activation="gelu",
    embedding_norm=True,
    position_offset=2,
    positions="learned",
    max_sequence_length=32,
    norm_eps=1e-5,
    scale_embedding=False,
    start_id=2,
    eos_id=2,
)
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "bart": (BART, {"forced_eos_token_id": None, "attention_dropout": 0.0, "activation_dropout": 0.2}),
    "bart, another id": (BART, {"forced_eos_token_id": 7, "pad_token_id": 1, "bos_token_id": 0}),
    "xlnet": (XLNetConfig(**SIZES), {"mem_len": 16, "reuse_len": 4, "summary_type": "first"}),
    "gpt2": (GPTConfig(**SIZES), {"n_inner": None, "attn_pdrop": 0.0, "summary_type": "cls_index"}),
}


def weights(config: Any) -> dict[str, Tensor]:
    model = family_of(config).build(config)
    initialize(model, seed=0)
    return {name: p.detach() for name, p in model.named_parameters()}


def settings(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


@pytest.fixture(params=list(CASES))
def theirs(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    config, changes = CASES[request.param]
    export_folder(config, weights(config), None, tmp_path / "theirs")
    written = (
        settings(tmp_path / "theirs") | changes | {"transformers_version": "4.0", "torch_dtype": "float32"}
    )
    written.pop("n_inner", None)  # as GPT-2's own folders, which leave it out or have null
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(written))
    return tmp_path / "theirs"


def test_what_was_not_changed_stays_as_it_was(theirs: Path, tmp_path: Path) -> None:
    imported = import_folder(theirs)
    export_folder(imported.config, imported.weights, None, tmp_path / "ours", origin=imported.origin)
    expected = settings(theirs)
    del expected["transformers_version"], expected["torch_dtype"]
    assert settings(tmp_path / "ours") == expected


def test_what_was_changed_is_said_anew(theirs: Path, tmp_path: Path) -> None:
    imported = import_folder(theirs)
    config = replace(imported.config, vocab_size=48, dropout=0.3)
    export_folder(
        config, weights(config), None, tmp_path / "ours", origin=imported.origin, dtype=torch.bfloat16
    )
    expected, found = settings(theirs), settings(tmp_path / "ours")
    export_folder(config, weights(config), None, tmp_path / "plain", dtype=torch.bfloat16)
    plain = settings(tmp_path / "plain")
    changed = {key for key, value in found.items() if expected[key] != value}
    assert changed >= {"vocab_size", "dtype"}
    assert any("drop" in key for key in changed)
    assert all(found[key] == plain[key] for key in changed)


SAID = {"eos_token_id": [3, 5], "pad_token_id": 5, "temperature": 0.6, "top_p": 0.9, "do_sample": True}


def test_how_the_model_is_to_write_goes_out_again(theirs: Path, tmp_path: Path) -> None:
    said = SAID | {"transformers_version": "4.44", "max_length": 99, "odd": "kept"}
    (theirs / "generation_config.json").write_text(json.dumps(said))
    imported = import_folder(theirs)
    for end_id, ends in ((None, [3, 5]), (5, [3, 5]), (7, [3, 5, 7])):
        export_folder(
            imported.config, imported.weights, None, tmp_path / "ours", origin=imported.origin, end_id=end_id
        )
        found = json.loads((tmp_path / "ours" / "generation_config.json").read_text())
        kept = {key: value for key, value in said.items() if key != "transformers_version"}
        assert {key: found[key] for key in kept} == kept | {"eos_token_id": ends}
    assert import_folder(tmp_path / "ours").origin.generation["eos_token_id"] == [3, 5, 7]  # type: ignore[union-attr]


def test_ids_of_a_folder_without_generation_settings(theirs: Path, tmp_path: Path) -> None:
    """They are those of its config.json, also where that has a list."""
    (theirs / "generation_config.json").unlink()
    content = settings(theirs) | {"eos_token_id": [2, 4]}
    (theirs / "config.json").write_text(json.dumps(content))
    imported = import_folder(theirs)
    assert imported.origin is not None
    assert imported.origin.generation["eos_token_id"] == [2, 4]
    export_folder(imported.config, imported.weights, None, tmp_path / "ours", origin=imported.origin)
    found = json.loads((tmp_path / "ours" / "generation_config.json").read_text())
    assert settings(tmp_path / "ours")["eos_token_id"] == found["eos_token_id"] == [2, 4]


def test_how_to_write_where_config_json_says_it(theirs: Path) -> None:
    """As in folders before generation_config.json; where that is, it alone counts."""
    said = {
        "num_beams": 4,
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "max_length": 20,
        "min_p": 0.1,
    }
    before = import_folder(theirs)
    (theirs / "config.json").write_text(json.dumps(settings(theirs) | said | {"top_k": None}))
    assert import_folder(theirs).origin.generation == before.origin.generation  # type: ignore[union-attr]
    (theirs / "generation_config.json").unlink()
    imported = import_folder(theirs)
    assert imported.unknown == ()
    found = imported.origin.generation  # type: ignore[union-attr]
    assert {key: value for key, value in found.items() if not key.endswith("_token_id")} == said


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            {"eos_token_id": "</s>"},
            "generation_config.json: eos_token_id: got '</s>'; allowed: an id",
        ),
        ({"eos_token_id": [1, None]}, "eos_token_id: got"),
        ({"temperature": "warm"}, "temperature: got 'warm'; allowed: a number"),
        ({"top_k": 0.5}, "top_k: got 0.5; allowed: a whole number"),
    ],
)
def test_settings_that_are_none(said: dict[str, Any], message: str, tmp_path: Path) -> None:
    config, _ = CASES["gpt2"]
    export_folder(config, weights(config), None, tmp_path / "theirs")
    (tmp_path / "theirs" / "generation_config.json").write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=message):
        import_folder(tmp_path / "theirs")


def test_another_form_has_nothing_of_it(tmp_path: Path) -> None:
    config, _ = CASES["gpt2"]
    export_folder(config, weights(config), None, tmp_path / "theirs")
    origin = import_folder(tmp_path / "theirs").origin
    llama = replace(config, positions="rope", norm="rmsnorm", gated_mlp=True, bias=False)
    for name, given in (("with", origin), ("without", None)):
        export_folder(llama, weights(llama), None, tmp_path / name, origin=given)
    assert settings(tmp_path / "with") == settings(tmp_path / "without")
