"""launch/baselines.sh, shortened: a part of it at each commit, and the page of what there is."""

from __future__ import annotations

import csv
import json
from itertools import islice
from pathlib import Path

import pytest

from tests.support.training import REPOSITORY
from tests.support.warm_program import warm_environment, warm_program
from tests.test_readme import REVIEWS, run

PARTS = {
    ("xor", "digits"): {"xor", "mlp", "simple_cnn", "resnet20"},
    ("generators", "optimizers"): {"simple_cnn", "gan", "dcgan", "wgan_gp"},
    ("words",): {"language_gru", "sentiment_bilstm", "sentiment_attention_lstm", "numbers_lstm", "tfidf"},
    ("vectors",): {"one_hot", "skip_gram", "cbow", "hierarchical", "fasttext", "glove"},
}
PICTURES = {
    "digits": ("simple_cnn/test.confusion.png", "resnet20/test.mistakes.png"),
    "generators": ("optimizers/curves.png",),
    "words": ("attention.png",),
    "vectors": ("map.png",),
}


@pytest.mark.long("trains up to eight small models by the script that a user starts")
@pytest.mark.in_turns(4)
@pytest.mark.parametrize("parts", list(PARTS), ids="-".join)
def test_all_baselines_by_one_command(parts: tuple[str, ...], tmp_path: Path) -> None:
    with open(REVIEWS, encoding="utf-8", newline="") as file:
        rows = list(islice(csv.DictReader(file), 0, None, 80))  # those of one label come first in the file
    source = tmp_path / "reviews.csv"
    with open(source, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    with warm_program(tmp_path, ("llmtrain", "python")) as programs:
        environment = str(warm_environment(tmp_path / "environment", programs))
        settings = {"FOLDER": str(tmp_path), "SOURCE": str(source), "ROWS": "60", "PERCENT": "1"}
        done = run(
            [f"{REPOSITORY}/launch/baselines.sh", *parts],
            tmp_path,
            **settings,
            OMP_NUM_THREADS="1",
            VIRTUAL_ENV=environment,
        )
    assert done.returncode == 0, done.stdout
    runs = tmp_path / "runs/baselines"
    page = (runs / "baselines.html").read_text()
    text = (runs / "baselines.md").read_text()
    trained = {path.name for path in runs.iterdir() if path.is_dir()}
    assert PARTS[parts] <= trained
    for name in (picture for part in parts for picture in PICTURES.get(part, ())):
        assert f"![{name}]({name})" in text
        assert f'alt="{name}" src="data:image/png;base64,' in page
    if "xor" in parts:
        figures = json.loads((runs / "xor/test.json").read_text())
        assert figures["accuracy"] == 1.0
        assert "| MLP 2-3-1 | 13 |" in text
    if parts == ("vectors",):
        assert "| one-hot |" in text
        for name in PARTS[parts]:
            nearest = json.loads((runs / name / "nearest-film.json").read_text())["nearest"]
            assert len(nearest) == 6
            assert ", ".join(each["word"] for each in nearest) in text
    again = run(
        [f"{REPOSITORY}/launch/baselines.sh", "unknown"], tmp_path, FOLDER=str(tmp_path), VIRTUAL_ENV=""
    )
    assert again.returncode == 2
    assert "got the part unknown; allowed: xor digits" in again.stdout
