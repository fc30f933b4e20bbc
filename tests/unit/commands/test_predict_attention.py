"""`llmtrain predict attention=FILE`: the weights of the words of a text, as HTML and as a picture."""

from __future__ import annotations

import csv
import re
from html import unescape
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llmtrain.cli import main as cli
from llmtrain.scoring.attention import COLUMNS, AttendedText, as_html, as_png

WORDS = ["the", "film", "was", "a", "fine", "old", "tale", "of", "two", "men", "<b>", "one", "dog"]


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reviews") / "reviews.csv"
    draw = np.random.default_rng(0)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for number in range(240):
            words = [*draw.choice(WORDS, 8), ("awful", "great")[number % 2]]
            draw.shuffle(words)
            writer.writerow([" ".join(words), ("bad", "good")[number % 2]])
    return path


def tune(reviews: Path, corpus: Path, run: Path, *more: str) -> None:
    words = [f"data.path={reviews}", f"data.tokenizer={corpus}", f"data.cache.dir={run / 'cache'}"]
    words += ["objective=classification", "data.split.validation=0.2", f"run.dir={run}", *more]
    words += ["batch.global_size=16", "batch.sequence_length=64", "optimizer.lr=1e-2", "model.hidden_size=16"]
    assert cli.run_verb("finetune", words) == 0


def spans_of(page: str) -> list[list[tuple[str, float]]]:
    """Return (token, weight) of each text of a page."""
    texts = re.findall(r"<h2>.*?<p>(.*?)</p>", page, re.S)
    marks = [re.findall(r'<span style="[^"]*" title="([0-9.]+)">(.*?)</span>', text) for text in texts]
    return [[(unescape(token), float(weight)) for weight, token in of_text] for of_text in marks]


def test_the_word_that_decides_has_the_weight(
    reviews: Path, corpus: Path, tmp_path: Path, capsys: Any
) -> None:
    run, page, picture = tmp_path / "run", tmp_path / "a.html", tmp_path / "a.png"
    tune(reviews, corpus, run, "model=attention_lstm", "train.epochs=6")
    words = [f"checkpoint={run}", f"input={reviews}", f"output={tmp_path / 'said.jsonl'}", "attention_rows=4"]
    assert cli.run_verb("predict", [*words, f"attention={page}"]) == 0
    text = page.read_text()
    assert "<b>" not in re.findall(r"<p>(.*?)</p>", text, re.S)[1], "texts are escaped"
    found = spans_of(text)
    assert len(found) == 4
    rows = list(csv.DictReader(reviews.open()))
    for of_text, row in zip(found, rows, strict=False):
        assert "".join(token for token, _ in of_text).replace(" ", "") == row["text"].replace(" ", "")
        assert sum(weight for _, weight in of_text) == pytest.approx(1.0, abs=0.01)
        assert f"label {row['label']}, prediction {row['label']}" in text
    # A word may be several pieces, of which any may have the weight.
    strongest = [max(of_text, key=lambda each: each[1])[0].strip() for of_text in found]
    assert all(piece and (piece in "awful" or piece in "great") for piece in strongest), strongest
    assert cli.run_verb("predict", [*words, f"attention={picture}"]) == 0
    assert Image.open(picture).size[0] > 1000

    assert cli.run_verb("predict", [*words, f"attention={tmp_path / 'a.pdf'}"]) == 2
    assert "a name with .html or .png, or null" in capsys.readouterr().err


def test_a_model_without_attention(reviews: Path, corpus: Path, tmp_path: Path, capsys: Any) -> None:
    tune(reviews, corpus, tmp_path / "run", "model=gru", "train.epochs=1")
    words = [f"checkpoint={tmp_path / 'run'}", f"input={reviews}", f"output={tmp_path / 'said.jsonl'}"]
    assert cli.run_verb("predict", [*words, f"attention={tmp_path / 'a.html'}"]) == 2
    said = capsys.readouterr().err
    assert "attention: got a drawing with model.family=gru without attention over its states" in said
    assert "train with model=attention_lstm" in said
    assert not (tmp_path / "said.jsonl").exists()


def test_marks_lie_on_their_words() -> None:
    """Each head by itself in HTML; in the picture, color where the weight is, on each of its lines."""
    text = " ".join(["word"] * 60) + " $x$ & <i>"
    spans = [(5 * i, 5 * i + 4) for i in range(60)]
    weights = np.zeros((2, 60))
    weights[0, 3] = weights[1, 40] = 1.0
    attended = AttendedText("label 1", text, spans, weights)
    page = as_html([attended], "a & b")
    assert "<title>a &amp; b</title>" in page
    assert page.count("head 0") == page.count("head 1") == 1
    assert "<i> $x$ &amp; &lt;i&gt;</i>" in page, "what was not read is grey"
    [marks] = spans_of(page)
    assert [i for i, (_, weight) in enumerate(marks) if weight > 0.4] == [3, 40]
    pixels = np.array(Image.open(BytesIO(as_png([attended], "title")))).astype(int)
    orange = (pixels[..., 0] > 200) & (pixels[..., 2] < 100)
    height, width = orange.shape
    column = width / (COLUMNS + 2)
    middles = [np.flatnonzero(orange[y]) for y in range(18, height, 20)]
    places = [(found.min() / column - 1, found.max() / column - 1) for found in middles if len(found) > 3]
    assert [round(begin) for begin, _ in places] == [15, 200 - 110]
    assert all(end - begin == pytest.approx(4, abs=0.3) for begin, end in places)
