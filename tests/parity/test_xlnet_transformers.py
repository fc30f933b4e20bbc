"""XLNet against transformers' own, with the same random weights: orders, predicted places, padding, segments,
and folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.interchange.huggingface import export_folder, import_folder
from llmtrain.labels import IGNORE_INDEX
from llmtrain.models.xlnet.config import XLNetConfig
from llmtrain.models.xlnet.huggingface import XLNET
from llmtrain.models.xlnet.model import XLNet
from llmtrain.nn.initialize import initialize

pytestmark = pytest.mark.slow

B, T, M, V = 3, 24, 5, 211
SEGMENTS = XLNetConfig(
    vocab_size=V, hidden_size=48, num_layers=3, num_heads=4, mlp_hidden_size=80, dropout=0.0, init_std=0.2
)
PLAIN = replace(SEGMENTS, has_segments=False)
LENGTHS = (T, 17, 9)


def make(config: XLNetConfig) -> XLNet:
    """Weights that differ everywhere, biases and norms too."""
    model = XLNet(config)
    initialize(model, seed=3)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def theirs_of(model: XLNet) -> Any:
    """transformers' model with our weights."""
    from transformers import XLNetConfig as TheirConfig
    from transformers import XLNetLMHeadModel

    ours = {name: p.detach() for name, p in model.named_parameters()}
    weights = {}
    for entry in XLNET.entries(model.config):
        weights |= dict(zip(entry.theirs, entry.split(ours[entry.ours]), strict=True))
    weights["lm_loss.weight"] = ours["embedding.weight"]
    theirs = XLNetLMHeadModel(TheirConfig(vocab_size=V, **XLNET.write_config(model.config)))
    theirs.load_state_dict(weights)
    return theirs.eval()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Rows with 24, 17 and 9 tokens; M of each are predicted, last in a random order."""
    torch.manual_seed(1)
    is_token_BT = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    targets_BM = torch.stack([torch.randperm(n)[:M] for n in LENGTHS])
    order_BT = torch.zeros(B, T, dtype=torch.int64).scatter(
        1, targets_BM, torch.arange(1, M + 1).expand(B, M)
    )
    return {
        "tokens": torch.randint(0, V, (B, T)),
        "is_token": is_token_BT,
        "targets": targets_BM,
        "order": order_BT,
        "segments": (torch.arange(T) >= torch.tensor(LENGTHS)[:, None] // 2).long(),
        "labels": torch.randint(0, V, (B, M)).index_fill(1, torch.tensor([3]), IGNORE_INDEX),
    }


def masks(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same in transformers' words."""
    order_BT = batch["order"]
    before_BTT = order_BT[:, None, :] < order_BT[:, :, None]
    both_context_BTT = (order_BT[:, None, :] == 0) & (order_BT[:, :, None] == 0)
    return {
        "perm_mask": 1.0 - (before_BTT | both_context_BTT).float(),
        "target_mapping": torch.nn.functional.one_hot(batch["targets"], T).float(),
        "attention_mask": batch["is_token"].float(),
    }


@pytest.mark.parametrize("config", [SEGMENTS, PLAIN], ids=["segments", "plain"])
def test_predicted_places_and_their_loss_and_gradients(batch: dict[str, Tensor], config: XLNetConfig) -> None:
    model = make(config)
    theirs = theirs_of(model)
    asked: dict[str, Any] = {
        "order_BT": batch["order"],
        "targets_BM": batch["targets"],
        "documents_BT": batch["is_token"].int() - 1,
    }
    told = {"token_type_ids": batch["segments"]}
    if config.has_segments:
        asked["segments_BT"] = batch["segments"]
    expected = theirs(batch["tokens"], labels=batch["labels"], **masks(batch), **told)
    logits = model(batch["tokens"], **asked)
    assert (logits - expected.logits).abs().max() < 1e-4
    loss = model(batch["tokens"], labels_BM=batch["labels"], **asked)
    num_asked = (batch["labels"] != IGNORE_INDEX).sum()
    torch.testing.assert_close(loss / num_asked, expected.loss, atol=1e-5, rtol=1e-5)
    (loss / num_asked).backward()
    expected.loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for entry in XLNET.entries(config):
        ours = model.get_parameter(entry.ours).grad
        assert ours is not None
        torch.testing.assert_close(
            ours, entry.join([gradients[n] for n in entry.theirs]), atol=1e-4, rtol=1e-3
        )


@torch.no_grad()
@pytest.mark.parametrize("with_order", [True, False])
def test_content_stream_alone(batch: dict[str, Tensor], with_order: bool) -> None:
    model = make(SEGMENTS)
    theirs = theirs_of(model)
    wanted = ("perm_mask", "attention_mask") if with_order else ("attention_mask",)
    their_masks = {name: mask for name, mask in masks(batch).items() if name in wanted}
    asked = {"order_BT": batch["order"]} if with_order else {}
    kept = batch["is_token"]
    for segments in (batch["segments"], None):
        expected = theirs(batch["tokens"], token_type_ids=segments, **their_masks).logits[kept]
        documents_BT = kept.int() - 1
        logits = model(batch["tokens"], documents_BT=documents_BT, segments_BT=segments, **asked)[kept]
        assert (logits - expected).abs().max() < 1e-4


@torch.no_grad()
def test_all_targets_at_once(batch: dict[str, Tensor]) -> None:
    """Without an order: no target is seen, as transformers' examples ask for a blank."""
    model = make(SEGMENTS)
    perm_mask = torch.zeros(B, T, T).masked_fill((batch["order"] > 0)[:, None], 1.0)
    expected = theirs_of(model)(
        batch["tokens"], perm_mask=perm_mask, target_mapping=masks(batch)["target_mapping"]
    )
    logits = model(batch["tokens"], targets_BM=batch["targets"])
    assert (logits - expected.logits).abs().max() < 1e-4


@torch.no_grad()
def test_a_model_without_segments_goes_out_and_comes_back(batch: dict[str, Tensor], tmp_path: Path) -> None:
    """Theirs has segments always: they say nothing, and an import leaves them out again."""
    from transformers import AutoModelForCausalLM

    model = make(PLAIN)
    export_folder(PLAIN, dict(model.named_parameters()), None, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    expected = theirs(batch["tokens"], token_type_ids=batch["segments"]).logits
    assert (model(batch["tokens"]) - expected).abs().max() < 1e-4
    back = import_folder(tmp_path / "out")
    assert back.config == PLAIN
    for name, parameter in model.named_parameters():
        assert torch.equal(back.weights[name], parameter)
