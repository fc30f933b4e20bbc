"""Fine-tuned models in Hugging Face folders: transformers computes the same, and reads back bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.interchange.huggingface import export_folder, import_folder
from llmtrain.models.bert.config import BertConfig
from llmtrain.models.encoder_decoder.config import Seq2SeqConfig
from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.registry import family_of
from llmtrain.models.xlnet.config import XLNetConfig
from llmtrain.nn.initialize import initialize
from llmtrain.nn.task_config import TaskHeadConfig

SIZE: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "num_layers": 2, "num_heads": 4}
LLAMA: dict[str, Any] = {
    **SIZE,
    "positions": "rope",
    "norm": "rmsnorm",
    "gated_mlp": True,
    "bias": False,
    "activation": "silu",
    "mlp_hidden_size": 48,
    "tie_embeddings": False,
}
T5: dict[str, Any] = {
    **SIZE,
    "start_id": 0,
    "eos_id": 1,
    "norm": "rmsnorm",
    "norm_first": True,
    "positions": "relative",
    "scale_embedding": False,
    "scale_attention": False,
    "bias": False,
}
BART: dict[str, Any] = {
    **SIZE,
    "start_id": 1,
    "eos_id": 1,
    "positions": "learned",
    "position_offset": 2,
    "max_sequence_length": 16,
    "embedding_norm": True,
    "scale_embedding": False,
    "activation": "gelu",
    "norm_eps": 1e-5,
    "init_std": 0.02,
}
ROBERTA = {**SIZE, "position_offset": 2, "num_segments": 0}
MODELS: dict[str, tuple[type, dict[str, Any], dict[str, Any]]] = {
    "bert": (BertConfig, SIZE, {"pooling": "first", "dense": True}),
    "roberta": (
        BertConfig,
        {**SIZE, "position_offset": 2, "num_segments": 0},
        {"pooling": "first", "dense": True},
    ),
    "gpt2": (GPTConfig, SIZE, {"pooling": "last", "bias": False}),
    "llama": (GPTConfig, LLAMA, {"pooling": "last", "bias": False}),
    "mistral": (GPTConfig, {**LLAMA, "sliding_window": 4}, {"pooling": "last", "bias": False}),
    "qwen2": (GPTConfig, {**LLAMA, "qkv_bias": True}, {"pooling": "last", "bias": False}),
    "qwen3": (GPTConfig, {**LLAMA, "qk_norm": True}, {"pooling": "last", "bias": False}),
    "gemma": (
        GPTConfig,
        {**LLAMA, "activation": "gelu_tanh", "norm_adds_one": True, "scale_embedding": True},
        {"pooling": "last", "bias": False},
    ),
    "xlnet": (XLNetConfig, SIZE, {"pooling": "last", "dense": True}),
    "t5": (Seq2SeqConfig, T5, {"pooling": "last", "dense": True}),
    "bart": (Seq2SeqConfig, BART, {"pooling": "last", "dense": True}),
}
"""model_type → our config, its keys, and those of its head over a whole text."""
CLASSES = {
    "classes": transformers.AutoModelForSequenceClassification,
    "labels": transformers.AutoModelForSequenceClassification,
    "values": transformers.AutoModelForSequenceClassification,
    "tags": transformers.AutoModelForTokenClassification,
    "span": transformers.AutoModelForQuestionAnswering,
}


def head_of(kind: Any, of_text: dict[str, Any]) -> TaskHeadConfig:
    if kind in ("tags", "span"):
        of_text = {"pooling": of_text["pooling"]}
    labels = () if kind in ("values", "span") else ("bad", "so-so", "good")
    outputs = {"values": 1, "span": 2}.get(kind, 3)
    return TaskHeadConfig(kind, outputs, labels=labels, **of_text)


def model_of(name: str, kind: str) -> tuple[Any, Any]:
    config_type, keys, of_text = MODELS[name]
    head = replace(head_of(kind, of_text), encoder_only=(name, kind) == ("t5", "tags"))
    config = config_type(**keys, dropout=0.0, task=head)
    model = family_of(config).build(config)
    initialize(model, 0)
    torch.manual_seed(0)
    for parameter in model.parameters():  # norms and biases too
        torch.nn.init.normal_(parameter, std=0.1)
    return config, model.eval()


@pytest.mark.in_turns(3)
@pytest.mark.parametrize("kind", list(CLASSES))
@pytest.mark.parametrize("name", list(MODELS))
def test_transformers_computes_the_same_and_it_reads_back(name: str, kind: str, tmp_path: Path) -> None:
    config, model = model_of(name, kind)
    output = tmp_path / "exported"
    if (name, kind) in (("gemma", "span"), ("bart", "tags")):
        with pytest.raises(ConfigError, match=rf"task.kind={kind}"):
            export_folder(config, dict(model.named_parameters()), None, output)
        return
    export_folder(config, dict(model.named_parameters()), None, output)
    content = json.loads((output / "config.json").read_text())
    assert content["model_type"] == name
    theirs = CLASSES[kind].from_pretrained(output).eval()
    tokens = torch.randint(3, 96, (2, 9))
    if name in ("t5", "bart"):
        tokens[:, -1] = 1  # the end, whose state they classify
    with torch.no_grad():
        if theirs.config.pad_token_id is None:
            theirs.config.pad_token_id = 0
        found = theirs(tokens)
        ours = model(tokens, lengths_B=torch.tensor([9, 9]))
    logits = torch.stack([found.start_logits, found.end_logits], -1) if kind == "span" else found.logits
    torch.testing.assert_close(ours, logits, atol=1e-4, rtol=0)
    imported = import_folder(output)
    assert imported.config.task.kind == kind
    assert imported.config.task.labels == config.task.labels
    for parameter_name, parameter in model.named_parameters():
        assert torch.equal(imported.weights[parameter_name], parameter), parameter_name


def test_their_own_head_is_read(tmp_path: Path) -> None:
    """A folder that transformers wrote, without a problem_type."""
    config = transformers.BertConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        id2label={0: "no", 1: "yes"},
    )
    theirs = transformers.BertForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    imported = import_folder(tmp_path)
    assert imported.config.task.kind == "classes"
    assert imported.config.task.labels == ("no", "yes")
    model = family_of(imported.config).build(imported.config).eval()
    model.load_state_dict(
        {name: imported.weights[name] for name, _ in model.named_parameters()}, strict=False
    )
    tokens = torch.randint(3, 96, (2, 7))
    with torch.no_grad():
        ours = model(tokens, lengths_B=torch.tensor([7, 7]))
        torch.testing.assert_close(ours, theirs(tokens).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("names", [{"0": "a", "2": "b"}, {"0": 1}, ["a"], {}])
def test_names_of_labels_that_are_none_are_refused(names: Any, tmp_path: Path) -> None:
    config, model = model_of("bert", "classes")
    export_folder(config, dict(model.named_parameters()), None, tmp_path / "exported")
    path = tmp_path / "exported/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "id2label": names}))
    with pytest.raises(CheckpointError, match="id2label"):
        import_folder(tmp_path / "exported")
