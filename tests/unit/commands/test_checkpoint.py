"""`llmtrain checkpoint VERB PATH`, on checkpoints of a real run and on some made by hand."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from llmtrain.checkpoint.retention import list_steps
from llmtrain.cli import main as cli
from llmtrain.cli.verbs import SECOND_VERBS
from llmtrain.commands import checkpoint as verbs
from llmtrain.data.mixture import begin
from tests.support.corpora import write_manifest
from tests.support.owners import Owner, save
from tests.support.training import TINY_GPT
from tests.support.warm import llmtrain

TENSORS = {"a.w": torch.arange(24.0).reshape(4, 6), "b.w": torch.arange(5.0), "c.w": torch.ones(3, 2, 2)}

RUN = {"train": {"steps": 10}, "optimizer": {"name": "adamw"}, "precision": "fp32"}


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with a checkpoint of each of the last two, in a folder with an odd name."""
    folder = tmp_path_factory.mktemp("runs") / "lr=1e-3, a b"
    settings = ["train.steps=4", "checkpoint.every=1", "evaluation.every=2", f"data.path={corpus}"]
    done = llmtrain(
        "train", *TINY_GPT, *settings, "optimizer.lr=1e-3", f"run.dir={folder}", "checkpoint.keep_best=0"
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in list_steps(folder / "checkpoints")] == ["step-00000003", "step-00000004"]
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str], list[str]]:
    """Exit code, lines on standard output, problems."""
    code = cli.run_verb("checkpoint", [str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    problems = [line for line in captured.err.splitlines() if line.startswith("llmtrain: error: ")]
    return code, captured.out.splitlines(), problems


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/step-00000004"])
def test_verify(run: Path, place: str, capsys: pytest.CaptureFixture[str]):
    code, lines, problems = call(capsys, "verify", run / place)
    assert (code, problems) == (0, [])
    assert [line.split()[:2] for line in lines] == [
        [name, "good"] for name in ("step-00000003", "step-00000004") if name in place or "step" not in place
    ]
    assert "84 tensors in 2 files" in lines[0]


def test_verify_names_each_damage(copy: Path, capsys: pytest.CaptureFixture[str]):
    first, second = list_steps(copy / "checkpoints")
    content = bytearray((first / "rank-00000.safetensors").read_bytes())
    content[-1] ^= 1
    (first / "rank-00000.safetensors").write_bytes(content)
    (second / "manifest.json").write_text(
        (second / "manifest.json").read_text().replace('"step": 4', '"step": 5')
    )
    unfinished = copy / "checkpoints" / "step-00000005"
    unfinished.mkdir()
    code, lines, problems = call(capsys, "verify", copy)
    assert code == 2
    assert [line.split()[1] for line in lines] == ["damaged"] * 3
    assert "rank-00000.safetensors has another checksum" in problems[0]
    assert "an altered manifest" in problems[1]
    assert "step-00000005: got no manifest.json" in problems[2]


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (0, "tensors: got {"),
        (1, "model.num_layers: got 2; allowed: no more than its 1"),
        (14, "got a model of 68,480"),
    ],
)
def test_a_checkpoint_without_its_tensors_is_not_good(
    copy: Path, kept: int, said: str, capsys: pytest.CaptureFixture[str]
):
    """Whoever forges a manifest makes its checksum too."""
    path = list_steps(copy / "checkpoints")[-1]
    manifest = json.loads((path / "manifest.json").read_text())
    for kind, entries in manifest["tensors"].items():
        manifest["tensors"][kind] = dict(list(entries.items())[:kept])
    if kept == 0:
        manifest["files"] = []
    write_manifest(path, manifest)
    code, lines, problems = call(capsys, "verify", path)
    assert (code, lines[0].split()[1]) == (2, "damaged")
    assert said in problems[0]


def test_show(run: Path, capsys: pytest.CaptureFixture[str]):
    code, lines, _ = call(capsys, "show", run)
    assert code == 0
    facts = dict(line.split(maxsplit=1) for line in lines[: lines.index("")])
    assert facts["checkpoint"] == str(run / "checkpoints/step-00000004")
    assert facts["step"] == "4 of 4, 32 samples"
    assert facts["model"] == "gpt, 68,480 parameters"
    assert facts["layout"] == "world_size 1 = data 1 · tensor 1 · pipeline 1 · sequence 1; ZeRO 0"
    assert facts["precision"] == "fp32"
    assert facts["validation"].startswith("loss 5.")
    table = [line.split("  ") for line in lines[lines.index("") + 2 :]]
    assert len(table) == 28
    assert (
        "blocks.0.attention.qkv.weight     96 × 32         weight, optimizer.exp_avg, optimizer.exp_avg_sq"
        in lines
    )
    code, lines, _ = call(capsys, "show", run / "checkpoints/step-00000003", "tensors=false")
    assert (code, "" in lines) == (0, False)
    assert "validation  not evaluated at this step" in lines


