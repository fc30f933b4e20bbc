"""Tasks of the lm-evaluation-harness in files: a choice among continuations, one among letters, the
perplexity of texts, and texts to write."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

TASKS = ("choice", "letters", "texts", "writing")
WORDS = [
    "the",
    "film",
    "was",
    "a",
    "fine",
    "old",
    "tale",
    "of",
    "two",
    "men",
    "and",
    "one",
    "dog",
    "that",
    "nobody",
    "who",
    "saw",
    "it",
    "will",
    "soon",
    "forget",
]
TEMPLATE = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    train: {folder}/{name}.train.jsonl
    validation: {folder}/{name}.jsonl
training_split: train
validation_split: validation
output_type: {kind}
{rest}
metadata:
  version: 1.0
"""
CHOICE = """\
doc_to_text: "{{question}}"
doc_to_target: "{{label}}"
doc_to_choice: "{{choices}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""
ROLLING = """\
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
    aggregation: weighted_perplexity
    higher_is_better: false
  - metric: bits_per_byte
    aggregation: bits_per_byte
    higher_is_better: false
"""
WRITING = """\
doc_to_text: "{{question}}"
doc_to_target: " {{answer}}"
num_fewshot: 1
generation_kwargs:
  until: ["."]
  do_sample: false
  max_gen_toks: 8
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


def write_tasks(folder: Path, documents: int = 12) -> Path:
    """Write the files of TASKS into a folder; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)

    def words(least: int, most: int) -> str:
        return " ".join(draw.choice(WORDS, draw.integers(least, most + 1)))

    def choice() -> dict[str, Any]:
        # A context that ends with a space, and one that is empty, have rules of their own.
        question = words(3, 12) + (" " if draw.random() < 0.3 else "")
        choices = [words(1, 4) for _ in range(3)]
        return {
            "question": "" if draw.random() < 0.1 else question,
            "choices": choices,
            "label": int(draw.integers(3)),
        }

    def letters() -> dict[str, Any]:
        return {"question": words(3, 12), "choices": ["A", "B", "C", "D"], "label": int(draw.integers(4))}

    makers = {
        "choice": ("multiple_choice", CHOICE, choice),
        "letters": ("multiple_choice", CHOICE, letters),
        "texts": ("loglikelihood_rolling", ROLLING, lambda: {"text": words(2, 80)}),
        "writing": (
            "generate_until",
            WRITING,
            lambda: {"question": words(3, 12), "answer": str(draw.choice(WORDS))},
        ),
    }
    for name, (kind, rest, make) in makers.items():
        for suffix, count in ((".train", 4), ("", documents)):
            lines = [json.dumps(make()) for _ in range(count)]
            (folder / f"{name}{suffix}.jsonl").write_text("\n".join(lines) + "\n")
        (folder / f"{name}.yaml").write_text(TEMPLATE.format(name=name, folder=folder, kind=kind, rest=rest))
    return folder


def numbers(results: Mapping[str, Any], tasks: Sequence[str] = TASKS) -> dict[str, dict[str, Any]]:
    """Task → its figures and their errors, of results as the harness gives them."""
    about = ("alias", "name", "sample_len", " ")
    return {
        task: {key: value for key, value in results["results"][task].items() if key not in about}
        for task in tasks
    }
