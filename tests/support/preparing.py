"""Sources of random words, what `prepare` makes of them, and what a corpus holds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.corpus.corpus import Corpus
from llmtrain.prepare.config import PrepareConfig, SplitConfig
from llmtrain.tokenizers.config import TokenizerConfig
from llmtrain.tokenizers.folder import load_tokenizer

SPLITS = ("train", "validation", "test")


def texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice([*"aeioubcdfglmnrstü"], rng.integers(2, 9))) for _ in range(300)]
    return [f"{seed}-{i} " + " ".join(rng.choice(words, rng.integers(3, 40))) for i in range(count)]


def write(path: Path, documents: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def config(output: Path, *source: Path | str, **changes: Any) -> PrepareConfig:
    base = PrepareConfig(
        source=tuple(map(str, source)),
        output=output,
        tokenizer=TokenizerConfig(vocab_size=340),
        split=SplitConfig(validation=0.2, test=0.1),
        sample_tokens=500,
        tar_bytes=20_000,
        workers=1,
    )
    return replace(base, **changes)


def documents_of(output: Path) -> dict[str, list[str]]:
    """Text of each split's documents, read back by the corpus' reader."""
    corpus = Corpus.open(output, verify="checksum")
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    found: dict[str, list[str]] = {}
    for name in SPLITS:
        split = corpus.split(name)
        if not split.num_documents:
            found[name] = []
            continue
        tokens, ends = split.read(0, split.num_tokens)
        starts = [0, *ends[:-1]]
        found[name] = [
            tokenizer.decode(tokens[a : b - 1].tolist()) for a, b in zip(starts, ends, strict=True)
        ]
    return found


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
