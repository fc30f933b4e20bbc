"""Settings of folders that are of other types or sizes than their keys have: one line, before anything is
made of them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmtrain.errors import CheckpointError
from llmtrain.interchange.huggingface import export_folder, import_folder
from llmtrain.interchange.trained import listed, unknown_note
from llmtrain.models.bert.config import BertConfig
from llmtrain.models.encoder_decoder.config import Seq2SeqConfig
from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.skeleton import skeleton_of
from llmtrain.models.xlnet.config import XLNetConfig

TRILLION = 10**12
GPT2 = GPTConfig(vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, max_sequence_length=16)
LLAMA = replace(
    GPT2,
    positions="rope",
    norm="rmsnorm",
    gated_mlp=True,
    activation="silu",
    bias=False,
    tie_embeddings=False,
    num_kv_heads=1,
)
BERT = BertConfig(vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, max_sequence_length=16)
XLNET = XLNetConfig(vocab_size=64, hidden_size=16, num_layers=2, num_heads=2)
SEQ2SEQ = Seq2SeqConfig(vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, label_smoothing=0.0)
T5 = replace(
    SEQ2SEQ,
    norm="rmsnorm",
    norm_first=True,
    positions="relative",
    scale_embedding=False,
    scale_attention=False,
    scale_logits=True,
    bias=False,
    start_id=0,
    eos_id=1,
)
BART = replace(
    SEQ2SEQ,
    positions="learned",
    position_offset=2,
    embedding_norm=True,
    activation="gelu",
    norm_eps=1e-5,
    scale_embedding=False,
    max_sequence_length=16,
    start_id=2,
    eos_id=2,
    init_std=0.02,
)
FORMS = {"gpt2": GPT2, "llama": LLAMA, "bert": BERT, "xlnet": XLNET, "t5": T5, "bart": BART}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    for name, config in FORMS.items():
        module: nn.Module = skeleton_of(config)
        tensors = {key: torch.full(p.shape, 0.01) for key, p in module.named_parameters()}
        export_folder(config, tensors, None, root / name)
    return {name: root / name for name in FORMS}


def changed(source: Path, folder: Path, **keys: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").symlink_to(source / "model.safetensors")
    content = json.loads((source / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def refusal(folder: Path) -> str:
    started = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        import_folder(folder)
    assert time.process_time() - started < 2
    (first, *_) = lines = str(caught.value).split("\n")
    assert all(str(folder) in line and line.isprintable() and len(line) < 2000 for line in lines)
    return first


SIZES = {
    "gpt2": ("vocab_size", "n_positions", "n_embd", "n_inner"),
    "llama": ("vocab_size", "hidden_size", "intermediate_size", "head_dim"),
    "bert": ("vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size", "type_vocab_size"),
    "xlnet": ("vocab_size", "d_inner"),
    "t5": ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "relative_attention_num_buckets"),
    "bart": ("vocab_size", "d_model", "max_position_embeddings"),
}
LAYERS = {
    "gpt2": ("n_layer",),
    "llama": ("num_hidden_layers",),
    "bert": ("num_hidden_layers",),
    "xlnet": ("n_layer",),
    "t5": ("num_layers", "num_decoder_layers"),
    "bart": ("encoder_layers", "decoder_layers"),
}


@pytest.mark.parametrize("value", [TRILLION, 10**18, 1e18])
@pytest.mark.parametrize(("form", "key"), [(form, key) for form, keys in SIZES.items() for key in keys])
def test_sizes_far_beyond_what_is_stored(
    form: str, key: str, value: float, folders: dict[str, Path], tmp_path: Path
):
    assert "got" in refusal(changed(folders[form], tmp_path / "x", **{key: value}))


@pytest.mark.parametrize("value", [10**9, 0, -1, 2**64, 1e300, True, "2", [2], float("nan")])
@pytest.mark.parametrize(("form", "key"), [(form, key) for form, keys in LAYERS.items() for key in keys])
def test_numbers_of_layers(form: str, key: str, value: Any, folders: dict[str, Path], tmp_path: Path):
    assert f"config.json: {key}: got " in refusal(changed(folders[form], tmp_path / "x", **{key: value}))


@pytest.mark.parametrize("value", [0, -1, 10**9])
@pytest.mark.parametrize("key", ["num_attention_heads", "num_key_value_heads"])
def test_numbers_of_heads(key: str, value: int, folders: dict[str, Path], tmp_path: Path):
    keys = {key: value, "head_dim": 8}
    assert "got" in refusal(changed(folders["llama"], tmp_path / "x", **keys))


def test_a_size_that_is_told_before_the_shapes(folders: dict[str, Path], tmp_path: Path):
    message = refusal(changed(folders["llama"], tmp_path / "x", vocab_size=TRILLION))
    assert "got sizes of 32,000,0" in message
    assert "allowed: those of its tensors, which hold 9,808 numbers" in message


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "x" * 10**6}, "model_type: got 'xxx"),
        ({"model_type": {"a": 1}}, "model_type: got {'a': 1}"),
        ({"rope_theta": 10**400, "rope_parameters": None}, "rope_theta: got a whole number of 1,329 bits"),
        ({"rms_norm_eps": "\x1b[31m"}, "rms_norm_eps: got"),
        ({"rope_scaling": []}, "rope_scaling: got []; allowed: a section of keys"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 1e308}},
            "factor: got 1e+308; allowed: so much that positions are whole numbers below 2^63",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": -99.0}},
            "mscale_all_dim: got -99.0; allowed: more than 0",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": "no"}}, "truncate: got 'no'"),
        ({"layer_types": [{}]}, "layer_types: got [{}]"),
        ({"layer_types": 7}, "layer_types: got 7"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 10**5}, "layer_types: got"),
        ({"model_type": "smollm3", "no_rope_layers": [{}, "x"]}, "no_rope_layers: got [{}, 'x']"),
        ({"eos_token_id": "2"}, "eos_token_id: got '2'; allowed: an id, or a list of them"),
        ({"eos_token_id": [2**40]}, "eos_token_id: got [1099511627776]"),
    ],
)
def test_values_of_other_types(keys: dict[str, Any], message: str, folders: dict[str, Path], tmp_path: Path):
    assert message in refusal(changed(folders["llama"], tmp_path / "x", **keys))


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("num_beams", 10**9, "1 to 1,024"),
        ("num_beams", 0, "1 to 1,024"),
        ("max_new_tokens", 10**18, "0 to 1,048,576"),
        ("min_new_tokens", -1, "0 to 1,048,576"),
        ("top_k", -1, "0 to 9,223,372,036,854,775,807"),
        ("top_p", 2, "0 to 1"),
        ("temperature", -1.0, "0 or more"),
        ("temperature", 10**400, "a number"),
        ("repetition_penalty", 0.0, "1e-06 or more"),
        ("early_stopping", "no", "True, False, never"),
        ("do_sample", 1, "true or false"),
        ("eos_token_id", [[1]], "an id, or a list of them"),
        ("max_length", float("inf"), "a whole number"),
    ],
)
def test_generation_settings(key: str, value: Any, allowed: str, folders: dict[str, Path], tmp_path: Path):
    folder = changed(folders["llama"], tmp_path / "x")
    (folder / "generation_config.json").write_text(json.dumps({key: value}))
    assert f"generation_config.json: {key}: got" in (message := refusal(folder))
    assert f"allowed: {allowed}" in message


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("kind", [pipe, device, folder])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_what_is_no_file(kind: Callable[[Path], None], name: str, folders: dict[str, Path], tmp_path: Path):
    source = changed(folders["llama"], tmp_path / "x")
    (source / name).unlink(missing_ok=True)
    kind(source / name)
    assert f"{name}: got a {kind.__name__}, not a file" in refusal(source)


def test_a_file_of_eight_gigabytes(folders: dict[str, Path], tmp_path: Path):
    source = changed(folders["llama"], tmp_path / "x")
    with open(source / "config.json", "wb") as file:
        file.truncate(8 << 30)
    assert "config.json: got a file of 8,589,934,592 bytes, more than 16,777,216" in refusal(source)


def test_a_name_of_any_length_in_the_weights(folders: dict[str, Path], tmp_path: Path):
    """The likest names of ours are looked for, which takes the square of its length."""
    from safetensors.torch import load_file, save_file

    source = changed(folders["llama"], tmp_path / "x")
    tensors = load_file(source / "model.safetensors") | {"a\x1b[1m" + "x" * 10**6: torch.zeros(1)}
    (source / "model.safetensors").unlink()
    save_file(tensors, source / "model.safetensors")
    assert r"got an unknown tensor a\x1b[1mxxx" in refusal(source)


def test_notes_show_names_of_others_without_steering_the_terminal():
    note = unknown_note(("a\x1b[31m\nb", "x" * 10**6, *map(str, range(50))))
    assert note.isprintable()
    assert len(note) < 500
    assert listed(["a", "b"]) == "a, b"
