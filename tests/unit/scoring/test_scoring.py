"""Figures are those of scikit-learn and scipy; entities those of the CoNLL evaluation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from seqeval import metrics as seqeval
from sklearn import metrics
from sklearn.calibration import calibration_curve

from llmtrain.scoring.answers import exact_match, overlap
from llmtrain.scoring.classification import (
    CLASS_FIGURES,
    LABEL_FIGURES,
    calibration_error,
    class_figures,
    class_report,
    label_figures,
    label_report,
)
from llmtrain.scoring.regression import value_figures
from llmtrain.scoring.report import BINS, Reliability
from llmtrain.scoring.tagging import FIGURES as TAG_FIGURES
from llmtrain.scoring.tagging import Entity, entities, tag_figures, tag_report

SEQEVAL_KEYS = ("precision", "recall", "f1-score", "support")


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
        "precision_micro": metrics.precision_score(labels, predicted, average="micro"),
        "precision_weighted": metrics.precision_score(labels, predicted, average="weighted"),
        "recall_micro": metrics.recall_score(labels, predicted, average="micro"),
        "recall_weighted": metrics.recall_score(labels, predicted, average="weighted"),
        "matthews": metrics.matthews_corrcoef(labels, predicted),
        "roc_auc": area,
    }
    assert {*expected, "calibration_error"} == {*figures} == {*CLASS_FIGURES}
    quick = class_figures(probabilities, labels, intervals=False)
    for name, value in expected.items():
        assert figures[name].value == pytest.approx(value, abs=1e-12), name
        assert figures[name].low < figures[name].value < figures[name].high
        assert quick[name].value == figures[name].value
        assert np.isnan(quick[name].low)
    report = class_report(probabilities, labels, [str(c) for c in range(classes)])
    assert report.matrix is not None
    assert (report.matrix == metrics.confusion_matrix(labels, predicted)).all()
    theirs = metrics.precision_recall_fscore_support(labels, predicted)
    for c in range(classes):
        assert list(report.classes[str(c)].values()) == pytest.approx([of_class[c] for of_class in theirs])


def test_calibration_is_the_mean_distance_of_the_bins() -> None:
    draw = np.random.default_rng(3)
    confidence = draw.random(500)
    correct = draw.random(500) < confidence**2
    share_right, mean_confidence = calibration_curve(correct, confidence, n_bins=BINS)
    curve = Reliability.of(confidence, correct)
    assert curve.correct / curve.rows == pytest.approx(share_right)
    assert curve.confidence / curve.rows == pytest.approx(mean_confidence)
    expected = (curve.rows * np.abs(share_right - mean_confidence)).sum() / 500
    assert calibration_error(confidence, correct) == pytest.approx(expected)
    assert calibration_error(np.array([1.0, 0.0]), np.array([True, False])) == 0.0


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
    for average in ("macro", "micro", "weighted"):
        for name, score in (("precision", metrics.precision_score), ("recall", metrics.recall_score)):
            assert figures[f"{name}_{average}"].value == pytest.approx(
                score(truth, predicted, average=average)
            )
    weighted = metrics.f1_score(truth, predicted, average="weighted")
    assert figures["f1_weighted"].value == pytest.approx(weighted)
    assert {*figures} == {*LABEL_FIGURES}
    report = label_report(probabilities, truth, list("abcd"))
    theirs = metrics.precision_recall_fscore_support(truth, predicted)
    for c, name in enumerate("abcd"):
        assert list(report.classes[name].values()) == pytest.approx([of_label[c] for of_label in theirs])
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
    for name in ("pearson", "spearman"):
        assert figures[name].low < figures[name].value < figures[name].high
    # The interval is that of Fisher's transformation (Fisher 1921), but for the noise of the bootstrap.
    fisher = stats.pearsonr(predicted, truth).confidence_interval(0.95)
    assert figures["pearson"].low == pytest.approx(fisher.low, abs=0.05)
    assert figures["pearson"].high == pytest.approx(fisher.high, abs=0.05)


@pytest.mark.parametrize("constant", ["predicted", "truth"])
def test_no_correlation_with_what_does_not_vary(constant: str) -> None:
    varied, same = np.arange(12.0), np.full(12, 0.1)
    figures = value_figures(*((same, varied) if constant == "predicted" else (varied, same)))
    assert np.isnan(figures["pearson"].value)
    assert np.isnan(figures["spearman"].value)
    assert str(figures["pearson"]) == "not defined on these rows"
    assert np.isfinite(figures["mean_squared_error"].value)


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


PREFIXES = {"BIO": "BI", "IO": "I", "BIOES": "BIES"}


@pytest.mark.parametrize("scheme", list(PREFIXES))
def test_figures_of_entities_are_those_of_seqeval(scheme: str) -> None:
    draw = np.random.default_rng(4)
    names = ["O", *(f"{prefix}-{kind}" for prefix in PREFIXES[scheme] for kind in ("PER", "LOC", "ORG"))]
    # Tags at random break each rule of the scheme: seqeval reads them leniently, as conlleval does.
    truth = [[str(tag) for tag in draw.choice(names, draw.integers(1, 12))] for _ in range(200)]
    said = [[tag if draw.random() < 0.7 else str(draw.choice(names)) for tag in tags] for tags in truth]
    figures = tag_figures(said, truth)
    assert {*figures} == {*TAG_FIGURES}
    assert figures["entity_f1"].value == pytest.approx(seqeval.f1_score(truth, said))
    assert figures["entity_precision"].value == pytest.approx(seqeval.precision_score(truth, said))
    assert figures["entity_recall"].value == pytest.approx(seqeval.recall_score(truth, said))
    assert figures["accuracy"].value == pytest.approx(seqeval.accuracy_score(truth, said))
    theirs = seqeval.classification_report(truth, said, output_dict=True)
    report = tag_report(said, truth, names)
    assert list(report.classes) == ["LOC", "ORG", "PER"]
    for kind, of_type in report.classes.items():
        ours = [of_type["precision"], of_type["recall"], of_type["f1"], of_type["rows"]]
        assert ours == pytest.approx([theirs[kind][key] for key in SEQEVAL_KEYS])
    assert report.matrix is not None
    assert report.matrix.sum() == sum(map(len, truth))


@pytest.mark.parametrize(
    ("said", "answers", "exact", "shared"),
    [
        ("the Eiffel Tower", ["Eiffel Tower", "tower"], 1, 1),
        ("Eiffel  tower!", ["The Eiffel-Tower"], 0, 0),  # punctuation is left out: "eiffeltower"
        ("in 1889", ["1889", "the year 1889"], 0, 2 / 3),
        ("Paris", [""], 0, 0),
        ("a an the", [""], 1, 1),
        ("an apple a day", ["the apple", "day"], 0, 2 / 3),
        ("Denver Broncos denver", ["denver"], 0, 1 / 2),
        ("U.S.", ["US", "u s"], 1, 1),
        ("the theatre", ["theatre the"], 1, 1),
        ("Zürich, Basel", ["Basel and Zürich"], 0, 4 / 5),
        ("10,000", ["10000"], 1, 1),
        ("x x y", ["x y y", "x"], 0, 2 / 3),
    ],
)
def test_answers_score_as_in_squads_script(
    said: str, answers: list[str], exact: float, shared: float
) -> None:
    """The numbers are those that torchmetrics' copy of SQuAD's script gives."""
    assert exact_match(said, answers) == exact
    assert overlap(said, answers) == pytest.approx(shared)
