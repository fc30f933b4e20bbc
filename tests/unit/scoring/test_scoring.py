"""Figures are those of scikit-learn and scipy; entities those of the CoNLL evaluation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from llmtrain.scoring.classification import class_figures, label_figures
from llmtrain.scoring.regression import value_figures
from llmtrain.scoring.tagging import Entity, entities, tag_figures


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_figures_of_classes_are_those_of_scikit_learn(classes: int) -> None:
    draw = np.random.default_rng(classes)
    labels = draw.integers(0, classes, 300)
    logits = draw.normal(size=(300, classes)) + 1.5 * np.eye(classes)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    predicted = probabilities.argmax(1)
    figures = class_figures(probabilities, labels)
    area = (
        metrics.roc_auc_score(labels, probabilities[:, 1])
        if classes == 2
        else metrics.roc_auc_score(labels, probabilities, multi_class="ovr")
    )
    expected = {
        "accuracy": metrics.accuracy_score(labels, predicted),
        "balanced_accuracy": metrics.balanced_accuracy_score(labels, predicted),
        "precision_macro": metrics.precision_score(labels, predicted, average="macro"),
        "recall_macro": metrics.recall_score(labels, predicted, average="macro"),
        "f1_macro": metrics.f1_score(labels, predicted, average="macro"),
        "f1_micro": metrics.f1_score(labels, predicted, average="micro"),
        "f1_weighted": metrics.f1_score(labels, predicted, average="weighted"),
        "matthews": metrics.matthews_corrcoef(labels, predicted),
        "roc_auc": area,
    }
    for name, value in expected.items():
        assert figures[name].value == pytest.approx(value, abs=1e-12), name
        assert figures[name].low < figures[name].value < figures[name].high


def test_a_class_without_rows_counts_as_in_scikit_learn() -> None:
    labels, predicted = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 0])
    probabilities = np.eye(3)[predicted] * 0.8 + 0.1
    figures = class_figures(probabilities, labels)
    assert figures["f1_macro"].value == pytest.approx(metrics.f1_score(labels, predicted, average="macro"))
    assert figures["balanced_accuracy"].value == 0.5


def test_an_interval_covers_what_it_should() -> None:
    """Of accuracies of 0.7 over 200 rows, about 95 % of the intervals hold 0.7."""
    draw = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        right = draw.random(200) < 0.7
        probabilities = np.eye(2)[right.astype(int)] * 0.9 + 0.05
        figure = class_figures(probabilities, np.ones(200, np.int64))["accuracy"]
        held += figure.low <= 0.7 <= figure.high
    assert 88 <= held <= 100


def test_figures_of_several_labels_are_those_of_scikit_learn() -> None:
    draw = np.random.default_rng(1)
    truth = (draw.random((200, 4)) < 0.4).astype(np.float32)
    probabilities = np.clip(truth * 0.4 + draw.random((200, 4)) * 0.6, 0, 1)
    predicted = probabilities >= 0.5
    figures = label_figures(probabilities, truth)
    assert figures["f1_macro"].value == pytest.approx(metrics.f1_score(truth, predicted, average="macro"))
    assert figures["f1_micro"].value == pytest.approx(metrics.f1_score(truth, predicted, average="micro"))
    assert figures["exact_accuracy"].value == pytest.approx(metrics.accuracy_score(truth, predicted))
    assert figures["roc_auc"].value == pytest.approx(metrics.roc_auc_score(truth, probabilities))


def test_figures_of_numbers_are_those_of_scipy() -> None:
    draw = np.random.default_rng(2)
    truth = draw.integers(0, 6, 150).astype(float)
    predicted = truth + draw.normal(size=150)
    figures = value_figures(predicted, truth)
    assert figures["pearson"].value == pytest.approx(stats.pearsonr(predicted, truth)[0])
    assert figures["spearman"].value == pytest.approx(stats.spearmanr(predicted, truth)[0])
    assert figures["mean_squared_error"].value == pytest.approx(metrics.mean_squared_error(truth, predicted))


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        (["B-PER", "I-PER", "O"], [Entity(0, 2, "PER")]),
        (["I-PER", "I-PER", "I-LOC"], [Entity(0, 2, "PER"), Entity(2, 3, "LOC")]),
        (["B-PER", "B-PER"], [Entity(0, 1, "PER"), Entity(1, 2, "PER")]),
        (["B-PER", "I-LOC"], [Entity(0, 1, "PER"), Entity(1, 2, "LOC")]),
        (
            ["S-PER", "B-LOC", "E-LOC", "I-LOC"],
            [Entity(0, 1, "PER"), Entity(1, 3, "LOC"), Entity(3, 4, "LOC")],
        ),
        (["O"], []),
    ],
)
def test_entities_that_tags_spell(tags: list[str], expected: list[Entity]) -> None:
    assert entities(tags) == expected


def test_figures_of_tags() -> None:
    truth = [["B-PER", "I-PER", "O"], ["B-LOC", "O"]]
    said = [["B-PER", "I-PER", "O"], ["O", "B-LOC"]]
    figures = tag_figures(said, truth)
    assert figures["entity_precision"].value == 0.5
    assert figures["entity_recall"].value == 0.5
    assert figures["entity_f1"].value == 0.5
    assert figures["accuracy"].value == pytest.approx(3 / 5)
