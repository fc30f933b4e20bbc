"""Training that starts from a Hugging Face folder, imported or as it is."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmtrain.cli import main as cli
from llmtrain.commands import export
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.generation.config import GenerateConfig
from llmtrain.interchange.trained import load_trained
from llmtrain.train.resolve import resolve
from tests.support.imports import LLAMA, run
from tests.support.training import compose


def train_settings(corpus: Path, path: Path, *changes: str) -> dict[str, Any]:
    return compose(
        [
            "model=pretrained",
            f"model.path={path}",
            f"data.path={corpus}",
            "batch.sequence_length=32",
            f"run.dir={path.parent / 'run'}",
            "train.steps=2",
            "batch.global_size=2",
            "batch.micro_size=2",
            "evaluation.max_samples=2",
            *changes,
        ]
    )


def test_training_starts_from_it(
    folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmtrain.commands import evaluate, train

    run(folder, tmp_path / "ours")
    for path, changes in ((tmp_path / "ours", ["model.dropout=0.1"]), (folder, [])):
        resolved = resolve(train_settings(corpus, path, *changes))
        assert resolved.config.model == replace(LLAMA, dropout=0.1 if changes else 0.0)

    train.run(train_settings(corpus, tmp_path / "ours"))
    said = capsys.readouterr().err
    assert "starting from the weights of" in said
    evaluate.run(
        compose(
            [f"checkpoint={folder}", f"data.path={corpus}", "max_samples=2", "sequence_length=32"], "evaluate"
        )
    )
    figures = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert f"step 0: validation loss {float(figures['loss']):.4f}" in said
    # The same command goes on from its own checkpoint.
    train.run(train_settings(corpus, tmp_path / "ours", "train.steps=3"))
    said = capsys.readouterr().err
    assert "resuming from" in said
    assert "starting from" not in said
    # It has all that it needs.
    shutil.rmtree(tmp_path / "ours")
    train.run(train_settings(corpus, tmp_path / "ours", "train.steps=4"))
    assert "step 3)" in capsys.readouterr().err
    with pytest.raises(
        CheckpointError, match=r"model\.path: got .*never, .* over a run that began with .*ours"
    ):
        resolve(train_settings(corpus, tmp_path / "never", "train.steps=5"))
    with pytest.raises(CheckpointError, match=r"another model \(model\.activation=gelu here, silu there\)"):
        train.run(train_settings(corpus, tmp_path / "ours", "train.steps=5", "model.activation=gelu"))
    with pytest.raises(CheckpointError, match="ours: got no such folder"):
        resolve(train_settings(corpus, tmp_path / "ours", f"run.dir={tmp_path / 'new'}"))


def spoil(folder: Path, name: str, count: int, value: float) -> None:
    """Put `value` into the first numbers of a stored tensor."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name].view(-1)[:count] = value
            save_file(tensors, file)


def test_weights_that_are_not_finite_are_named(folder: Path, corpus: Path, tmp_path: Path) -> None:
    from llmtrain.commands import train

    spoil(folder, "model.norm.weight", 3, float("nan"))
    spoil(folder, "model.embed_tokens.weight", 1, float("-inf"))
    said = r"numbers that are NaN or infinite: 1 in embedding\.weight, 3 in norm\.weight; .*finite"
    with pytest.raises(CheckpointError, match=f"{folder}: got {said}"):
        run(folder, tmp_path / "ours")
    assert not (tmp_path / "ours" / "checkpoints" / "step-00000000").exists()
    with pytest.raises(CheckpointError, match=f"model\\.path={folder}: got {said}"):
        train.run(train_settings(corpus, folder))
    assert not list((folder.parent / "run").rglob("step-*"))


