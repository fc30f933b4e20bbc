"""Export of Hugging Face folders, and their import, without transformers: tests/parity compares with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llmtrain.errors import CheckpointError, ConfigError, DataError
from llmtrain.interchange.huggingface import export_folder, import_folder
from llmtrain.models.gpt.config import GPTConfig
from llmtrain.tokenizers.config import TokenizerConfig
from llmtrain.tokenizers.sentencepiece import train
from tests.support.huggingface import FORMS, GPT2, LLAMA, weights

BY_FORM = pytest.mark.parametrize("config", FORMS.values(), ids=FORMS.keys())


@BY_FORM
def test_import_of_export_is_bitwise_equal(config: GPTConfig, tmp_path: Path) -> None:
    tensors = weights(config)
    export_folder(config, tensors, None, tmp_path / "out")
    back = import_folder(tmp_path / "out")
    assert back.config == config
    assert (back.fresh, back.left_out) == ((), ())
    tensors_back = back.weights
    assert tensors_back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensors_back[name], tensor), name


@BY_FORM
def test_shards_hold_the_same(config: GPTConfig, tmp_path: Path) -> None:
    tensors = weights(config)
    export_folder(config, tensors, None, tmp_path / "out", file_bytes=30_000)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert {name for shard in shards for name in load_file(shard)} == index["weight_map"].keys()
    stored = sum(t.numel() * 4 for shard in shards for t in load_file(shard).values())
    assert index["metadata"]["total_size"] == stored
    back = import_folder(tmp_path / "out").weights
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_dtype(tmp_path: Path) -> None:
    tensors = weights(GPT2)
    export_folder(GPT2, tensors, None, tmp_path / "out", dtype=torch.bfloat16)
    back = import_folder(tmp_path / "out").weights
    assert all(torch.equal(back[name], tensors[name].bfloat16()) for name in tensors)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"norm": "layernorm"}, "norm=layernorm"),
        ({"gated_mlp": False}, "gated_mlp=False"),
        ({"positions": "learned", "norm": "layernorm"}, "positions=learned, norm=layernorm"),
    ],
)
def test_forms_that_transformers_has_not(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    config = replace(LLAMA, **changes)
    with pytest.raises(ConfigError) as error:
        export_folder(config, weights(config), None, tmp_path / "out")
    assert len(str(error.value).splitlines()) == 1
    for key in named.split(", "):
        assert key in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("norm.bias"), "no tensor norm.bias"),
        (lambda t: t.update(nrom=torch.zeros(1)), "an unknown tensor nrom"),
        (lambda t: t.update({"norm.bias": torch.zeros(3)}), r"norm\.bias: got shape \(3,\)"),
    ],
)
def test_tensors_that_do_not_fit(
    damage: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path
) -> None:
    tensors = weights(GPT2)
    damage(tensors)
    with pytest.raises(CheckpointError, match=message):
        export_folder(GPT2, tensors, None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_may_be_replaced(tmp_path: Path) -> None:
    output, tensors = tmp_path / "out", weights(GPT2)
    output.mkdir()
    export_folder(GPT2, tensors, None, output)
    export_folder(LLAMA, weights(LLAMA), None, output)
    assert import_folder(output).config == LLAMA

    (output / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError, match=r"another model's folder.*overwrite=true"):
        export_folder(GPT2, tensors, None, output)
    export_folder(GPT2, tensors, None, output, overwrite=True)
    assert import_folder(output).config == GPT2

    (output / "config.json").unlink()
    with pytest.raises(CheckpointError, match="no model's folder"):
        export_folder(GPT2, tensors, None, output, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_unwritable_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is not writable"):
        export_folder(GPT2, weights(GPT2), None, tmp_path / "file" / "out")


def test_tokenizer_travels_along(tmp_path: Path) -> None:
    text = "the quick brown fox jumps over the lazy dog, again and again and again. "
    model = train([text * 20, text.upper() * 5], TokenizerConfig(vocab_size=319))
    (tmp_path / "spm.model").write_bytes(model)
    export_folder(GPT2, weights(GPT2), tmp_path / "spm.model", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == model
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)

    small = replace(GPT2, vocab_size=300)
    with pytest.raises(DataError, match="319 ids; allowed: at most the model's vocab_size of 300"):
        export_folder(small, weights(small), tmp_path / "spm.model", tmp_path / "out2")
    with pytest.raises(DataError, match="No such file"):
        export_folder(GPT2, weights(GPT2), tmp_path / "none.model", tmp_path / "out2")
    assert not (tmp_path / "out2").exists()
