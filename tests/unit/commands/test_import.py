"""`llmtrain import`, and the export of what it made."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmtrain.cli import main as cli
from llmtrain.commands import export
from llmtrain.errors import CheckpointError
from llmtrain.interchange.huggingface import export_folder
from llmtrain.interchange.imported import save_imported
from llmtrain.interchange.trained import load_trained
from llmtrain.models.bert.config import BertConfig
from llmtrain.models.bert.model import Bert
from llmtrain.models.gpt.model import GPT
from llmtrain.train.run_folder import RunFolder
from tests.support.corpora import write_manifest
from tests.support.huggingface import random_weights
from tests.support.imports import LLAMA, run

BERT = BertConfig(vocab_size=512, hidden_size=32, num_layers=2, num_heads=4, max_sequence_length=64)


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
        tmp_path / "out", Counted(random_weights(model)), shapes, description, None, file_bytes=20_000
    )
    assert len(held) == len(shapes)
    assert most <= 2, "that at hand, and the one it takes the place of"
    assert len(list(path.glob("weights-*.safetensors"))) > 2


def test_a_bare_encoder_gets_heads_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export_folder(BERT, random_weights(Bert(BERT)), None, tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(file)
    bare = {n.removeprefix("bert."): t for n, t in tensors.items() if not n.startswith("cls.")}
    bare["pooler.dense.weight"], bare["pooler.dense.bias"] = torch.ones(32, 32), torch.ones(32)
    save_file(bare, file)

    checkpoint = run(tmp_path / "theirs", tmp_path / "ours")
    said = capsys.readouterr().err
    assert "newly initialized, since the folder lacks them: head.bias, transform.bias" in said
    assert "left out, since our model has no use for it: pooler.dense.bias, pooler.dense.weight" in said
    assert checkpoint.manifest["left_out"] == ["pooler.dense.bias", "pooler.dense.weight"]
    trained = load_trained(tmp_path / "ours")
    assert "newly initialized" in capsys.readouterr().err
    assert trained.fresh == (
        "head.bias", "transform.bias", "transform.weight", "transform_norm.bias", "transform_norm.weight",
    )  # fmt: skip
    assert torch.equal(trained.weights["transform_norm.weight"], torch.ones(32))
    assert trained.weights["transform.weight"].std() == pytest.approx(0.02, rel=0.1)

    # A part of the head, or of the encoder, is not newly initialized.
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
    spoiled = random_weights(GPT(LLAMA))
    spoiled["blocks.1.mlp.down.weight"][3, 5] = float("nan")
    export_folder(LLAMA, spoiled, None, tmp_path / "theirs")
    with pytest.raises(
        CheckpointError, match=r"theirs: got numbers that are NaN or infinite: 1 in blocks\.1\.mlp"
    ):
        load_trained(tmp_path / "theirs").build(torch.device("cpu"))
