"""Import of Hugging Face folders of others: older spellings, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmtrain.config import decode
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.interchange import forms
from llmtrain.interchange.huggingface import export_folder, import_folder
from llmtrain.models.bert.config import BertConfig
from llmtrain.models.bert.model import Bert
from llmtrain.models.encoder_decoder.config import Seq2SeqConfig
from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.huggingface.form import Settings
from tests.support.huggingface import FORMS, GPT2, LLAMA, weights

T5 = Seq2SeqConfig(
    vocab_size=320,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    norm="rmsnorm",
    norm_first=True,
    positions="relative",
    scale_embedding=False,
    scale_attention=False,
    scale_logits=True,
    bias=False,
    activation="relu",
    label_smoothing=0.0,
    start_id=0,
    eos_id=1,
)


@pytest.mark.parametrize(
    ("config", "embedding", "copy"),
    [
        (GPT2, "transformer.wte.weight", "lm_head.weight"),
        (T5, "shared.weight", "decoder.embed_tokens.weight"),
        (T5, "shared.weight", "lm_head.weight"),
    ],
)
def test_a_tied_weight_under_one_name_alone(config: Any, embedding: str, copy: str, tmp_path: Path) -> None:
    """Tools that save a shared tensor once choose its name."""
    tensors = weights(config)
    export_folder(config, tensors, None, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    stored[copy] = stored.pop(embedding)
    save_file(stored, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(
        import_folder(tmp_path / "out").weights["embedding.weight"], tensors["embedding.weight"]
    )


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))

    return edit


def edit_weights(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index(weight_map: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit_config(model_type="opt"), "model_type: got 'opt'; allowed: gpt2, llama, mistral, ministral"),
        (edit_config(model_type=["a"]), "model_type: got"),
        (edit_config(hidden_act="mish"), "hidden_act: got 'mish'"),
        (edit_config(mlp_bias=True), r"no tensor model\.layers\.0\.mlp\.down_proj\.bias"),
        (
            edit_config(rope_scaling={"rope_type": "proportional"}),
            "rope_type: got 'proportional'; allowed: default, linear, dynamic, yarn, llama3, longrope",
        ),
        (edit_config(rope_scaling={"type": "mrope"}), "rope_scaling.type: got 'mrope'"),
        (
            edit_config(rope_parameters={"full_attention": {"rope_type": "default"}}),
            "rope_parameters.full_attention: got {'rope_type': 'default'}; allowed: .*the same in all layers",
        ),
        (edit_config(rope_scaling={"type": "yarn"}), "no key 'rope_scaling.factor'"),
        (
            edit_config(rope_scaling={"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}),
            "short_factors: got '1 numbers, the least 1.0'; allowed: 4 numbers above 0",
        ),
        (
            edit_config(rope_scaling={"type": "longrope"}),
            "no key 'rope_scaling.short_factor'",
        ),
        (edit_config(rope_parameters={"rope_type": "linear"}), "no key 'rope_parameters.factor'"),
        (edit_config(rope_parameters={"rope_type": "linear", "factor": 0}), "factor: got 0"),
        (edit_config(partial_rotary_factor=0.5), "partial_rotary_factor: got 0.5; allowed: 1"),
        (edit_config(quantization_config={"quant_method": "gptq"}), "quantization_config: got"),
        (edit_config(model_type="qwen3", attention_bias=True), "no tensor model"),
        *[
            (
                edit_config(model_type="qwen2", use_sliding_window=True, layer_types=kinds),
                r"layer_types: got .*; allowed: 2 times full_attention or sliding_attention",
            )
            for kinds in (["full_attention"], ["full_attention", "chunked_attention"], "full_attention")
        ],
        (
            edit_config(model_type="gemma2", use_bidirectional_attention=True),
            "use_bidirectional_attention: got True",
        ),
        (
            edit_config(model_type="gemma3_text", rope_parameters={"rope_theta": 1e4}),
            "rope_parameters.rope_theta: got 10000.0; allowed: full_attention and sliding_attention",
        ),
        (
            edit_config(
                model_type="gemma3_text",
                rope_parameters={"sliding_attention": {"rope_type": "linear", "factor": 2.0}},
            ),
            "sliding_attention.rope_type: got 'linear'; allowed: default",
        ),
        *[
            (
                edit_config(model_type=name, layer_types=["sliding_attention"] * 2, sliding_window=window),
                r"layer_types: got .*; allowed: full_attention alone, where no window is said",
            )
            for name, window in (("mistral", None), ("qwen2", 4), ("smollm3", 4))
        ],
        (edit_config(layer_types=["sliding_attention"] * 2), "full_attention alone: llama has no other"),
        (edit_config(sliding_window=4), "sliding_window: got 4; allowed: nothing"),
        (edit_config(is_causal=False), "is_causal: got False; allowed: True"),
        (edit_config(per_layer_config={"0": {"head_dim": 4}}), "per_layer_config: got"),
        (edit_config(model_type="mistral", num_hidden_layers=10**9), "num_hidden_layers: got 1000000000"),
        (edit_config(model_type="smollm3", no_rope_layers=[1]), "no_rope_layers: got"),
        (edit_config(hidden_size=1e400), "invalid JSON|hidden_size"),
        (edit_config(intermediate_size=-3), "mlp_hidden_size: got -3"),
        (edit_config(head_dim=0.5), "head_dim: got 0.5; allowed: a whole number"),
        (edit_config(hidden_size=...), "no key 'hidden_size'"),
        (edit_config(vocab_size="many"), "vocab_size: got 'many'; allowed: a whole number"),
        (edit_config(num_attention_heads=5), "num_kv_heads"),
        (edit_config(vocab_size=321), r"embed_tokens\.weight: got shape \(320, 32\)"),
        (edit_config(num_hidden_layers=3), r"no tensor model\.layers\.2\.\S+ and 8 more"),
        *[
            (
                edit_config(model_type=name, **{key: 10**9}),
                rf"{key}: got 1000000000; allowed: no more than its",
            )
            for name, key in (
                *((name, "num_hidden_layers") for name in ("llama", "gemma3_text", "olmo2", "phi3", "bert")),
                *((name, "n_layer") for name in ("gpt2", "xlnet")),
                *(("t5", key) for key in ("num_layers", "num_decoder_layers")),
                *(("bart", key) for key in ("encoder_layers", "decoder_layers")),
            )
        ],
        (edit_weights(lambda t: t.pop("model.norm.weight")), r"no tensor model\.norm\.weight"),
        (edit_weights(lambda t: t.update(odd=torch.zeros(1))), "an unknown tensor odd"),
        (truncate, "damaged file"),
        (pickle_only, "pickled weights only"),
        (index({"x": "../../x.safetensors"}), "bare file name"),
        (index({"x": "gone.safetensors"}), r"gone\.safetensors: got no such file"),
        (index([1]), r"weight_map: got \[1\]; allowed: tensor name"),
        (
            edit_weights(lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})),
            r"model\.norm\.weight: got numbers of type I8; allowed: F64, F32, F16, BF16",
        ),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "nested too deeply"),
        (lambda f: (f / "config.json").write_text("{"), "invalid JSON"),
        (lambda f: (f / "config.json").unlink(), r"config\.json: got No such file"),
    ],
)
def test_folders_that_cannot_be_imported(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    export_folder(LLAMA, weights(LLAMA), None, tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(CheckpointError, match=message):
        import_folder(tmp_path / "out")


@pytest.mark.parametrize(
    ("model_type", "keys", "window", "full"),
    [
        ("mistral", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}, 4, (1,)),
        ("mistral", {"layer_types": ["full_attention"] * 2, "sliding_window": 4}, None, ()),
        ("mistral", {"layer_types": None, "sliding_window": 4}, 4, ()),
        ("mistral", {"sliding_window": None}, None, ()),
        ("mistral", {}, 4096, ()),
        ("qwen2", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, None, ()),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, 4, (0,)),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, 4096, ()),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4}, None, ()),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 0}, None, ()),
        ("qwen2", {"sliding_window": 4, "layer_types": ["full_attention"] * 2}, None, ()),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 4, "no_rope_layers": [1, 0]}, 4, (0,)),
    ],
)
def test_layers_with_a_window(
    model_type: str, keys: dict[str, Any], window: int | None, full: tuple[int, ...]
) -> None:
    """As transformers' AutoConfig reads the same keys."""
    content = {"vocab_size": 9, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 40, **keys}
    content["num_hidden_layers"] = 2
    form = forms.forms()[model_type]
    config = decode(GPTConfig, form.read_config(Settings(Path("config.json"), content)))
    assert (config.sliding_window, config.full_attention_layers) == (window, full)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma", "gemma2", "gemma3_text"])
