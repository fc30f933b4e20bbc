"""The kernel of word vectors against torch's gradients, and its tables against references."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from ctypes import byref, c_double
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from llmtrain.errors import ConfigError
from llmtrain.vectors import kernel
from llmtrain.vectors.config import FastTextConfig, PredictionKeys, Word2VecConfig
from llmtrain.vectors.ngrams import buckets_of
from llmtrain.vectors.prediction import Prediction
from llmtrain.vectors.sampling import FULL, alias_table, huffman, keep_table
from llmtrain.vectors.text import Text
from llmtrain.vectors.trainer import Setting

WORDS = ["the", "film", "was", "fine", "old", "tale", "dog", "men"]
COUNTS = np.array([90, 40, 30, 12, 11, 9, 6, 5])
RATE = 0.05


def text_of(tokens: Sequence[int], words: Sequence[str] = WORDS, counts: np.ndarray = COUNTS) -> Text:
    return Text(list(words), counts, np.array(tokens, np.int32), "", Path())


def trainer_of(config: PredictionKeys, tokens: Sequence[int] = (0, 1, 2, 3, -1), seed: int = 3) -> Prediction:
    made = Prediction(config, Setting(text_of(tokens), Path(), seed, 1000, RATE, RATE, print))
    drawn = np.random.default_rng(0)
    for rows in made.weights().values():
        rows[:] = drawn.normal(0, 0.3, rows.shape)
    return made


def torch_step(
    before: dict[str, torch.Tensor], hidden: torch.Tensor, rows: Sequence[int], labels: Sequence[float]
) -> float:
    """The loss of one prediction; its gradients are added to those of `before`."""
    f = before["targets"][list(rows)] @ hidden
    sign = torch.tensor(labels) * 2 - 1
    loss = -logsigmoid(sign * f).sum()
    loss.backward()
    return float(loss.detach())


def state_of(made: Prediction) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(np.array(rows), requires_grad=True) for name, rows in made.weights().items()}


def learn(made: Prediction, context: Sequence[int], rows: Sequence[int], labels: Sequence[float]) -> float:
    arrays = [np.array(context, np.int32), np.array(rows, np.int32), np.array(labels, np.float32)]
    loss = c_double(0)
    arguments = made.slice_of(0, 0, RATE, RATE, 0)
    library = kernel.library(kernel.width_of(made.dimensions))
    at = [kernel.address(array) for array in arrays]
    library.learn_word(byref(arguments), at[0], len(context), at[1], at[2], len(rows), RATE, byref(loss))
    return loss.value


@pytest.mark.parametrize("dimensions", [5, 16, 100])
def test_a_pair_of_skip_gram_moves_by_its_gradient(dimensions: int) -> None:
    made = trainer_of(Word2VecConfig(dimensions=dimensions))
    before = state_of(made)
    rows, labels = [2, 5, 7, 1], [1.0, 0.0, 0.0, 0.0]
    expected = torch_step(before, before["words"][4], rows, labels)
    assert learn(made, [4], rows, labels) == pytest.approx(expected, rel=1e-5)
    for name, found in made.weights().items():
        gradient = before[name].grad
        assert gradient is not None
        np.testing.assert_allclose(found, (before[name] - RATE * gradient).detach().numpy(), atol=1e-6)


@pytest.mark.parametrize("config", [Word2VecConfig, FastTextConfig])
def test_cbow_moves_each_part_by_the_gradient_of_the_mean(config: Any) -> None:
    made = trainer_of(
        config(dimensions=20, architecture="cbow", **({"buckets": 50} if config is FastTextConfig else {}))
    )
    before = state_of(made)
    context, rows, labels = [0, 3, 6], [1, 2, 4], [1.0, 0.0, 0.0]
    grams = {w: buckets_of(WORDS[w], 3, 6, 50) if "grams" in before else [] for w in context}
    parts = [before["words"][w] for w in context] + [before["grams"][g] for w in context for g in grams[w]]
    hidden = torch.stack(parts).mean(0).detach().requires_grad_(True)
    expected = torch_step(before, hidden, rows, labels)
    assert learn(made, context, rows, labels) == pytest.approx(expected, rel=1e-5)
    assert hidden.grad is not None
    moved = {name: values.detach().numpy().copy() for name, values in before.items()}
    step = RATE * hidden.grad.numpy()
    for word in context:  # word2vec's rule: the whole gradient of the mean for each part
        moved["words"][word] -= step
        for gram in grams[word]:
            moved["grams"][gram] -= step
    assert before["targets"].grad is not None
    moved["targets"] -= RATE * before["targets"].grad.numpy()
    for name, found in made.weights().items():
        np.testing.assert_allclose(found, moved[name], atol=1e-6, err_msg=name)


def test_a_whole_slice_equals_the_same_steps_by_torch() -> None:
    """The path through the tree needs no draws, and the window is fixed, so that each step is known."""
    tokens = [0, 3, 1, 2, -1, 5, 4, 7, 0, 6, -1]
    config = Word2VecConfig(
        dimensions=12, loss="hierarchical_softmax", window=2, dynamic_window=False, subsample=0.0, min_count=1
    )
    made = trainer_of(config, tokens)
    state = {name: torch.tensor(np.array(rows)) for name, rows in made.weights().items()}
    starts, nodes, labels = huffman(COUNTS)
    for sentence in ([0, 3, 1, 2], [5, 4, 7, 0, 6]):
        for at, word in enumerate(sentence):
            path = slice(starts[word], starts[word + 1])
            for other in (*sentence[max(0, at - 2) : at], *sentence[at + 1 : at + 3]):
                leaf = {name: values.clone().requires_grad_(True) for name, values in state.items()}
                torch_step(leaf, leaf["words"][other], nodes[path].tolist(), labels[path].tolist())
                for name, values in leaf.items():
                    if values.grad is not None:
                        state[name] = state[name] - RATE * values.grad
    trained = made.step(0, 1, 1)
    assert trained.words == len(tokens)
    for name, found in made.weights().items():
        np.testing.assert_allclose(found, state[name].numpy(), atol=2e-5, err_msg=name)


def test_a_slice_of_fasttext_equals_steps_in_which_each_part_takes_the_gradient_of_all() -> None:
    sentence = [0, 3, 1, 2]
    config = FastTextConfig(
        dimensions=12,
        loss="hierarchical_softmax",
        window=2,
        dynamic_window=False,
        subsample=0.0,
        buckets=5000,
    )
    made = trainer_of(config, [*sentence, -1])
    state = {name: torch.tensor(np.array(rows)) for name, rows in made.weights().items()}
    starts, nodes, labels = huffman(COUNTS)
    for at, word in enumerate(sentence):
        grams = buckets_of(WORDS[word], 3, 6, 5000)
        assert len(set(grams)) == len(grams)
        for other in (*sentence[max(0, at - 2) : at], *sentence[at + 1 : at + 3]):
            path = slice(starts[other], starts[other + 1])
            targets = state["targets"].clone().requires_grad_(True)
            parts = torch.cat([state["words"][word][None], state["grams"][grams]])
            hidden = (parts.sum(0) / len(grams)).requires_grad_(True)
            torch_step({"targets": targets}, hidden, nodes[path].tolist(), labels[path].tolist())
            assert targets.grad is not None
            assert hidden.grad is not None
            state["targets"] = state["targets"] - RATE * targets.grad
            state["words"][word] -= RATE * hidden.grad
            state["grams"][grams] -= RATE * hidden.grad
    made.step(0, 1, 1)
    for name, found in made.weights().items():
        np.testing.assert_allclose(found, state[name].numpy(), atol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    "config",
    [
        Word2VecConfig(dimensions=20),
        Word2VecConfig(dimensions=20, shared_negatives=True),
        Word2VecConfig(dimensions=20, architecture="cbow"),
        Word2VecConfig(dimensions=20, architecture="cbow", loss="hierarchical_softmax"),
        FastTextConfig(dimensions=20, buckets=100),
        FastTextConfig(dimensions=20, buckets=100, architecture="cbow"),
        FastTextConfig(dimensions=20, buckets=100, loss="hierarchical_softmax"),
    ],
    ids=lambda config: f"{config.family}-{config.architecture}-{config.loss}-{config.shared_negatives}",
)
def test_one_thread_is_a_function_of_the_seed_and_the_loss_falls(config: PredictionKeys) -> None:
    drawn = np.random.default_rng(1)
    tokens = np.concatenate(
        [np.append(drawn.choice([[0, 2, 4], [1, 3, 5]][i % 2], 6), -1) for i in range(800)]
    )
    losses, ends = [], []
    for seed in (3, 3, 4):
        made = Prediction(config, Setting(text_of(tokens), Path(), seed, 2000, RATE, RATE, print))
        steps = made.steps_per_epoch * 8
        of_run = [made.step(number, steps, 1).loss for number in range(steps)]
        losses.append([loss for loss in of_run if loss is not None])
        ends.append({name: np.array(rows) for name, rows in made.weights().items()})
        assert all(np.isfinite(rows).all() for rows in made.weights().values())
    assert losses[0] == losses[1]
    assert all((ends[0][name] == ends[1][name]).all() for name in ends[0])
    assert any((ends[0][name] != ends[2][name]).any() for name in ends[0])
    assert np.mean(losses[0][-4:]) < np.mean(losses[0][:2])
    together = ends[0]["words"] if "grams" not in ends[0] else None
    if together is not None:
        unit = together / np.linalg.norm(together, axis=1, keepdims=True)
        cosine = unit @ unit.T
        assert cosine[0, 2] > cosine[0, 1]


def test_threads_go_over_all_words_and_learn() -> None:
    drawn = np.random.default_rng(1)
    tokens = np.concatenate(
        [np.append(drawn.choice([[0, 2, 4], [1, 3, 5]][i % 2], 6), -1) for i in range(800)]
    )
    config = Word2VecConfig(dimensions=20, subsample=0.0)
    made = Prediction(config, Setting(text_of(tokens), Path(), 3, 5600, RATE, RATE, print))
    trained = [made.step(number, 8, 3) for number in range(8)]
    assert [step.words for step in trained] == [5600] * 8
    assert [step.metrics["words_kept"] for step in trained] == [4800.0] * 8
    assert trained[-1].loss is not None
    assert trained[0].loss is not None
    assert trained[-1].loss < trained[0].loss


def reference_lengths(counts: Sequence[int]) -> int:
    """The sum of counts times path lengths of a Huffman tree: that of all merged counts."""
    left, total = sorted(map(int, counts)), 0
    while len(left) > 1:
        merged = left[0] + left[1]
        total += merged
        left = sorted([*left[2:], merged])
    return total


@pytest.mark.parametrize("seed", range(3))
def test_the_paths_are_those_of_a_huffman_tree(seed: int) -> None:
    counts = np.sort(np.random.default_rng(seed).integers(1, 1000, 200))[::-1]
    starts, nodes, labels = huffman(counts)
    paths = [tuple(nodes[a:b].tolist()) for a, b in itertools.pairwise(starts)]
    codes = [tuple(labels[a:b].tolist()) for a, b in itertools.pairwise(starts)]
    assert sum(
        len(code) * count for code, count in zip(codes, counts.tolist(), strict=True)
    ) == reference_lengths(counts)
    assert len(set(codes)) == len(counts)
    # No code begins another, and equal beginnings lead through equal nodes.
    beginnings = {}
    for path, code in zip(paths, codes, strict=True):
        for length, node in enumerate(path):
            assert beginnings.setdefault(code[:length], node) == node
    assert not set(codes) & set(beginnings)
    assert sorted(set(nodes.tolist())) == list(range(len(counts) - 1))
    assert len({path[0] for path in paths}) == 1


def test_the_paths_have_the_lengths_of_gensims() -> None:
    from gensim.models import Word2Vec

    sentences = [[f"w{i}"] * (i * i + 3) for i in range(30)]
    model = Word2Vec(sentences, hs=1, negative=0, min_count=1, vector_size=4, epochs=1)
    counts = np.array([model.wv.get_vecattr(word, "count") for word in model.wv.index_to_key])
    theirs = [len(model.wv.get_vecattr(word, "code")) for word in model.wv.index_to_key]
    starts, _, _ = huffman(counts)
    assert np.diff(starts).tolist() == theirs


def test_words_are_drawn_by_the_power_of_their_count_and_kept_by_the_square_root() -> None:
    limit, alias = alias_table(COUNTS, 0.75)
    chance = np.zeros(len(COUNTS))
    for word in range(len(COUNTS)):
        stays = int(limit[word]) / FULL
        chance[word] += stays / len(COUNTS)
        chance[alias[word]] += (1 - stays) / len(COUNTS)
    expected = COUNTS**0.75 / (COUNTS**0.75).sum()
    np.testing.assert_allclose(chance, expected, atol=1e-6)
    kept = keep_table(COUNTS, 1e-2) / 2.0**32
    share = COUNTS / COUNTS.sum()
    np.testing.assert_allclose(kept, np.minimum(np.sqrt(1e-2 / share) + 1e-2 / share, 1), atol=1e-6)
    assert (keep_table(COUNTS, 0) == FULL).all()


def test_a_machine_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"C compiler: got none of cc, gcc, clang on PATH.*; install one"):
        kernel.find_compiler()
    monkeypatch.setenv("CC", "nocc -m64")
    with pytest.raises(ConfigError, match="CC=nocc, which is not found"):
        kernel.find_compiler()