def test_show_counts_the_samples_of_larger_and_smaller_batches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Three steps of 4 samples, two of 16, and then steps of 8, as the checkpoint's layout has."""
    timeline = begin(4, {"": 1.0}, {}).changed(3, 16, {"": 1.0}, {}).changed(5, 8, {"": 1.0}, {})
    known = {"config": RUN, "model": {"family": "gpt"}, "validation_loss": None}
    for step, samples in ((2, 8), (3, 12), (4, 28), (5, 44), (7, 60)):
        path = save(tmp_path, [Owner({"w": torch.zeros(3)})], step, **known, timeline=timeline.encode()).path
        assert f"step        {step} of 10, {samples} samples" in call(capsys, "show", path)[1]
    # A checkpoint of before the timeline was kept.
    path = save(tmp_path, [Owner({"w": torch.zeros(3)})], 8, **known).path
    assert "step        8 of 10, 64 samples" in call(capsys, "show", path)[1]


def test_diff_of_equals(run: Path, capsys: pytest.CaptureFixture[str]):
    code, lines, _ = call(capsys, "diff", run, run / "checkpoints/step-00000004")
    assert code == 0
    assert lines[2:] == [
        *("all weight: equal", "all optimizer.exp_avg: equal", "all optimizer.exp_avg_sq: equal"),
        "84 tensors compared, 0 differ; 0 other differences",
    ]


@pytest.mark.parametrize("band", [verbs.BAND_ELEMENTS, 7])
def test_diff(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, band: int):
    """One element changed, one tensor away, one of another shape; the same in bands of a row."""
    monkeypatch.setattr(verbs, "BAND_ELEMENTS", band)
    theirs = {"a.w": TENSORS["a.w"].clone(), "b.w": torch.ones(6), "d.w": torch.ones(2)}
    ours, other = Owner(TENSORS), Owner(theirs)
    with torch.no_grad():
        other.holders[0][3 + 20] += 0.5
    ours_path, other_path = save(tmp_path / "ours", [ours]).path, save(tmp_path / "other", [other]).path
    code, lines, problems = call(capsys, "diff", ours_path, other_path)
    assert (code, problems) == (1, [])
    norm = max(float(o.holders[0].detach()[3:].norm()) for o in (ours, other))
    told = set(lines)
    assert f"weight a.w: max |a-b| 5.000e-01, relative {0.5 / norm:.3e}, 1 of 24 elements differ" in told
    assert {"only in a: weight c.w", "only in b: optimizer.exp_avg d.w"} <= told
    assert "another shape: weight b.w is [5] in a, [6] in b" in told
    assert "all optimizer.exp_avg: equal" in told
    assert lines[-1] == "3 tensors compared, 1 differ; 9 other differences"
    assert call(capsys, "diff", ours_path, other_path, "tensors=false")[1] == [
        line for line in lines if not line.startswith("weight a.w")
    ]


def test_diff_of_what_is_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    paths = []
    for step, values in enumerate(([torch.nan, 1.0, torch.inf], [torch.nan, torch.nan, torch.inf]), start=1):
        owner = Owner({"w": torch.zeros(3)})
        with torch.no_grad():
            owner.holders[0][3:] = torch.tensor(values)
        paths.append(save(tmp_path, [owner], step).path)
    assert call(capsys, "diff", paths[0], paths[0])[0] == 0
    code, lines, _ = call(capsys, "diff", *paths)
    assert code == 1
    assert any(
        line.startswith("weight w: max |a-b| nan") and "1 of 3 elements differ" in line for line in lines
    )


def test_diff_tells_other_steps(run: Path, capsys: pytest.CaptureFixture[str]):
    code, lines, _ = call(capsys, "diff", run / "checkpoints/step-00000003", run, "tensors=false")
    assert code == 1
    assert "another counter: optimizer.step is [3.0] in a, [4.0] in b" in lines
    assert lines[-1] == "84 tensors compared, 84 differ; 1 other differences"


