"""Residual networks: equal to transformers', to one process over several, and bit-exact on resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmtrain.interchange.huggingface import export_folder, import_folder
from llmtrain.interchange.trained import build_module, load_weights
from llmtrain.models.convolutional.resnet import ResNet
from llmtrain.nn.state import named_state
from tests.support.training import train

pytestmark = pytest.mark.slow

TINY = (
    "model=resnet20",
    "model.depths=[1,1]",
    "model.widths=[8,16]",
    "model.stem_width=8",
    "model.image_size=28",
    "model.channels=1",
    "data=mnist",
    "objective.crop=2",
    "objective.flip=true",
    "objective.cutout=6",
    "optimizer=sgd",
    "optimizer.lr=0.01",
    "schedule=constant",
    "schedule.warmup_steps=0",
    "train.steps=20",
    "evaluation.max_samples=32",
    "batch.sequence_length=1",
)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_equal_to_transformers_in_and_out(tmp_path: Path, block: str) -> None:
    """In evaluation and in training, running averages included."""
    from transformers import ResNetConfig, ResNetForImageClassification

    theirs: Any = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 1], layer_type=block, num_labels=7)
    )
    torch.manual_seed(0)
    for name, values in theirs.state_dict().items():
        if values.is_floating_point():
            values.copy_(torch.rand_like(values) + 0.5 if "var" in name else torch.randn_like(values) * 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    imported = import_folder(tmp_path / "theirs")
    assert imported.left_out == imported.unknown == ()
    ours = build_module(imported.config, torch.device("cpu"))
    load_weights(ours, imported.weights)
    images = torch.randn(4, 3, 48, 48)
    assert isinstance(ours, ResNet)
    state = {name: values.detach().clone() for name, values in named_state(ours).items()}
    export_folder(imported.config, state, None, tmp_path / "ours", origin=imported.origin)
    back = ResNetForImageClassification.from_pretrained(tmp_path / "ours")
    for is_training in (False, True):
        expected = theirs.train(is_training)(images).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(ours.train(is_training)(images), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(back.train(is_training)(images).logits, expected, rtol=1e-4, atol=1e-4)
    running = theirs.state_dict()["resnet.embedder.embedder.normalization.running_var"]
    torch.testing.assert_close(ours.stem.norm.running_var, running)


def size(global_size: int, micro_size: int) -> list[str]:
    return [f"batch.global_size={global_size}", f"batch.micro_size={micro_size}"]


def test_two_processes_with_synchronized_norms_equal_one() -> None:
    """The weights, the losses, and the running averages, which a checkpoint and an evaluation read."""
    one = train(1, [*TINY, *size(16, 16)], 2)[0]
    two = train(2, [*TINY, *size(16, 8)], 2)
    np.testing.assert_allclose(two[0].losses, one.losses, rtol=1e-4)
    np.testing.assert_allclose(two[0].validation_loss, one.validation_loss, rtol=1e-3)
    names = {name.rpartition(".")[2] for name in one.weights}
    assert {"running_mean", "running_var"} <= names
    for name, expected in one.weights.items():
        np.testing.assert_array_equal(two[0].weights[name], two[1].weights[name], err_msg=name)
        np.testing.assert_allclose(two[0].weights[name], expected, rtol=1e-4, atol=2e-5, err_msg=name)
        if name.endswith("running_mean"):
            assert np.abs(expected).max() > 0


def test_local_norms_differ_and_share_their_averages() -> None:
    overrides = [*TINY, "model.synchronized_norm=false"]
    local = train(2, [*overrides, *size(16, 8)], 2)
    whole = train(1, [*overrides, *size(16, 16)], 2)[0]
    # Four images of a process are normalized otherwise than eight.
    assert abs(local[0].losses[0] - whole.losses[0]) > 1e-4
    for name, values in local[0].weights.items():
        np.testing.assert_array_equal(values, local[1].weights[name], err_msg=name)


@pytest.mark.parametrize("ranks", [1, 2])
def test_resumed_bit_by_bit(tmp_path: Path, ranks: int) -> None:
    overrides = [*TINY, *size(16, 4)]
    whole = train(ranks, overrides, 4, save_to=tmp_path, save_at=2)[0]
    after = train(ranks, overrides, 4, resume_from=tmp_path / "step-00000002")[0]
    assert after.losses == whole.losses[2:]
    assert after.validation_loss == whole.validation_loss
    for name, expected in whole.weights.items():
        np.testing.assert_array_equal(after.weights[name], expected, err_msg=name)