def test_how_it_is_to_write_travels_through_training(
    folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmtrain.commands import train
    from llmtrain.generation.settings import resolved_for, text_ends

    said = {"eos_token_id": [9, 11], "do_sample": True, "temperature": 0.6, "top_p": 0.9, "typical_p": 0.5}
    (folder / "generation_config.json").write_text(json.dumps(said))
    run(folder, tmp_path / "ours")
    train.run(train_settings(corpus, tmp_path / "ours"))
    trained = load_trained(tmp_path / "run")
    end = trained.tokenizer().eos_id
    assert text_ends(load_trained(tmp_path / "ours"), end) == (9, 11)
    assert text_ends(trained, end) == (9, 11, end)
    export.run({"checkpoint": str(tmp_path / "run"), "output": str(tmp_path / "again")})
    written = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert {key: written[key] for key in said} == said | {"eos_token_id": [9, 11, end]}
    capsys.readouterr()
    settings = resolved_for(trained, GenerateConfig(), longest=30)
    assert (settings.temperature, settings.top_p, settings.max_new_tokens) == (0.6, 0.9, 34)
    assert "ignored generation settings of the folder: typical_p=0.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.hidden_size=64"], r"embedding\.weight of shape \(512, 32\)"),
        (
            ["model.num_layers=12"],
            r"got weights for \d\d\.\d% of the model, 1\d of \d\d parameters \(none for blocks\.2\..*"
            r"allowed: 50% or more",
        ),
    ],
)
def test_weights_of_another_size(changes: list[str], message: str, folder: Path, corpus: Path) -> None:
    from llmtrain.commands import train

    with pytest.raises(CheckpointError, match=message):
        train.run(train_settings(corpus, folder, *changes))


def test_parameters_that_the_folder_lacks_and_ones_that_the_model_lacks(
    folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmtrain.commands import train

    changes = ("model.num_layers=1", "model.qkv_bias=true")
    settings = train_settings(corpus, folder, *changes, "train.freeze=[blocks.0.attention.qkv.*,embedding.*]")
    train.run(settings)
    told = capsys.readouterr().err
    assert "new, started from the seed: blocks.0.attention.qkv.bias (64); 64 numbers in 1 parameter" in told
    assert f"unused of {folder}: blocks.1." in told
    assert "warning: these frozen parameters were never trained: blocks.0.attention.qkv.bias" in told
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["new_parameters"] == ["blocks.0.attention.qkv.bias"]
    assert all(name.startswith("blocks.1.") for name in environment["unused_parameters"])
    trained = load_trained(tmp_path / "run")
    assert trained.fresh == ("blocks.0.attention.qkv.bias",)
    assert "note: frozen at their random initial values, which no training" in capsys.readouterr().err
    theirs = load_trained(folder).weights
    assert torch.equal(trained.weights["embedding.weight"], theirs["embedding.weight"])
    assert not torch.equal(trained.weights["norm.weight"], theirs["norm.weight"])
    assert cli.run_verb("checkpoint", ["show", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert "frozen      3 of 10 parameters" in shown
    assert "untrained   blocks.0.attention.qkv.bias" in shown
    assert "new         blocks.0.attention.qkv.bias\nunused      blocks.1." in shown
    # The same command goes on; with another set it does not.
    with pytest.raises(CheckpointError, match=r"train\.freeze: got trained that were frozen: blocks\.0\.att"):
        train.run(train_settings(corpus, folder, *changes, "train.freeze=[embedding.*]", "train.steps=9"))


def test_what_cannot_be_started_from(folder: Path, corpus: Path, tmp_path: Path) -> None:
    from llmtrain.commands import train

    with pytest.raises(ConfigError, match=r"model\.path: got nothing; .*set model\.path="):
        resolve(compose(["model=pretrained", f"data.path={corpus}"]))
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve(train_settings(corpus, tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"model\.hiden_size: got an unknown key; allowed: hidden_size"):
        resolve(train_settings(corpus, folder, "++model.hiden_size=3"))
    run(folder, tmp_path / "ours")
    resume = train_settings(corpus, folder, f"checkpoint.resume={tmp_path / 'ours'}")
    with pytest.raises(
        CheckpointError, match=r"without an optimizer's state; .*model=pretrained model\.path="
    ):
        train.run(resume)


def test_another_tokenizer(folder: Path, corpus: Path, tmp_path: Path) -> None:
    from llmtrain.tokenizers.config import TokenizerConfig
    from llmtrain.tokenizers.sentencepiece import train as train_tokenizer

    text = "the quick brown fox jumps over the lazy dog, again and again and again. "
    (tmp_path / "other.model").write_bytes(
        train_tokenizer([text * 20, text.upper() * 5], TokenizerConfig(vocab_size=319))
    )
    run(folder, tmp_path / "ours", tokenizer=str(tmp_path / "other.model"))
    with pytest.raises(
        ConfigError, match=r"data prepared with another tokenizer .*prepare it with tokenizer\.model="
    ):
        resolve(train_settings(corpus, tmp_path / "ours"))
    own = next(path for path in corpus.iterdir() if path.name.startswith("tokenizer."))
    run(folder, tmp_path / "ours", tokenizer=str(own), overwrite=True)
    assert resolve(train_settings(corpus, tmp_path / "ours")).pretrained is not None
