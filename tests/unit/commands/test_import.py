"""`llmtrain import`, and training that starts from what it made."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.checkpoint.retention import find
from llmtrain.cli import main as cli
from llmtrain.commands import export, import_
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.generation.config import GenerateConfig
from llmtrain.interchange.huggingface import export_folder
from llmtrain.interchange.imported import save_imported
from llmtrain.interchange.trained import load_trained
from llmtrain.models.bert.config import BertConfig
from llmtrain.models.bert.model import Bert
from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.gpt.model import GPT
from llmtrain.train.resolve import resolve
from llmtrain.train.run_folder import RunFolder
from tests.support.corpora import write_manifest
from tests.support.training import compose

LLAMA = GPTConfig(
    vocab_size=512,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_sequence_length=64,
    mlp_hidden_size=48,
    positions="rope",
    norm="rmsnorm",
    gated_mlp=True,
    activation="silu",
    bias=False,
)
BERT = BertConfig(vocab_size=512, hidden_size=32, num_layers=2, num_heads=4, max_sequence_length=64)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama in bf16, in several files."""
    export_folder(
        LLAMA, weights(GPT(LLAMA)), None, tmp_path / "theirs", dtype=torch.bfloat16, shard_bytes=20_000
    )
    return tmp_path / "theirs"


def run(source: Path, output: Path, **settings: Any) -> Checkpoint:
    import_.run({"source": str(source), "output": str(output), **settings})
    return find(output, print)


