"""Print the table of finetune.sh: each run on the test split, beside TF-IDF with logistic regression.

python launch/finetune_table.py RUNS source=FILE rows=N
"""

from __future__ import annotations

import csv
import json
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmtrain.checkpoint.manifest import WEIGHT
from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.checkpoint.retention import list_steps
from llmtrain.corpus.packages import resolve_package_path
from llmtrain.prepare.clean import split_of
from llmtrain.scoring.classification import class_figures
from llmtrain.tables.build import text_hashes

VALIDATION, TEST = 0.05, 0.1
"""Shares that finetune.sh holds out."""
TITLES = {
    "scratch": "from scratch",
    "full": "pre-trained, full",
    "gradual": "pre-trained, gradual",
    "freeze": "pre-trained, one layer frozen",
    "features": "pre-trained, features",
    "lora": "pre-trained, LoRA",
    "adapter": "pre-trained, adapter",
    "prefix": "pre-trained, prefix",
    "prompt": "pre-trained, soft prompt",
    "bitfit": "pre-trained, BitFit",
    "prompted_0": "prompt without examples",
    "prompted_32": "prompt, 32 examples",
    "prompted": "prompt, tuned",
    "lstm": "LSTM from scratch",
}


class Row(NamedTuple):
    """One line of the table."""

    title: str
    trained: int
    """Parameters that were trained."""
    seconds: float
    accuracy: float
    low: float
    high: float


def parameters_of(run: Path, trained_alone: bool = False) -> int:
    """Return how many parameters the newest checkpoint of a run has, or how many of them it trained."""
    checkpoint = Checkpoint.open(list_steps(run / "checkpoints")[-1])
    weights = checkpoint.manifest["tensors"][WEIGHT]
    left_out = checkpoint.statistics | (checkpoint.frozen if trained_alone else frozenset())
    return sum(math.prod(w["shape"]) for name, w in weights.items() if name not in left_out)


def reviews_of(source: str) -> tuple[list[dict[str, str]], np.ndarray, np.ndarray]:
    """Return the rows of the reviews, the hashes of their texts and the split of each: 0 train, 1 validation,
    2 test."""
    path = resolve_package_path(source) if source.startswith("package:") else source
    with open(path, encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["text"].strip()]
    hashes = text_hashes([row["text"] for row in rows])
    return rows, hashes, split_of(hashes[:, 1], VALIDATION, TEST)


def of_run(title: str, run: Path) -> Row:
    figures = json.loads((run / "test.json").read_text())
    trained = parameters_of(run, trained_alone=True) if (run / "checkpoints").exists() else 0
    seconds = sum(map(float, (run / "seconds").read_text().split()))
    return Row(title, trained, seconds, figures["accuracy"], *figures["accuracy_interval"])


def of_words(source: str, most: int) -> Row:
    """Return TF-IDF of words and pairs of words, with the logistic regression that is best on validation."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    read, hashes, of_split = reviews_of(source)
    rows = [(row["text"], row["label"]) for row in read]
    started = time.perf_counter()
    numbers = [np.flatnonzero(of_split == split) for split in range(3)]
    # The rows that data.max_train_rows keeps.
    numbers[0] = numbers[0][np.argsort(hashes[numbers[0], 0], kind="stable")[:most]]
    texts = [[rows[i][0] for i in part] for part in numbers]
    names = sorted({label for _, label in rows})
    labels = [np.array([names.index(rows[i][1]) for i in part]) for part in numbers]
    vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2)
    train, validation, test = vectorizer.fit_transform(texts[0]), *map(vectorizer.transform, texts[1:])
    fitted = [LogisticRegression(C=c, max_iter=1000).fit(train, labels[0]) for c in (0.3, 1, 3, 10, 30)]
    best = max(fitted, key=lambda each: each.score(validation, labels[1]))
    accuracy = class_figures(best.predict_proba(test), labels[2])["accuracy"]
    return Row("TF-IDF, logistic regression", best.coef_.size + 1, time.perf_counter() - started, *accuracy)


def main() -> None:
    runs, *keys = sys.argv[1:]
    given = dict(key.split("=", 1) for key in keys)
    rows = [of_run(title, Path(runs) / name) for name, title in TITLES.items()]
    rows.append(of_words(given["source"], int(given["rows"])))
    print(f"{'':<32}{'trained':>12}{'seconds':>9}  accuracy")
    for row in rows:
        interval = f"{row.accuracy:.4f} [{row.low:.4f}, {row.high:.4f}]"
        print(f"{row.title:<32}{row.trained:>12,}{row.seconds:>9.0f}  {interval}")


if __name__ == "__main__":
    main()