def test_a_model_without_heads(model_type: str) -> None:
    sizes = {"vocab_size": 9, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1}
    content = {**sizes, "num_attention_heads": 0, "head_dim": 32}
    form = forms.forms()[model_type]
    with pytest.raises(ConfigError, match="num_heads: got 0; allowed: 1 or more"):
        decode(GPTConfig, form.read_config(Settings(Path("config.json"), content)))


def test_keys_that_nobody_knows_are_named(tmp_path: Path) -> None:
    export_folder(LLAMA, weights(LLAMA), None, tmp_path / "out")
    assert import_folder(tmp_path / "out").unknown == ()
    keys = {"logit_scale": 0.1, "auto_map": {"AutoConfig": "x.X"}, "use_qk_norm": False, "alibi": None}
    edit_config(**keys, use_cache=True, bos_token_id=7, hidden_dropout=0.1)(tmp_path / "out")
    assert import_folder(tmp_path / "out").unknown == ("logit_scale", "auto_map")


def test_spellings_of_older_folders(tmp_path: Path) -> None:
    """GPT-2's own folder has bare names, buffers and a tied head's copy; Llama's had rope_theta on top."""
    tensors = weights(GPT2)
    export_folder(GPT2, tensors, None, tmp_path / "gpt2")

    def older(stored: dict[str, Tensor]) -> None:
        for name in list(stored):
            stored[name.removeprefix("transformer.")] = stored.pop(name)
        stored["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
        stored["lm_head.weight"] = stored["wte.weight"].clone()

    edit_weights(older)(tmp_path / "gpt2")
    back = import_folder(tmp_path / "gpt2").weights
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)

    export_folder(FORMS["llama-3.1"], weights(FORMS["llama-3.1"]), None, tmp_path / "llama")
    edit_config(rope_parameters=...)(tmp_path / "llama")
    assert import_folder(tmp_path / "llama").config == FORMS["llama-3.1"]


