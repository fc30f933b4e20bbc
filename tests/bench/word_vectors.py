"""Words a second and Spearman's ρ of word vectors against gensim 4, on the same words, by turns.

    OMP_NUM_THREADS=1 python -m tests.bench.word_vectors reviews.csv [--words 2000000] [--seeds 5] \\
        [--reference GloVe/build]

Both read the same vocabulary and sentences, gensim by its fastest way (`corpus_file`), with the same
dimensions, window, negatives, sub-sampling, learning rate, epochs and threads; FastText with the same
buckets. A turn trains each once, timed by the CPU time of all threads and by the clock. Figures are of
WordSim-353 and SimLex-999, which gensim carries, for each seed; the table gives means, and the standard
deviation over the seeds. gensim has no GloVe: its counterpart are the authors' programs
(github.com/stanfordnlp/GloVe), with the same pairs, dimensions, weights, rate and epochs, where `--reference`
names the folder that `make` built them into. Rates of GloVe are pairs a second of training alone: counting
and shuffling of pairs are left out of both, starting and writing the vectors are in those of the programs.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.corpus.packages import resolve_package_path
from llmtrain.vectors.config import FastTextConfig, GloveConfig, TextsConfig, VectorKeys, Word2VecConfig
from llmtrain.vectors.files_in import composed, read_file
from llmtrain.vectors.keyed import WordVectors
from llmtrain.vectors.ngrams import Subwords
from llmtrain.vectors.questions import judge_similarity, read_pairs
from llmtrain.vectors.registry import build_trainer
from llmtrain.vectors.text import Text, open_text
from llmtrain.vectors.trainer import Setting

FILES = ("wordsim353.tsv", "simlex999.txt")
GLOVE_EPOCHS, GLOVE_RATE = 15, 0.05
AUTHORS_PAIR_BYTES = 16
KINDS: dict[str, VectorKeys] = {
    "skip-gram": Word2VecConfig(),
    "CBOW": Word2VecConfig(architecture="cbow"),
    "FastText": FastTextConfig(),
    "skip-gram, softmax": Word2VecConfig(loss="hierarchical_softmax"),
    "GloVe": GloveConfig(),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", nargs="+")
    parser.add_argument(
        "--words", type=int, default=2_000_000, help="of the text, from its beginning; 0: all"
    )
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--kinds", nargs="+", default=["skip-gram", "CBOW", "FastText", "GloVe"], choices=KINDS
    )
    parser.add_argument("--reference", type=Path, help="folder of the programs cooccur, shuffle and glove")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = cut(
            open_text(TextsConfig(path=tuple(options.path)), KINDS["CBOW"], Path(folder), print),
            options.words,
        )
        sentences = Path(folder) / "sentences.txt"
        write_sentences(text, sentences)
        print(
            f"{text.num_words:,} words, {len(text.words):,} different; {options.epochs} epochs, "
            f"{options.seeds} seeds"
        )
        for kind in options.kinds:
            compare(kind, text, sentences, Path(folder), options)


def cut(text: Text, words: int) -> Text:
    """→ the beginning of the text, with the words that occur in it five times or more."""
    if not words or words >= len(text.tokens):
        return text
    tokens = np.array(text.tokens[:words])
    counts = np.bincount(tokens[tokens >= 0], minlength=len(text.words))
    kept = np.argsort(-counts, kind="stable")
    kept = kept[counts[kept] >= 5]
    rows = np.full(len(text.words) + 1, -2, np.int32)
    rows[kept], rows[-1] = np.arange(len(kept)), -1
    tokens = rows[tokens]
    return Text([text.words[i] for i in kept], counts[kept], tokens[tokens > -2], "cut", text.vocabulary_file)


def write_sentences(text: Text, path: Path) -> None:
    """One document on each line, without rare words, so that both see the same windows."""
    with open(path, "w") as file:
        for document in np.split(text.tokens, np.flatnonzero(text.tokens == -1) + 1):
            if words := " ".join(text.words[i] for i in document.tolist() if i >= 0):
                file.write(words + "\n")


def compare(kind: str, text: Text, sentences: Path, folder: Path, options: argparse.Namespace) -> None:
    config = KINDS[kind]
    systems: dict[str, Callable[[int], tuple[WordVectors, float, float]]] = {
        "ours": lambda seed: ours(config, text, folder, seed, options)
    }
    if not isinstance(config, GloveConfig):
        systems["gensim"] = lambda seed: gensims(config, sentences, seed, options)
    elif options.reference:
        systems["authors"] = lambda seed: authors(config, text, sentences, folder, seed, options)
    runs: dict[str, list[tuple[float, float, list[float]]]] = {name: [] for name in systems}
    for seed in range(options.seeds):
        for name in list(systems)[:: -1 if seed % 2 else 1]:
            vectors, cpu, clock = systems[name](seed)
            figures = [rho(vectors, file) for file in FILES]
            runs[name].append((cpu, clock, figures))
            print(
                f"  {kind:<20}{name:<8} seed {seed}: {cpu:10,.0f} a CPU second, {clock:10,.0f} a second, "
                f"ρ {figures[0]:.4f} {figures[1]:.4f}",
                flush=True,
            )
    for name, of_system in runs.items():
        found = np.array([run[2] for run in of_system])
        spread = found.std(axis=0, ddof=1) if len(found) > 1 else np.zeros(len(FILES))
        rates = [np.mean([run[i] for run in of_system]) for i in (0, 1)]
        print(
            f"{kind:<20} {name:<8}{rates[0]:12,.0f} a CPU second {rates[1]:12,.0f} a second  "
            + "  ".join(
                f"{file.split('.')[0]} {m:.4f} ± {s:.4f}"
                for file, m, s in zip(FILES, found.mean(axis=0), spread, strict=False)
            )
        )
    if len(runs) > 1:
        ratios = [np.mean([a[i] / b[i] for a, b in zip(*runs.values(), strict=False)]) for i in (0, 1)]
        print(f"{kind:<20} ratio   {ratios[0]:.2f} by CPU time, {ratios[1]:.2f} by the clock", flush=True)


def ours(
    config: VectorKeys, text: Text, folder: Path, seed: int, options: argparse.Namespace
) -> tuple[WordVectors, float, float]:
    """→ vectors, and words (of GloVe pairs) for each second of CPU time and by the clock."""
    is_glove = isinstance(config, GloveConfig)
    rates = (GLOVE_RATE, 0.0) if is_glove else (0.025, 1e-4)
    trainer = build_trainer(config, Setting(text, folder, seed, 1_000_000, *rates, lambda _: None))
    epochs = GLOVE_EPOCHS if is_glove else options.epochs
    steps, trained = trainer.steps_per_epoch * epochs, 0
    cpu, clock = time.process_time(), time.perf_counter()
    for number in range(steps):
        trained += trainer.step(number, steps, options.threads).words
    cpu, clock = time.process_time() - cpu, time.perf_counter() - clock
    trained = trained if is_glove else text.num_words * epochs
    weights = trainer.weights()
    subwords = None
    if isinstance(config, FastTextConfig):
        subwords = Subwords(weights["grams"], config.shortest, config.longest)
    matrix = composed(text.words, weights["words"], subwords)
    if is_glove:
        matrix = matrix + weights["contexts"]
    return WordVectors(text.words, matrix), trained / cpu, trained / clock


def gensims(
    config: Any, sentences: Path, seed: int, options: argparse.Namespace
) -> tuple[WordVectors, float, float]:
    from gensim.models import FastText, Word2Vec

    keys: dict[str, Any] = {
        "vector_size": config.dimensions,
        "window": config.window,
        "negative": config.negatives if config.loss == "negative_sampling" else 0,
        "hs": int(config.loss == "hierarchical_softmax"),
        "sg": int(config.architecture == "skip_gram"),
        "min_count": 5,
        "sample": config.subsample,
        "workers": options.threads,
        "seed": seed + 1,
    }
    if isinstance(config, FastTextConfig):
        keys |= {"bucket": config.buckets, "min_n": config.shortest, "max_n": config.longest}
    model: Any = (FastText if isinstance(config, FastTextConfig) else Word2Vec)(**keys)
    model.build_vocab(corpus_file=str(sentences))
    words = model.corpus_total_words
    cpu, clock = time.process_time(), time.perf_counter()
    model.train(
        corpus_file=str(sentences),
        total_words=words,
        # Each of its threads counts its own sentences: against all of them the rate would fall but by a part.
        total_examples=model.corpus_count // options.threads,
        epochs=options.epochs,
    )
    cpu, clock = time.process_time() - cpu, time.perf_counter() - clock
    trained = words * options.epochs
    return WordVectors(model.wv.index_to_key, model.wv.vectors), trained / cpu, trained / clock


def authors(
    config: GloveConfig, text: Text, sentences: Path, folder: Path, seed: int, options: argparse.Namespace
) -> tuple[WordVectors, float, float]:
    """→ the same of GloVe's authors' programs."""
    words, pairs, shuffled, vectors = (folder / name for name in ("words", "pairs", "shuffled", "vectors"))

    def run(program: str, source: Path | None, to: Path | None, **keys: object) -> None:
        given = [word for key, value in keys.items() for word in (f"-{key.replace('_', '-')}", str(value))]
        with open(source or os.devnull, "rb") as stdin, open(to or os.devnull, "wb") as stdout:
            subprocess.run(
                [options.reference / program, "-verbose", "0", *given],
                stdin=stdin, stdout=stdout, stderr=subprocess.DEVNULL, cwd=folder, check=True,
            )  # fmt: skip

    if not pairs.exists():
        counts = zip(text.words, text.counts.tolist(), strict=True)
        words.write_text("".join(f"{word} {count}\n" for word, count in counts))
        window = {"window_size": config.window, "symmetric": int(config.symmetric)}
        run("cooccur", sentences, pairs, vocab_file=words, memory=2.0, **window)
    run("shuffle", pairs, shuffled, memory=2.0, seed=seed + 1)
    before, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    run(
        "glove", None, None, input_file=shuffled, vocab_file=words, save_file=vectors, seed=seed + 1,
        vector_size=config.dimensions, x_max=config.x_max, alpha=config.power, eta=GLOVE_RATE,
        iter=GLOVE_EPOCHS, threads=options.threads,
    )  # fmt: skip
    after, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - clock
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    trained = shuffled.stat().st_size // AUTHORS_PAIR_BYTES * GLOVE_EPOCHS
    return read_file(vectors.with_suffix(".txt")), trained / cpu, trained / clock


def rho(vectors: WordVectors, file: str) -> float:
    path = resolve_package_path(f"package:gensim/test/test_data/{file}")
    return judge_similarity(vectors, read_pairs(path), file).rho


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
