"""CPU seconds of `method=features` over cached vectors against scikit-learn's LogisticRegression: the same
strengths of regularization in the same order, each started from the one before, and the best validation loss.

Vectors are drawn with correlated columns of falling variance, as those of a trunk are.
"""

from __future__ import annotations

import argparse
import time
import warnings
from functools import partial

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler

from llmtrain.features.config import FeaturesConfig
from llmtrain.features.path import solve_head
from llmtrain.nn.task_config import TaskHeadConfig

STRENGTHS = (0.1, 0.03, 0.01, 3e-3, 1e-3)


def drawn(rows: int, width: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    mixing = draw.normal(size=(width, width)) * np.logspace(0, -2, width)
    vectors = draw.normal(size=(rows, width)) @ mixing + draw.normal(size=width)
    scores = vectors @ draw.normal(size=(width, classes))
    labels = (1.5 * scores / scores.std() + draw.gumbel(size=scores.shape)).argmax(1)
    return vectors.astype(np.float32), labels


def ours(
    train: tuple[np.ndarray, np.ndarray], held: tuple[np.ndarray, np.ndarray], classes: int
) -> list[float]:
    """→ the validation losses."""
    head = TaskHeadConfig("classes", outputs=classes)
    solved = solve_head(head, FeaturesConfig(strengths=STRENGTHS), train, held)
    return [tried.validation_loss or 0.0 for tried in solved.tried]


def theirs(train: tuple[np.ndarray, np.ndarray], held: tuple[np.ndarray, np.ndarray]) -> list[float]:
    """→ the validation losses."""
    scaler = StandardScaler()
    rows, held_rows = scaler.fit_transform(train[0]), scaler.transform(held[0])
    model, losses = LogisticRegression(warm_start=True, max_iter=1000), []
    for strength in STRENGTHS:
        model.set_params(C=1 / (strength * len(rows)))
        model.fit(rows, train[1])
        losses.append(float(log_loss(held[1], model.predict_proba(held_rows))))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    print(f"{'classes':>8} {'ours, s':>9} {'theirs, s':>10} {'ratio':>6} {'loss, ours':>11} {'theirs':>8}")
    for classes in (2, 8):
        vectors, labels = drawn(options.rows + 4000, options.width, classes)
        train = vectors[:-4000], labels[:-4000]
        held = vectors[-4000:], labels[-4000:]
        contestants = {"ours": partial(ours, train, held, classes), "theirs": partial(theirs, train, held)}
        seconds = dict.fromkeys(contestants, float("inf"))
        losses = {}
        for _ in range(options.rounds):
            for name, run in contestants.items():
                started = time.process_time()
                losses[name] = min(run())
                seconds[name] = min(seconds[name], time.process_time() - started)
        ratio = seconds["theirs"] / seconds["ours"]
        print(
            f"{classes:>8} {seconds['ours']:>9.2f} {seconds['theirs']:>10.2f} {ratio:>6.2f} "
            f"{losses['ours']:>11.4f} {losses['theirs']:>8.4f}",
            flush=True,
        )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