def test_a_tied_head_that_is_stored_and_differs_is_its_own(tmp_path: Path) -> None:
    """As transformers takes it."""
    export_folder(GPT2, weights(GPT2), None, tmp_path / "out")
    head = torch.randn(320, 32)
    edit_weights(lambda t: t.update({"lm_head.weight": head}))(tmp_path / "out")
    back = import_folder(tmp_path / "out")
    assert not back.config.tie_embeddings
    assert torch.equal(back.weights["head.weight"], head)


def test_spellings_of_older_encoders(tmp_path: Path) -> None:
    """BERT's own folder calls its norms as TensorFlow did and holds copies; RoBERTa's has a pooler."""
    config = BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        mask_id=4,
        cls_id=5,
        sep_id=6,
        pair_head=False,
    )
    tensors = {key: torch.randn(p.shape) for key, p in Bert(config).named_parameters()}
    export_folder(config, tensors, None, tmp_path / "bert")

    def older(stored: dict[str, Tensor]) -> None:
        for key in list(stored):
            if ".LayerNorm." in key:
                stored[key.replace("weight", "gamma").replace("bias", "beta")] = stored.pop(key)
        decoder = "cls.predictions.decoder"
        stored[f"{decoder}.weight"] = stored["bert.embeddings.word_embeddings.weight"].clone()
        stored[f"{decoder}.bias"] = stored.pop("cls.predictions.bias")
        stored["bert.embeddings.position_ids"] = torch.arange(64)[None]

    edit_weights(older)(tmp_path / "bert")
    back = import_folder(tmp_path / "bert")
    assert (back.config, back.left_out) == (config, ())
    assert all(torch.equal(back.weights[key], tensor) for key, tensor in tensors.items())

    config = replace(config, position_offset=2, num_segments=0)
    tensors = {key: torch.randn(p.shape) for key, p in Bert(config).named_parameters()}
    export_folder(config, tensors, None, tmp_path / "roberta")
    edit_weights(lambda t: t.update({"roberta.pooler.dense.bias": torch.ones(32)}))(tmp_path / "roberta")
    back = import_folder(tmp_path / "roberta")
    assert (back.config, back.left_out) == (config, ("roberta.pooler.dense.bias",))
    assert all(torch.equal(back.weights[key], tensor) for key, tensor in tensors.items())
