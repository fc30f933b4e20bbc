"""`llmtrain train model=word2vec` and its like, and `llmtrain vectors`: from texts to nearest words and
files."""

from __future__ import annotations

import functools
import json
import operator
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.checkpoint.retention import list_steps
from llmtrain.cli import main as cli
from llmtrain.interchange.word_vectors import read_vectors, read_words_and_matrix
from llmtrain.track.jsonl import read_metrics
from tests.support.warm import llmtrain, start

GROUPS = [["cat", "dog", "horse", "cow"], ["red", "blue", "green", "white"], ["run", "walk", "jump", "swim"]]
SMALL = ("data.txt_document=line", "model.min_count=2", "train.threads=1", "train.words_per_step=2000")
TINY = (*SMALL, "model.dimensions=12", "model.subsample=0")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines each of which is about one of three things."""
    drawn = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(" ".join(drawn.choice(GROUPS[drawn.integers(3)], 10)) for _ in range(1200)))
    return path


@pytest.fixture(scope="module")
def finished(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    words = [
        "model=word2vec",
        f"data.path={texts}",
        f"run.dir={run}",
        *TINY,
        "checkpoint.every=7",
        "train.epochs=4",
    ]
    assert cli.run_verb("train", words) == 0
    return run


@pytest.fixture(autouse=True)
def quiet(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    capsys.readouterr()


def told(capsys: pytest.CaptureFixture[str], verb: str, *words: str) -> str:
    """The one line of a mistake."""
    capsys.readouterr()
    assert cli.run_verb(verb, list(words)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("llmtrain: error: ")]
    assert len(lines) == 1, lines
    return lines[0]


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.run_verb("vectors", list(words)) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def near(capsys: pytest.CaptureFixture[str], run: Path, word: str, top: int = 3) -> set[str]:
    found = answer(capsys, "nearest", f"checkpoint={run}", f"word={word}", f"top={top}", "format=json")
    return {each["word"] for each in found["nearest"]}


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        ("word2vec", []),
        ("word2vec", ["model.architecture=cbow", "optimizer.lr=0.05"]),
        ("word2vec", ["model.loss=hierarchical_softmax"]),
        ("fasttext", ["model.buckets=500"]),
        ("glove", []),
    ],
)
def test_words_of_one_kind_come_near_each_other(
    model: str, keys: list[str], texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = [key for key in TINY if model != "glove" or "subsample" not in key]
    words = [
        f"model={model}",
        f"data.path={texts}",
        f"run.dir={tmp_path / 'run'}",
        *tiny,
        "train.epochs=12",
        *keys,
    ]
    assert cli.run_verb("train", words) == 0
    for group in GROUPS:
        assert near(capsys, tmp_path / "run", group[0]) == set(group[1:])
    if model == "fasttext":
        assert near(capsys, tmp_path / "run", "horses", 4) == set(GROUPS[0])


def test_a_run_leaves_what_every_run_leaves(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {
        "config.yaml",
        "environment.json",
        "git.json",
        "data.json",
        "metrics.jsonl",
        "checkpoints",
        "words",
    }
    assert names <= {path.name for path in finished.iterdir()}
    config = yaml.safe_load((finished / "config.yaml").read_text())
    steps = config["train"]["steps"]
    assert config["model"]["family"] == "word2vec"
    metrics = list(read_metrics(finished / "metrics.jsonl"))
    assert [row["step"] for row in metrics] == list(range(1, steps + 1))
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert metrics[-1]["lr"] < metrics[0]["lr"]
    kept = [path.name for path in list_steps(finished / "checkpoints")]
    assert kept == [f"step-{(steps - 1) // 7 * 7:08d}", f"step-{steps:08d}"]
    assert cli.run_verb("checkpoint", ["verify", str(finished)]) == 0
    assert cli.run_verb("checkpoint", ["show", str(finished)]) == 0
    assert "word2vec, 288 parameters" in capsys.readouterr().out
    again = ["model=word2vec", f"run.dir={finished}", "train.epochs=4", *TINY]
    path = json.loads((finished / "data.json").read_text())["paths"][0]
    assert cli.run_verb("train", [*again, f"data.path={path}"]) == 0
    assert "nothing to train" in capsys.readouterr().err


def test_other_rooms_read_words_and_matrix(finished: Path, tmp_path: Path) -> None:
    words, matrix = read_words_and_matrix(finished)
    assert sorted(words) == sorted(functools.reduce(operator.iadd, GROUPS, []))
    newest = Checkpoint.open(list_steps(finished / "checkpoints")[-1])
    assert (matrix == newest.weights()["words"].numpy()).all()


@pytest.mark.parametrize("form", ["text", "binary", "gensim"])
def test_exports_are_read_and_imported_again(
    form: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder = tmp_path / "vectors", tmp_path / "import"
    said = answer(capsys, "export", str(finished), f"output={file}", f"format={form}", "report=json")
    assert (said["words"], said["dimensions"], said["bytes"]) == (12, 12, file.stat().st_size)
    assert "exists" in told(capsys, "vectors", "export", str(finished), f"output={file}")
    said = answer(capsys, "import", str(file), f"output={folder}", "format=json")
    assert said["words"] == 12
    ours, theirs = read_vectors(finished), read_vectors(folder)
    assert ours.words == theirs.words
    assert (ours.matrix == theirs.matrix).all()
    assert near(capsys, folder, "cat") == near(capsys, file, "cat") == set(GROUPS[0][1:])
    assert cli.run_verb("checkpoint", ["verify", str(folder)]) == 0
    assert "holds step-00000000" in told(capsys, "vectors", "import", str(file), f"output={folder}")
    assert cli.run_verb("vectors", ["import", str(file), f"output={folder}", "overwrite=true"]) == 0


def test_a_fasttext_import_keeps_its_n_grams(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gensim.models import FastText
    from gensim.models.fasttext import save_facebook_model

    model = FastText([["good", "film"], ["bad", "film"]] * 9, vector_size=8, min_count=1, bucket=40, epochs=1)
    save_facebook_model(model, str(tmp_path / "model.bin"))
    said = answer(
        capsys, "import", str(tmp_path / "model.bin"), f"output={tmp_path / 'import'}", "format=json"
    )
    assert said["subwords"] == 40
    vectors = read_vectors(tmp_path / "import")
    for word in ("good", "goodness"):
        np.testing.assert_allclose(vectors.vector(word), model.wv[word], atol=1e-6)


def test_figures_and_maps(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs, questions = tmp_path / "pairs.tsv", tmp_path / "questions.txt"
    pairs.write_text("cat\tdog\t9\nCat\tred\t1\nrun\twalk\t8\nrun\tblue\t1.5\ncat\tnone\t3\n")
    questions.write_text(": kinds\ncat dog red blue\nCAT DOG RED NONE\n")
    found = answer(capsys, "similarity", str(finished), f"file={pairs}", "format=json")
    assert (found["pairs"], found["skipped_pairs"]) == (4, [["cat", "none"]])
    assert found["spearman"] > 0.7
    found = answer(capsys, "similarity", str(finished), "words=[cat,dog]", "format=json")
    assert found["similarity"] > 0.8
    found = answer(capsys, "analogy", str(finished), f"file={questions}", "format=json")
    assert (found["asked"], found["skipped"]) == (1, 1)
    found = answer(capsys, "analogy", str(finished), "words=[cat,dog,red]", "top=2", "format=json")
    assert {each["word"] for each in found["nearest"]} <= set(GROUPS[1])
    for method in ("pca", "tsne"):
        output = tmp_path / f"{method}.png"
        keys = [f"output={output}", f"method={method}", f"projector={tmp_path / 'projector'}", "perplexity=3"]
        assert cli.run_verb("vectors", ["map", str(finished), *keys]) == 0
        assert output.read_bytes()[:4] == b"\x89PNG"
    rows = (tmp_path / "projector" / "vectors.tsv").read_text().splitlines()
    assert len(rows) == len((tmp_path / "projector" / "metadata.tsv").read_text().splitlines()) == 12
    assert 'tensor_path: "vectors.tsv"' in (tmp_path / "projector" / "projector_config.pbtxt").read_text()


def test_one_hot_vectors_are_alike_to_none(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["model=one_hot", f"data.path={texts}", f"run.dir={tmp_path / 'run'}", "data.txt_document=line"]
    assert cli.run_verb("train", [*words, "model.max_words=9"]) == 0
    assert read_vectors(tmp_path / "run").matrix.tolist() == np.eye(9).tolist()
    two = read_vectors(tmp_path / "run").words[:2]
    found = answer(capsys, "similarity", str(tmp_path / "run"), f"words=[{two[0]},{two[1]}]", "format=json")
    assert found["similarity"] == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["parallel.tensor=2"],
            "parallel.tensor: got 2; allowed: 1 with model.family=word2vec; one process trains",
        ),
        (["parallel.pipeline=2"], "parallel.pipeline: got 2; allowed: 1 with model.family=word2vec"),
        (
            ["batch.global_size=8"],
            "batch: got a section or key that is given; allowed: none with model.family=word2vec",
        ),
        (["optimizer=adam"], "optimizer: got an optimizer with betas, eps, "),
        (["precision=bf16"], "precision: got 'bf16'; allowed: fp32"),
        (["device=cuda"], "device: got 'cuda'; allowed: auto, cpu"),
        (["model.windo=3"], "model.windo: got an unknown key; allowed: window"),
        (["model.architecture=skipgram"], "model.architecture: got 'skipgram'; allowed: skip_gram, cbow"),
        (["model.negatives=0"], "model.negatives: got 0; allowed: 1 to 64"),
        (
            ["model.min_count=100000"],
            "model.min_count: got 100000, which leaves none of 12 words; allowed: 1 to ",
        ),
        (["data.pattern=(a)"], "data.pattern: got '(a)'; allowed: an expression without groups"),
    ],
)
def test_a_setting_that_word_vectors_cannot_have_is_one_line(
    words: list[str], expected: str, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["model=word2vec", f"data.path={texts}", f"run.dir={tmp_path / 'run'}", *words]
    assert f"llmtrain: error: {expected}" in told(capsys, "train", *given)


def test_other_verbs_send_on(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("plan", "finetune"):
        assert "llmtrain train trains them" in told(capsys, verb, "model=glove")
    assert "model.family: got 'word2vec'" in told(capsys, "evaluate", f"checkpoint={finished}")


def test_a_resume_refuses_another_model_text_or_step(
    finished: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    given = ["model=word2vec", f"run.dir={run}", *TINY, "train.epochs=9"]
    here = [*given, f"data.path={texts}"]
    assert "another model (model.window=3 here, 5 there)" in told(capsys, "train", *here, "model.window=3")
    line = told(capsys, "train", "train.words_per_step=100", *[w for w in here if "words_per" not in w])
    assert "train.words_per_step: got 100 over a checkpoint of 2,000" in line
    assert "seed: got 1 over a checkpoint of 0" in told(capsys, "train", *here, "seed=1")
    (tmp_path / "other.txt").write_text("cat dog\n" * 30)
    assert "a text with other words" in told(capsys, "train", *given, f"data.path={tmp_path / 'other.txt'}")
    assert "which holds step-" in told(capsys, "train", *here, "checkpoint.resume=never")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["nearest", "RUN", "word=catt"],
            "word=catt: got 'catt', which is not among the 12 words of .*words such as cat",
        ),
        (["nearest", "RUN", "word=Cat"], "the vocabulary has 'cat'"),
        (["similarity", "RUN", "words=[cat,dogg]"], "words: dogg: got 'dogg'.*words such as dog"),
        (["similarity", "RUN"], "file and words: got neither; allowed: one of them"),
        (["analogy", "RUN", "words=[cat,dog]"], "words: got 2 words; allowed: 3"),
        (["similarity", "RUN", "file=/nowhere"], "/nowhere: got No such file or directory"),
        (["nearest", "/nowhere", "word=cat"], "/nowhere: got no such file or folder"),
        (["map", "RUN", "output=x.jpg"], "output: got x.jpg; allowed: a name that ends with .png"),
        (["import", "RUN", "output=x"], "Is a directory|a folder, not a file"),
    ],
)
def test_a_question_that_cannot_be_answered_is_one_line(
    words: list[str], expected: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word.replace("RUN", str(finished)) for word in words]
    assert re.search(expected, told(capsys, "vectors", *given))


def test_a_damaged_checkpoint_is_told(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    newest = list_steps(run / "checkpoints")[-1]
    content = (newest / "vocabulary.tsv").read_text()
    (newest / "vocabulary.tsv").write_text(content.replace("cat", "bat"))
    assert "another checksum" in told(capsys, "vectors", "nearest", str(newest), "word=cat")
    assert cli.run_verb("vectors_nearest", [f"checkpoint={run}", "word=cat"]) == 0
    assert f"damaged checkpoint passed over: {newest.name}" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "sent"), [("word2vec", signal.SIGKILL), ("glove", signal.SIGKILL), ("fasttext", signal.SIGTERM)]
)
def test_a_killed_run_resumes_bit_by_bit(
    model: str, sent: signal.Signals, texts: Path, tmp_path: Path
) -> None:
    def arguments(run: Path) -> list[str]:
        tiny = [key for key in TINY if model != "glove" or "subsample" not in key]
        tiny = ["train.words_per_step=100" if "words_per" in key else key for key in tiny]
        few = ["model.buckets=100"] if model == "fasttext" else []
        epochs = "train.epochs=150" if model == "glove" else "train.epochs=2"
        return [
            "train",
            f"model={model}",
            f"data.path={texts}",
            f"run.dir={run}",
            *tiny,
            *few,
            epochs,
            "checkpoint.every=9",
        ]

    done = llmtrain(*arguments(tmp_path / "whole"))
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    process = start(*arguments(run))
    while not list_steps(run / "checkpoints"):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.001)
    process.send_signal(sent)
    process.wait(60)
    assert process.returncode == (-9 if sent == signal.SIGKILL else 75)
    before = list_steps(run / "checkpoints")[-1]
    done = llmtrain(*arguments(run))
    assert done.returncode == 0, done.stderr
    assert f"resuming from {before}" in done.stderr
    ours, theirs = (
        Checkpoint.open(list_steps(path / "checkpoints")[-1]) for path in (run, tmp_path / "whole")
    )
    assert ours.step == theirs.step > int(before.name.removeprefix("step-"))
    assert ours.manifest["files"] == theirs.manifest["files"]  # vectors and state, by checksum
    curves = [
        [(row["step"], row.get("loss"), row["lr"]) for row in read_metrics(path / "metrics.jsonl")]
        for path in (run, tmp_path / "whole")
    ]
    assert curves[0] == curves[1]


def test_the_status_of_a_run_is_told(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_verb("status", [str(finished)]) == 0
    steps = yaml.safe_load((finished / "config.yaml").read_text())["train"]["steps"]
    said = capsys.readouterr().out
    assert re.search(rf"{steps}.*{steps}", said)
