"""Generators and discriminators: resumed bit by bit, alike on two processes, and what their runs leave."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llmtrain.cli import main as cli
from llmtrain.objectives.adversarial import gaussian
from llmtrain.scoring.samples import frechet_distance
from tests.support.training import train

pytestmark = pytest.mark.slow

TINY = (
    "experiment=gan_digits",
    "batch.global_size=16",
    "batch.micro_size=8",
    "evaluation.max_samples=32",
    "optimizer.lr=1e-3",
)
LINEAR = ("model=gan", "model.hidden=[16]", "model.latent_size=8")
CONVOLUTIONAL = ("model=dcgan", "model.width=4", "model.latent_size=8")
WASSERSTEIN = (*CONVOLUTIONAL, "model.discriminator_norm=none", "objective.loss=wgan_gp")


@pytest.mark.parametrize("kind", [LINEAR, CONVOLUTIONAL, WASSERSTEIN], ids=["linear", "dcgan", "wgan_gp"])
def test_resumed_bit_by_bit(tmp_path: Path, kind: tuple[str, ...]) -> None:
    whole = train(1, [*TINY, *kind], 4, save_to=tmp_path, save_at=2)[0]
    after = train(1, [*TINY, *kind], 4, resume_from=tmp_path / "step-00000002")[0]
    assert after.losses == whole.losses[2:]
    assert after.validation_loss == whole.validation_loss
    moved = dict.fromkeys(("generator", "discriminator"), 0)
    for name, expected in whole.weights.items():
        np.testing.assert_array_equal(after.weights[name], expected, err_msg=name)
        if name in whole.initial_weights:
            moved[name.partition(".")[0]] += not np.array_equal(expected, whole.initial_weights[name])
    assert min(moved.values()) > 0


def test_two_processes_equal_one() -> None:
    one = train(1, [*TINY, *CONVOLUTIONAL, "batch.micro_size=16"], 2)[0]
    two = train(2, [*TINY, *CONVOLUTIONAL], 2)
    np.testing.assert_allclose(two[0].losses, one.losses, rtol=1e-4)
    for name, expected in one.weights.items():
        np.testing.assert_array_equal(two[0].weights[name], two[1].weights[name], err_msg=name)
        np.testing.assert_allclose(two[0].weights[name], expected, rtol=1e-3, atol=1e-3, err_msg=name)


def test_a_run_leaves_samples_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["evaluation.max_samples=48", "track=[]"]
    steps = ["train.steps=2", "evaluation.every=1", "batch.global_size=8"]
    judge = ["experiment=mnist_cnn", f"run.dir={tmp_path / 'judge'}", "train.steps=2", *short]
    assert cli.run_verb("train", judge) == 0
    run = [*TINY, *LINEAR, *steps, *short, f"run.dir={tmp_path / 'run'}"]
    assert cli.run_verb("train", [*run, f"objective.classifier={tmp_path / 'judge'}"]) == 0
    said = capsys.readouterr().err
    assert "validation frechet distance" in said
    assert "mode collapse: generated images are of" in said
    pictures = sorted((tmp_path / "run" / "samples").iterdir())
    assert [path.name for path in pictures] == [f"step-{step:08d}.png" for step in (0, 1, 2)]
    assert Image.open(pictures[0]).size == (8 * 29 * 2, 8 * 29 * 2)
    assert pictures[0].read_bytes() != pictures[2].read_bytes()
    assert cli.run_verb("evaluate", [f"checkpoint={tmp_path / 'run'}", "split=test", "max_samples=32"]) == 0
    assert "classes_met" in capsys.readouterr().out
    assert cli.run_verb("evaluate", [f"checkpoint={tmp_path / 'run'}", "split=drawn"]) == 2
    assert "no split 'drawn'; allowed: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["objective.loss=wgan_gp"], "model.discriminator_norm: got batch with wgan_gp"),
        (["parallel.zero=1"], "allowed: 0 and engine=local with objective=adversarial"),
        (["parallel.tensor=2"], "parallel.tensor"),
        (["parallel.pipeline=2"], "parallel.pipeline"),
        (["model.image_size=27"], "model.image_size: got 27; allowed: an even number"),
        (["objective=image_classification"], "objective: got image_classification with model.family=gan"),
    ],
)
def test_what_cannot_be_is_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run_verb("train", [*TINY, "model=dcgan", f"run.dir={tmp_path}", *words]) == 2
    assert message in capsys.readouterr().err


def test_noise_is_normal_and_follows_from_the_key() -> None:
    noise = gaussian(np.arange(2000), 41, 50)
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert abs(np.corrcoef(noise[:, :5].T) - np.eye(5)).max() < 0.1
    np.testing.assert_array_equal(gaussian(np.array([7]), 41, 50)[0], noise[7])


def test_the_distance_of_normal_distributions() -> None:
    """|m₁ − m₂|² + Σ (σ₁ − σ₂)² where covariances are diagonal."""
    draw = torch.Generator().manual_seed(0)
    one = torch.randn(200_000, 3, generator=draw).numpy()
    other = torch.randn(200_000, 3, generator=draw).numpy() * [1, 2, 3] + [1, 0, 0]
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(one, other) == pytest.approx(1 + 0 + 1 + 4, rel=0.02)
