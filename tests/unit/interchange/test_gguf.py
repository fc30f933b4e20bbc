"""GGUF files: every number as the `gguf` package reads it, logits as transformers', a line for each flaw."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from sentencepiece import sentencepiece_model_pb2

from llmtrain.commands.loading import build_module, load_weights
from llmtrain.errors import CheckpointError
from llmtrain.interchange.foreign import read_foreign
from llmtrain.interchange.gguf import GgufFile, import_gguf
from llmtrain.interchange.huggingface import export_folder
from tests.support.gguf_files import permuted, small_model, write_gguf
from tests.support.tokenizers import texts, train_tokenizer

ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
FORMS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}, {}),
    "llama-3.1": ("llama", {"rope_parameters": {**ROPE, "original_max_position_embeddings": 8192}}, {}),
    "llama-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
    ),
    "llama-yarn": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}},
        {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.original_context_length": 8,
        },
    ),
    "llama-attention-biases": ("llama", {"attention_bias": True}, {}),
    "mistral": ("mistral", {"sliding_window": 8}, {"llama.attention.sliding_window": 8}),
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {"head_dim": 32}, {}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4}, {}),
}


def logits_of(path: Path, tokens_BT: torch.Tensor) -> torch.Tensor:
    imported = import_gguf(GgufFile(path))
    module = build_module(imported.config, torch.device("cpu"))
    load_weights(module, imported.weights)
    with torch.no_grad():
        return module.eval()(tokens_BT)


@pytest.mark.parametrize("form", list(FORMS))
def test_logits_are_those_of_transformers(form: str, tmp_path: Path):
    model_type, changes, metadata = FORMS[form]
    model = small_model(model_type, **changes)
    path = write_gguf(tmp_path / "model.gguf", model, metadata=metadata)
    tokens_BT = torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens_BT).logits
    torch.testing.assert_close(logits_of(path, tokens_BT), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_every_number_is_as_the_package_reads_it(quantization: str, tmp_path: Path):
    model = small_model("llama")
    path = write_gguf(tmp_path / "model.gguf", model, quantization)
    kind = gguf.GGMLQuantizationType[quantization]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                # As stored: rows of heads in GGUF's order, each by itself.
                read = gguf.dequantize(gguf.quantize(parameter.numpy(), kind), kind)
                parameter.copy_(torch.from_numpy(read))
    tokens_BT = torch.arange(48).view(2, 24)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(path, tokens_BT), model(tokens_BT).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("quantization", ["Q2_K", "Q4_K", "Q6_K", "IQ4_XS"])
def test_formats_that_the_package_only_reads(quantization: str, tmp_path: Path):
    model = small_model("llama", hidden_size=256, intermediate_size=256, head_dim=64)
    kind = gguf.GGMLQuantizationType[quantization]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    # Any bytes are some numbers; without those of sign and large exponents none is infinite.
    raw = np.random.default_rng(0).integers(0, 48, (256, 256 // block * size), dtype=np.uint8)
    path = write_gguf(tmp_path / "model.gguf", model, raw={"blk.0.attn_q.weight": (raw, quantization)})
    expected = gguf.dequantize(raw, kind)
    qkv = import_gguf(GgufFile(path)).weights["blocks.0.attention.qkv.weight"]
    # By key-value head: two queries, a key, a value.
    queries = qkv.view(2, 4, 64, 256)[:, :2].reshape(256, 256)
    np.testing.assert_array_equal(permuted(queries.numpy(), 4), expected)


def test_the_tokenizer_of_byte_level_bpe(tmp_path: Path):
    library = train_tokenizer("gpt2", 320)
    path = write_gguf(tmp_path / "model.gguf", small_model("llama"), tokenizer=library)
    _, tokenizer = read_foreign(path)
    assert tokenizer is not None
    lines = [*texts(20), "two  spaces <|endoftext|> 123"]
    assert tokenizer.encode_batch(lines) == [e.ids for e in library.encode_batch(lines)]
    end = library.token_to_id("<|endoftext|>")
    assert tokenizer.special_ids == {"bos": end, "eos": end}
    assert tokenizer.is_lossless


def test_all_that_end_a_text(tmp_path: Path):
    """Of the text, of a turn, of a message."""
    ids = {"eos": 5, "eot": 7, "eom": 5, "padding": 3}
    metadata = {f"tokenizer.ggml.{name}_token_id": token for name, token in ids.items()}
    imported = import_gguf(GgufFile(write_gguf(tmp_path / "model.gguf", LLAMA, metadata=metadata)))
    assert imported.origin is not None
    assert imported.origin.generation == {"eos_token_id": [5, 7], "pad_token_id": 3}
    export_folder(imported.config, imported.weights, None, tmp_path / "out", origin=imported.origin)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == imported.origin.generation


def test_the_tokenizer_of_sentencepiece(tmp_path: Path):
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts(),
        model_writer=content,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    model = content.getvalue()
    spec = sentencepiece_model_pb2.ModelProto.FromString(model)
    pieces = [(p.piece, p.score, p.type) for p in spec.pieces]
    tokenizer_of = tuple(map(list, zip(*pieces, strict=True)))
    path = write_gguf(tmp_path / "model.gguf", small_model("llama"), tokenizer=tokenizer_of)
    _, tokenizer = read_foreign(path)
    assert tokenizer is not None
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    lines = [*texts(20), "two  spaces", ""]
    assert tokenizer.encode_batch(lines) == theirs.encode(lines)
    assert (tokenizer.special_ids, tokenizer.eos_id) == ({"unk": 0, "bos": 1, "eos": 2}, 2)


def test_another_tokenizer_is_taken_instead(tmp_path: Path):
    library = train_tokenizer("gpt2", 320)
    library.save(str(tmp_path / "tokenizer.json"))
    path = write_gguf(tmp_path / "model.gguf", small_model("llama"), tokenizer=None)
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.tokens: got nothing.*give tokenizer=PATH"):
        read_foreign(path)
    _, tokenizer = read_foreign(path, tmp_path / "tokenizer.json")
    assert tokenizer is not None
    assert tokenizer.vocab_size == 320


LLAMA = small_model("llama")
FLAWS: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": (
        {"metadata": {"general.architecture": "gemma3"}},
        "got general.architecture 'gemma3'; allowed: llama, qwen2, qwen3, smollm3",
    ),
    "a missing key": (
        {"metadata": {"llama.block_count": None}},
        "got no key 'llama.block_count'",
    ),
    "experts": ({"metadata": {"llama.expert_count": 8}}, "llama.expert_count: got 8; allowed: nothing"),
    "part of a head": (
        {"metadata": {"llama.rope.dimension_count": 8}},
        "llama.rope.dimension_count: got 8; allowed: 16",
    ),
    "yarn": (
        {"metadata": {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_attn_factor": 4.0}},
        "llama.rope.scaling.yarn_attn_factor: got 4.0; allowed: 1.0",
    ),
    "factors of another rule": (
        {"tensors": {"rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32)}},
        "rope_freqs.weight: got stretched rotary wavelengths",
    ),
    "a missing tensor": (
        {"tensors": {"blk.1.ffn_up.weight": None}},
        "got no tensor blk.1.ffn_up.weight",
    ),
    "an extra tensor": (
        {"tensors": {"blk.1.ffn_gate_exps.weight": np.zeros((4, 32), np.float32)}},
        "got an unknown tensor blk.1.ffn_gate_exps.weight",
    ),
    "a wrong shape": (
        {"tensors": {"blk.1.ffn_up.weight": np.zeros((96, 32), np.float32)}},
        "blk.1.ffn_up.weight: got shape (96, 32); allowed: (96, 64)",
    ),
    "one of several": ({"metadata": {"split.count": 3}}, "got one of several files"),
    "an unknown cut": (
        {"cut": "chameleon", "tokenizer": "gpt2"},
        "tokenizer.ggml.pre: got 'chameleon'; allowed: gpt-2, smollm, starcoder, llama-bpe, qwen2; "
        "give tokenizer=PATH, the model's own",
    ),
}


@pytest.mark.parametrize("flaw", list(FLAWS))
def test_each_flaw_is_one_line(flaw: str, tmp_path: Path):
    options, message = FLAWS[flaw]
    if options.get("tokenizer"):
        options = {**options, "tokenizer": train_tokenizer("gpt2", 320)}
    path = write_gguf(tmp_path / "model.gguf", LLAMA, **options)
    with pytest.raises(CheckpointError) as caught:
        read_foreign(path)
    (line,) = str(caught.value).split("\n")
    assert line.startswith(str(path))
    assert message in line


@pytest.mark.parametrize("kept", [0, 3, 100, 5000, -64])
def test_a_file_that_was_cut(kept: int, tmp_path: Path):
    path = write_gguf(tmp_path / "model.gguf", LLAMA)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.gguf: got a damaged GGUF file \(.+\)") as caught:
        read_foreign(path)
    assert "\n" not in str(caught.value)


def test_without_the_package_that_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r'got a GGUF file; pip install "llmtrain\[gguf\]"'):
        read_foreign(path)
