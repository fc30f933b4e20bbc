"""Export and import of Hugging Face folders, without transformers (tests/parity compares with it)."""

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
from llmtrain.errors import CheckpointError, ConfigError, DataError
from llmtrain.interchange import forms
from llmtrain.interchange.huggingface import export_folder, import_folder
from llmtrain.models.bert.config import BertConfig
from llmtrain.models.bert.model import Bert
from llmtrain.models.encoder_decoder.config import Seq2SeqConfig
from llmtrain.models.encoder_decoder.model import EncoderDecoder
from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.gpt.model import GPT
from llmtrain.models.huggingface.form import Settings
from llmtrain.nn.initialize import initialize
from llmtrain.nn.rope_config import RopeScaling
from llmtrain.tokenizers.config import TokenizerConfig
from llmtrain.tokenizers.sentencepiece import train

GPT2 = GPTConfig(
    vocab_size=320, hidden_size=32, num_layers=2, num_heads=4, max_sequence_length=16, dropout=0.1
)
LLAMA = replace(
    GPT2,
    num_kv_heads=2,
    mlp_hidden_size=48,
    positions="rope",
    norm="rmsnorm",
    gated_mlp=True,
    activation="silu",
    bias=False,
    tie_embeddings=False,
    rope_theta=500_000.0,
)
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
FORMS = {
    "gpt2": GPT2,
    "gpt2-untied": replace(GPT2, tie_embeddings=False, activation="gelu", mlp_hidden_size=40),
    "llama": LLAMA,
    "llama-tied-bias": replace(LLAMA, tie_embeddings=True, bias=True, num_kv_heads=None),
    "llama-3.1": replace(LLAMA, rope_scaling=RopeScaling(original_max_sequence_length=4), head_dim=16),
}
BY_FORM = pytest.mark.parametrize("config", FORMS.values(), ids=FORMS.keys())


def weights(config: GPTConfig | Seq2SeqConfig) -> dict[str, Tensor]:
    model = GPT(config) if isinstance(config, GPTConfig) else EncoderDecoder(config)
    initialize(model, seed=0)
    # Biases and norms start alike everywhere; a mix-up would not show.
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}


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
    export_folder(config, tensors, None, tmp_path / "out", shard_bytes=30_000)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert {name for shard in shards for name in load_file(shard)} == index["weight_map"].keys()
    stored = sum(t.numel() * 4 for shard in shards for t in load_file(shard).values())
    assert index["metadata"]["total_size"] == stored
    back = import_folder(tmp_path / "out").weights
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


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