def test_export(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert call(capsys, "export", run, f"output={tmp_path / 'out'}", "dtype=bf16")[0] == 0
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as weights:
        assert weights.get_tensor("transformer.wte.weight").dtype == torch.bfloat16
    code, _, problems = call(capsys, "export", run)
    assert (code, len(problems)) == (2, 1)
    assert "output" in problems[0]


def test_prune(copy: Path, capsys: pytest.CaptureFixture[str]):
    first, second = list_steps(copy / "checkpoints")
    code, lines, _ = call(capsys, "prune", copy)
    assert (code, lines) == (0, ["0 of 2 checkpoints deleted, 0 bytes"])
    code, lines, _ = call(capsys, "prune", copy, "keep_last=1", "keep_best=0", "dry_run=true")
    size = sum(file.stat().st_size for file in first.iterdir())
    assert lines == [
        f"would delete step-00000003, {size:,} bytes",
        f"1 of 2 checkpoints would be deleted, {size:,} bytes",
    ]
    assert first.exists()
    assert call(capsys, "prune", copy / "checkpoints", "keep_last=1", "keep_best=0", "keep_every=3")[0] == 0
    assert first.exists()
    assert call(capsys, "prune", copy / "checkpoints", "keep_last=1", "keep_best=0")[0] == 0
    assert list_steps(copy / "checkpoints") == [second]


def test_prune_keeps_the_newest_good_one(copy: Path, capsys: pytest.CaptureFixture[str]):
    first, second = list_steps(copy / "checkpoints")
    (second / "rank-00000.safetensors").write_bytes(b"cut")
    assert call(capsys, "prune", copy, "keep_last=1", "keep_best=0")[0] == 0
    assert first.exists()
    (first / "rank-00000.safetensors").write_bytes(b"cut")
    code, _, (problem,) = call(capsys, "prune", copy, "keep_last=1", "keep_best=0")
    assert code == 2
    assert "rank-00000.safetensors" in problem
    assert len(list_steps(copy / "checkpoints")) == 2


def test_prune_leaves_a_run_alone_that_trains(copy: Path, capsys: pytest.CaptureFixture[str]):
    with open(copy / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, (problem,) = call(capsys, "prune", copy, "keep_last=1", "keep_best=0")
    assert code == 2
    assert "in use by" in problem
    assert len(list_steps(copy / "checkpoints")) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["verfy", "x"], ["llmtrain checkpoint: got 'verfy'", "verify"]),
        (["verify"], ["path: got nothing", "llmtrain checkpoint verify PATH"]),
        (["diff", "a/b"], ["other: got nothing", "llmtrain checkpoint diff PATH OTHER"]),
        (["verify", "/no/such"], ["/no/such: got no such folder", "a run folder"]),
        (["verify", "a", "b"], ["override: got 'b'", "key=value"]),
        (["show", "/no/such", "tensor=false"], ["tensor", "an unknown key", "tensors"]),
        (["prune", "/no/such", "keep_last=0"], ["keep_last", "1 or more"]),
        (["prune", "runs/x/checkpoints/step-00000004"], ["path", "a run folder"]),
        (["verify", "path="], ["path: got nothing"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_mistakes(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]):
    code, _, (problem,) = call(capsys, *arguments)
    assert code == 2
    for word in words:
        assert word in problem


def test_a_folder_without_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for verb in ("verify", "show", "prune"):
        code, _, (problem,) = call(capsys, verb, tmp_path)
        assert code == 2
        assert "got no checkpoint" in problem


def test_help(capsys: pytest.CaptureFixture[str]):
    assert cli.run_verb("checkpoint", ["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {verb} PATH" in shown for verb in SECOND_VERBS["checkpoint"])
    for verb, (keys, _) in SECOND_VERBS["checkpoint"].items():
        with pytest.raises(SystemExit):  # Hydra's own
            cli.run_verb("checkpoint", [verb, "--help"])
        shown = capsys.readouterr().out
        assert shown.startswith(f"usage: llmtrain checkpoint {verb} {keys} [key=value …]\n")
        assert "path: ???" in shown
    assert cli.run_verb("checkpoint", ["prune", "some/run", "keep_last=3", "--cfg", "job"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["path: some/run", "keep_last: 3"]


def test_the_exit_code_is_the_process_own(run: Path):
    first, second = list_steps(run / "checkpoints")
    assert llmtrain("checkpoint", "diff", str(first), str(second)).returncode == 1
