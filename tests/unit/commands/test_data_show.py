"""`llmtrain data show`: the text that a run or a configuration reads."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support.data_verbs import call, train
from tests.support.warm import llmtrain

TEXT = re.compile(r"^    (.*)$", re.MULTILINE)


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps over text."""
    folder = tmp_path_factory.mktemp("run") / "run"
    train(f"data.path={corpus}", f"run.dir={folder}", "train.steps=2")
    return folder


def texts(corpus: Path) -> dict[int, str]:
    source = corpus.parent / "text.jsonl"
    return dict(enumerate(json.loads(line)["text"] for line in source.read_text().splitlines()))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("data.packing=best_fit",),
        ("data.packing=best_fit", "data.overlap=6"),
        ("data.mixture={a: 1, b: 1}",),
    ],
    ids=" ".join,
)
def test_show_without_a_run(corpus: Path, capsys: pytest.CaptureFixture[str], overrides: tuple[str, ...]):
    place = [f"data.path={corpus}"]
    if "mixture" in str(overrides):
        place = [f"data.sources={{a: {corpus}, b: {corpus}}}"]
    settings = ("sequence_length=48", "max_samples=6", "data.cache.dir=/no/such", *place, *overrides)
    if overrides and "best_fit" in overrides[0]:
        settings = (*settings, f"data.cache.dir={corpus.parent / 'rows'}")
    code, lines, problems = call(capsys, "show", *settings)
    assert (code, problems) == (0, [])
    titles = [line for line in lines if line.startswith("sample ")]
    assert [title.split(":")[0] for title in titles] == [f"sample {i}" for i in range(6)]
    known = texts(corpus)
    shown = TEXT.findall("\n".join(lines))
    assert len(shown) >= 6
    for text in shown:
        plain = text.replace("⟦", "").replace("⟧", "")
        assert any(plain.strip() in whole for whole in known.values()), text
        # What comes first in a row or a document has nothing to be predicted from.
        assert text.startswith("⟦")


def test_contexts_are_marked(corpus: Path, capsys: pytest.CaptureFixture[str]):
    """Documents longer than a row: with overlap=9, parts but the first begin with 10 tokens without loss."""
    settings = (f"data.path={corpus}", "sequence_length=16", "max_samples=40")
    settings = (*settings, f"data.cache.dir={corpus.parent / 'rows'}", "data.packing=best_fit")
    _, lines, _ = call(capsys, "show", *settings, "data.overlap=9")
    told = [int(line.split()[-4]) for line in lines if line.startswith("sample ")]
    assert min(told) <= 7 < max(told) <= 16
    marked = [text.index("⟧") for text in TEXT.findall("\n".join(lines)) if "⟧" in text]
    assert max(marked) > 10
    assert min(marked) <= 10


def test_show_of_a_run(run: Path, corpus: Path, capsys: pytest.CaptureFixture[str]):
    code, lines, _ = call(capsys, "show", run, "step=2", "max_samples=3")
    assert code == 0
    titles = [line for line in lines if line.startswith("step ")]
    assert [title.split(":")[0] for title in titles] == [f"step 2, sample {i}" for i in (8, 9, 10)]
    traced = call(capsys, "trace", run, "step=2")[1]
    documents = [line.split()[-2:] for line in traced if line.split()[0] in ("8", "9", "10")]
    shown = [line.split() for line in lines if line.startswith("  document ")]
    assert [[words[1], words[-2]] for words in shown] == documents
    known = texts(corpus)
    for text in TEXT.findall("\n".join(lines)):
        assert any(text.replace("⟦", "").replace("⟧", "").strip() in whole for whole in known.values())


def test_images_have_rows_and_no_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "run"
    settings = ("train.steps=2", "device=cpu", "evaluation.every=null", "evaluation.at_start=false")
    done = llmtrain("train", "experiment=mnist_cnn", f"run.dir={run}", *settings)
    assert done.returncode == 0, done.stderr
    code, lines, _ = call(capsys, "trace", run, "step=1:2")
    assert code == 0
    assert lines[0].split() == ["step", "sample", "epoch", "row"]
    assert all(line.endswith("as recorded") for line in lines[-2:])
    code, _, (problem,) = call(capsys, "show", run)
    assert code == 2
    assert "data.kind: got images, which have no text" in problem
