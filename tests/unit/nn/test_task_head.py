"""Heads of fine-tuning tasks: shapes, losses, and no effect of padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llmtrain.labels import IGNORE_INDEX
from llmtrain.models.bert.config import BertConfig
from llmtrain.models.encoder_decoder.config import Seq2SeqConfig
from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.recurrent.config import LSTMConfig
from llmtrain.models.registry import family_of
from llmtrain.models.xlnet.config import XLNetConfig
from llmtrain.nn.initialize import initialize
from llmtrain.nn.task_config import TaskHeadConfig
from llmtrain.nn.task_head import TaskHead, task_loss

KINDS = ("classes", "labels", "values", "tags", "span")
POOLINGS = ("first", "last", "mean")


def model_of(config_type: Any, head: TaskHeadConfig) -> Any:
    keys: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_layers": 2, "task": head}
    if config_type is not LSTMConfig:
        keys["num_heads"] = 2
    if config_type is Seq2SeqConfig:
        keys |= {"start_id": 1, "positions": "relative", "norm_first": True}
    config = config_type(**keys)
    model = family_of(config).build(config)
    initialize(model, 0)
    assert sum(p.numel() for p in model.parameters()) == config.parameter_count()
    return model.eval()


@pytest.mark.parametrize("config_type", [BertConfig, GPTConfig, XLNetConfig, LSTMConfig, Seq2SeqConfig])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_changes_nothing(config_type: Any, kind: Any, pooling: Any) -> None:
    outputs = 2 if kind == "span" else 3
    head = TaskHeadConfig(
        kind, outputs, pooling=pooling, dense=kind == "classes", encoder_only=kind in ("tags", "values")
    )
    model = model_of(config_type, head)
    torch.manual_seed(0)
    tokens, lengths = torch.randint(0, 50, (3, 8)), torch.tensor([8, 5, 3])
    documents = (torch.arange(8) >= lengths[:, None]).int()
    padded = model(tokens, lengths_B=lengths, documents_BT=documents)
    for row, length in enumerate(lengths.tolist()):
        alone = model(tokens[row : row + 1, :length], lengths_B=lengths[row : row + 1])
        ours = padded[row] if padded.ndim == 2 else padded[row, :length]
        torch.testing.assert_close(ours, alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config_type", [BertConfig, GPTConfig])
@pytest.mark.parametrize("pooling", ["first", "last"])
def test_the_last_layer_computes_what_the_head_reads(config_type: Any, pooling: Any) -> None:
    """Loss and gradients, with dropout, equal those over all states of the last layer."""
    head = TaskHeadConfig("classes", 3, pooling=pooling, dense=True)
    model = model_of(config_type, head).train()
    for block in model.blocks:
        block.attention.dropout = block.attention_dropout.p = block.mlp_dropout.p = 0.2
    torch.manual_seed(0)
    arguments = {
        "lengths_B": (lengths := torch.tensor([8, 5, 3])),
        "documents_BT": (torch.arange(8) >= lengths[:, None]).int(),
        "dropout_keys_B": torch.tensor([7, 8, 9]),
        "labels_BT": torch.tensor([0, 2, 1]),
    }
    tokens, shapes = torch.randint(0, 50, (3, 8)), []
    model.blocks[-1].register_forward_hook(lambda *of: shapes.append(tuple(of[-1].shape)))
    found = []
    for gives in (True, False):
        model.blocks[-1].gives_what_is_read = gives
        loss = model(tokens, **arguments)
        found.append((loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))))
    assert shapes == [(3, 1, 16), (3, 8, 16)]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_pooling_is_of_the_first_last_and_mean_token() -> None:
    x, lengths = torch.randn(2, 4, 3), torch.tensor([4, 2])
    expected = {"first": x[:, 0], "last": torch.stack([x[0, 3], x[1, 1]])}
    expected["mean"] = torch.stack([x[0].mean(0), x[1, :2].mean(0)])
    for pooling, pooled in expected.items():
        head = TaskHead(TaskHeadConfig("classes", 2, pooling=pooling), 3).eval()  # type: ignore[arg-type]
        torch.nn.init.normal_(head.out.weight)
        torch.nn.init.zeros_(head.out.bias)
        torch.testing.assert_close(head(x, lengths), pooled @ head.out.weight.T)


def test_losses_are_sums_over_what_has_a_label() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, IGNORE_INDEX, 1])
    classes = TaskHeadConfig("classes", 3)
    expected = F.cross_entropy(logits[[0, 1, 3]], labels[[0, 1, 3]], reduction="sum")
    torch.testing.assert_close(task_loss(logits, labels, classes), expected)
    weighted = TaskHeadConfig("classes", 3, class_weights=(0.5, 1.0, 2.0))
    each = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
    expected = each[0] * 0.5 + each[1] * 2.0 + each[3]
    torch.testing.assert_close(task_loss(logits, labels, weighted), expected)
    many = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [float("nan")] * 3, [1.0, 1.0, 1.0]])
    expected = F.binary_cross_entropy_with_logits(logits[[0, 1, 3]], many[[0, 1, 3]], reduction="sum") / 3
    torch.testing.assert_close(task_loss(logits, many, TaskHeadConfig("labels", 3)), expected)
    values = torch.tensor([[1.0], [float("nan")]])
    torch.testing.assert_close(
        task_loss(torch.tensor([[3.0], [9.0]]), values, TaskHeadConfig("values", 1)), torch.tensor(4.0)
    )
