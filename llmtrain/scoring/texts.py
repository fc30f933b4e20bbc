"""Figures of texts that a model writes: ROUGE (Lin 2004), as the package rouge-score counts it, and BLEU
(Papineni et al. 2002) and chrF (Popović 2015), as sacrebleu counts them (arXiv:1804.08771)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from llmtrain.errors import ConfigError, Problem
from llmtrain.scoring.figure import RESAMPLES, Figure, bootstrap

ROUGE = ("rouge1", "rouge2", "rougeL")
MEASURES = ("bleu", "chrf", *ROUGE)
PACKAGES = {"sacrebleu": "sacrebleu", "rouge_score": "rouge-score"}
"""Module → package."""


def missing_packages() -> list[str]:
    """Return the packages that count and are not installed."""
    return [package for module, package in PACKAGES.items() if find_spec(module) is None]


def check_packages(key: str) -> None:
    """Raise ConfigError without the packages that count. key: the key that asks for these figures."""
    if missing := missing_packages():
        got = f"figures of texts without the package{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
        remedy = f'pip install "llmtrain[seq2seq]", or give {key}=false'
        raise ConfigError(Problem(key, got, "", remedy))


def text_figures(
    written: Sequence[str], references: Sequence[Sequence[str]], intervals: bool = True
) -> dict[str, Any]:
    """Return the figures of texts of which each has one right answer or several, with their intervals, and
    the signature of BLEU. ROUGE is the mean over rows of F1, 0 to 1, of stemmed words, of the best reference
    of each row; BLEU and chrF are of the whole corpus, 0 to 100."""
    by_row = _rouge_of_rows(written, references)
    resamples = RESAMPLES if intervals else 0
    figures: dict[str, Any] = bootstrap(
        lambda rows: dict(zip(ROUGE, by_row[rows].mean(0).tolist(), strict=True)), len(written), resamples
    )
    corpora, signature = _sacrebleu(written, references, resamples)
    return {**figures, **corpora, "bleu_signature": signature}


def _rouge_of_rows(written: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Return F1 of each row and kind of ROUGE, (N, 3)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(ROUGE, use_stemmer=True)
    rows = []
    for text, right in zip(written, references, strict=True):
        scores = scorer.score_multi(right, text)
        rows.append([scores[kind].fmeasure for kind in ROUGE])
    return np.array(rows)


def _sacrebleu(
    written: Sequence[str], references: Sequence[Sequence[str]], resamples: int
) -> tuple[dict[str, Figure], str]:
    """Return BLEU and chrF, and the signature of BLEU."""
    from sacrebleu.metrics import BLEU, CHRF

    # A stream for each place among the references; rows with fewer have none there.
    most = max(map(len, references))
    streams: Any = [[right[i] if i < len(right) else None for right in references] for i in range(most)]
    bleu, chrf = BLEU(), CHRF()
    figures: dict[str, Figure] = {}
    for name, metric in (("bleu", bleu), ("chrf", chrf)):
        # The counts of each row, whose sums over rows give the score.
        counts = np.array(metric._extract_corpus_statistics(list(written), streams))
        figures |= bootstrap(partial(_of_rows, name, metric, counts), len(written), resamples)
    return figures, str(bleu.get_signature())


def _of_rows(name: str, metric: Any, counts: np.ndarray, rows: np.ndarray) -> dict[str, float]:
    return {name: float(metric._compute_score_from_stats(counts[rows].sum(0).tolist()).score)}