def test_import_and_export_are_bitwise_equal(folder: Path, tmp_path: Path) -> None:
    checkpoint = run(folder, tmp_path / "ours")
    assert (checkpoint.step, checkpoint.is_imported) == (0, True)
    assert checkpoint.damage() is None
    assert checkpoint.incompleteness() is None
    trained = load_trained(tmp_path / "ours")
    assert trained.config == LLAMA
    export.run({"checkpoint": str(tmp_path / "ours"), "output": str(tmp_path / "again")})
    again = load_file(tmp_path / "again" / "model.safetensors")
    before = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    assert again.keys() == before.keys()
    assert all(again[name].dtype == torch.bfloat16 for name in again)
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As each is written, those before it are gone."""
    import weakref

    held: list[weakref.ref[torch.Tensor]] = []
    most = 0

    class Counted(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            nonlocal most
            tensor = super().__getitem__(name).clone()
            held.append(weakref.ref(tensor))
            most = max(most, sum(ref() is not None for ref in held))
            return tensor

    model = GPT(LLAMA)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    description = {"imported_from": "x", "model": {}}
    path = save_imported(
        tmp_path / "out", Counted(weights(model)), shapes, description, None, file_bytes=20_000
    )
    assert len(held) == len(shapes)
    assert most <= 2, "that at hand, and the one it takes the place of"
    assert len(list(path.glob("weights-*.safetensors"))) > 2


def test_a_bare_encoder_gets_heads_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export_folder(BERT, weights(Bert(BERT)), None, tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(file)
    bare = {n.removeprefix("bert."): t for n, t in tensors.items() if not n.startswith("cls.")}
    bare["pooler.dense.weight"], bare["pooler.dense.bias"] = torch.ones(32, 32), torch.ones(32)
    save_file(bare, file)

    checkpoint = run(tmp_path / "theirs", tmp_path / "ours")
    said = capsys.readouterr().err
    assert "begun anew, since the folder lacked them: head.bias, transform.bias" in said
    assert "left out, since our model has no use for it: pooler.dense.bias, pooler.dense.weight" in said
    assert checkpoint.manifest["left_out"] == ["pooler.dense.bias", "pooler.dense.weight"]
    trained = load_trained(tmp_path / "ours")
    assert "begun anew" in capsys.readouterr().err
    assert trained.fresh == (
        "head.bias", "transform.bias", "transform.weight", "transform_norm.bias", "transform_norm.weight",
    )  # fmt: skip
    assert torch.equal(trained.weights["transform_norm.weight"], torch.ones(32))
    assert trained.weights["transform.weight"].std() == pytest.approx(0.02, rel=0.1)

    # A part of the head, or of the encoder, is not begun anew.
    for name in ("cls.predictions.transform.dense.weight", "bert.encoder.layer.1.output.dense.bias"):
        save_file({n: t for n, t in tensors.items() if n != name}, file)
        with pytest.raises(CheckpointError, match=f"no tensor {name}"):
            run(tmp_path / "theirs", tmp_path / "ours2")


def test_what_may_be_replaced(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "ours"
    first = run(folder, output)
    with pytest.raises(CheckpointError, match=r"an earlier import; .*overwrite=true"):
        run(folder, output)
    assert run(folder, output, overwrite=True).manifest["files"] == first.manifest["files"]
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-00000000"]

    RunFolder(tmp_path / "run").close()
    (tmp_path / "run" / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="something that is no import"):
        run(folder, tmp_path / "run", overwrite=True)
    with pytest.raises(CheckpointError, match=r"config\.json: got No such file"):
        run(tmp_path / "nowhere", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_full_disk_leaves_nothing(folder: Path, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(1_000_000))
    with pytest.raises(CheckpointError, match="make room, then import again"):
        run(folder, small_disk / "ours")
    assert not [path for path in (small_disk / "ours").rglob("*") if path.is_file()]


def test_no_code_of_a_folder_runs(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "configuration_x.X"}
    (folder / "config.json").write_text(json.dumps(config))
    witness = tmp_path / "ran"
    for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py", "__init__.py"):
        (folder / name).write_text(f"open({str(witness)!r}, 'w')")
    run(folder, tmp_path / "ours")
    load_trained(folder)
    assert not witness.exists()
    assert not [name for name in sys.modules if name.endswith(("modeling_x", "configuration_x"))]


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
    assert "not heeded of the folder's generation settings: typical_p=0.5" in capsys.readouterr().err


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
    assert "note: frozen as the seed made them, so that no training has seen" in capsys.readouterr().err
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


def test_by_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "with = and space"
    assert cli.run_verb("import", [f"source={folder}", f"output={output}"]) == 0
    assert "train on: llmtrain train model=pretrained model.path=" in capsys.readouterr().err
    assert cli.run_verb("checkpoint", ["show", str(output), "tensors=false"]) == 0
    assert f"step        0, imported from {folder}" in capsys.readouterr().out
    assert cli.run_verb("import", [f"source={tmp_path / 'none'}", f"output={output}"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": {"num_layers": 10**9}}, "model.num_layers: got 1,000,000,000; allowed: no more than its"),
        ({"model": {"hidden_size": 10**12}}, "model: got a model of"),
        ({"model": {"hidden_size": "wide"}}, "model.hidden_size: got 'wide'; allowed: a whole number"),
        ({"model": {"num_heads": 0}}, "model.num_heads: got 0"),
        ({"model": {"family": "of mine"}}, "model.family: got 'of mine'"),
        ({"origin": {"model": {"num_layers": 10**9}}}, "origin.model.num_layers: got 1,000,000,000"),
        ({"origin": {"generation": {"top_k": "many"}}}, "origin.generation.top_k: got 'many'"),
        ({"origin": {"generation": {"eos_token_id": {}}}}, "origin.generation.eos_token_id: got {}"),
        ({"dtype": "load"}, "dtype: got 'load'"),
    ],
)
def test_a_checkpoint_that_says_other_things(folder: Path, tmp_path: Path, change: dict, said: str) -> None:
    """Whoever forges a manifest makes its checksum too."""
    checkpoint = run(folder, tmp_path / "ours")

    def changed(before: Any, now: Any) -> Any:
        if not isinstance(before, dict) or not isinstance(now, dict):
            return now
        return {**before, **{key: changed(before.get(key), value) for key, value in now.items()}}

    write_manifest(checkpoint.path, changed(checkpoint.manifest, change))
    with pytest.raises(CheckpointError) as failure:
        load_trained(tmp_path / "ours")
    assert said in str(failure.value)
    assert str(checkpoint.path) in str(failure.value)


def test_weights_that_are_not_finite_are_used_for_nothing(tmp_path: Path) -> None:
    """Neither of a folder nor of a checkpoint."""
    spoiled = weights(GPT(LLAMA))
    spoiled["blocks.1.mlp.down.weight"][3, 5] = float("nan")
    export_folder(LLAMA, spoiled, None, tmp_path / "theirs")
    with pytest.raises(
        CheckpointError, match=r"theirs: got numbers that are NaN or infinite: 1 in blocks\.1\.mlp"
    ):
        load_trained(tmp_path / "theirs").build(torch.device("cpu"))
