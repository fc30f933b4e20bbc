"""Span corruption and denoising: what comes out of a row of text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config import decode
from llmtrain.errors import ConfigError
from llmtrain.labels import IGNORE_INDEX
from llmtrain.models.encoder_decoder.config import Seq2SeqConfig
from llmtrain.objectives.denoising import Denoising, DenoisingConfig
from llmtrain.objectives.registry import objective_config_type
from llmtrain.objectives.seq2seq import OneText
from llmtrain.objectives.span_corruption import SpanCorruption, SpanCorruptionConfig

EOS, PERIOD, START, MASK, LAST_SENTINEL = 2, 3, 100, 101, 201
SENTENCE_ENDS = np.arange(100) == PERIOD


def make(**settings: Any) -> OneText:
    config = decode(objective_config_type(settings), settings)
    model = Seq2SeqConfig(
        vocab_size=202,
        start_id=START,
        mask_id=MASK,
        sentinel_id=LAST_SENTINEL,
        eos_id=EOS,
    )
    if isinstance(config, SpanCorruptionConfig):
        return SpanCorruption(model, config)
    assert isinstance(config, DenoisingConfig)
    return Denoising(model, config, SENTENCE_ENDS)


def texts(lengths: list[int], width: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of so many random tokens, W wide."""
    rng = np.random.default_rng(seed)
    documents = np.where(np.arange(width) < np.array(lengths)[:, None], 0, -1).astype(np.int32)
    tokens = np.where(documents < 0, 0, rng.integers(3, 100, documents.shape))
    return {"tokens": tokens, "documents": documents, "keys": rng.integers(0, 1 << 62, len(lengths))}


def sides(batch: dict[str, Any], row: int) -> tuple[list[int], list[int]]:
    """A row's source and target, both without their end."""
    is_source = np.ones(batch["sources"].shape[1], dtype=bool)
    if "source_documents" in batch:
        is_source = batch["source_documents"][row].numpy() >= 0
    source = batch["sources"][row].numpy()[is_source].tolist()
    labels = batch["labels"][row].numpy()
    target = labels[labels != IGNORE_INDEX].tolist()
    if not source:
        assert not target
        return [], []
    assert source.pop() == EOS
    assert target.pop() == EOS
    shown = batch["tokens"][row].numpy()[labels != IGNORE_INDEX].tolist()
    assert shown == [START, *target]
    return source, target


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 71), min_size=1, max_size=6),
    share=st.sampled_from([0.15, 0.5, 0.9]),
    mean_span=st.sampled_from([1.0, 3.0, 8.0]),
    seed=st.integers(0, 1 << 30),
)
def test_gaps_filled_in_are_the_text(lengths: list[int], share: float, mean_span: float, seed: int) -> None:
    objective = make(kind="span_corruption", share=share, mean_span=mean_span)
    width = objective._config.widths(64).text + 1
    lengths = [min(length, width - 1) for length in lengths]
    raw = texts(lengths, width, seed)
    batch = objective.collate(raw)
    assert batch["sources"].shape == (len(lengths), objective._config.widths(64).source)
    for row, length in enumerate(lengths):
        source, target = sides(batch, row)
        if length < 2:
            assert not source
            continue
        gaps: dict[int, list[int]] = {}
        for token in target:
            if token > MASK:
                gaps[token] = []
            else:
                gaps[next(reversed(gaps))].append(token)
        assert list(gaps) == [LAST_SENTINEL - i for i in range(len(gaps))]
        assert [token for token in source if token > MASK] == list(gaps)
        filled = [token for place in source for token in gaps.get(place, [place])]
        assert filled == raw["tokens"][row, :length].tolist()
        assert all(gaps.values())
        hidden, num_gaps = objective._config.spans_of(np.array(length))
        assert (len(gaps), sum(map(len, gaps.values()))) == (int(num_gaps), int(hidden))


def test_full_rows_of_gaps_fill_both_sides() -> None:
    objective = make(kind="span_corruption")
    raw = texts([568] * 64, 569)
    batch = objective.collate(raw)
    assert "documents" not in batch
    assert batch["sources"].shape == (64, 512)
    assert batch["tokens"].shape == (64, 114)
    assert (batch["labels"] != IGNORE_INDEX).all()


def test_every_place_lies_in_a_gap_as_often_as_the_share_says() -> None:
    objective = make(kind="span_corruption")
    assert isinstance(objective, SpanCorruption)
    keys, lengths = texts([141] * 4000, 142)["keys"], np.full(4000, 141)
    hidden_B, _ = objective._config.spans_of(lengths)
    # Tokens that are their places, and sentinels below 0.
    objective._sentinel_id = -1
    source, _ = objective.corrupt(np.tile(np.arange(141), 4000), lengths, keys)[0]
    stays = np.bincount(source[source >= 0], minlength=141) / 4000
    assert stays[0] == 1
    assert stays[-1] == 0
    assert np.abs(1 - stays[10:-10] - hidden_B[0] / 141).max() < 0.06


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 63), min_size=1, max_size=6),
    noise=st.sampled_from(
        [
            {"infilling": 0.3, "permutation": 1.0},
            {"infilling": 0.9, "mean_span": 1.0, "permutation": 0.5},
            {"infilling": 0.0, "masking": 0.2, "deletion": 0.2, "permutation": 0.0},
            {"infilling": 0.2, "masking": 0.2, "deletion": 0.2, "rotation": 1.0},
        ]
    ),
    seed=st.integers(0, 1 << 30),
)
def test_noise_takes_tokens_and_invents_none(lengths: list[int], noise: dict[str, float], seed: int) -> None:
    objective = make(kind="denoising", **noise)
    raw = texts(lengths, 64, seed)
    batch = objective.collate(raw)
    assert batch["sources"].shape == batch["tokens"].shape == (len(lengths), 64)
    for row, length in enumerate(lengths):
        source, target = sides(batch, row)
        if length < 2:
            continue
        assert target == raw["tokens"][row, :length].tolist()
        counts = np.bincount(source, minlength=102)
        assert (counts[:100] <= np.bincount(target, minlength=100)).all()
        assert len(source) <= length


def only(**noise: float) -> dict[str, Any]:
    return {"kind": "denoising", "infilling": 0.0, "permutation": 0.0, **noise}


def test_sentences_stay_whole() -> None:
    def sentences(tokens: list[int]) -> list[tuple[int, ...]]:
        """Cut behind each period, or several in a row; the last may lack one."""
        found: list[list[int]] = [[]]
        for token in tokens:
            if token != PERIOD and PERIOD in found[-1]:
                found.append([])
            found[-1].append(token)
        return [tuple(sentence) for sentence in found]

    raw = texts([50] * 20, 64)
    raw["tokens"][:, 0] = START - 1
    raw["tokens"][:, 7:50:9] = PERIOD
    raw["tokens"][:, 8:50:18] = PERIOD
    raw["tokens"][:, 49] = PERIOD
    batch = make(**only(permutation=1.0)).collate(raw)
    moved = 0
    for row in range(20):
        source, target = sides(batch, row)
        assert sorted(sentences(source)) == sorted(sentences(target))
        moved += source != target
    assert moved >= 18


def test_rotation_keeps_the_circle() -> None:
    raw = texts([40] * 20, 64)
    batch = make(**only(rotation=1.0)).collate(raw)
    starts = set()
    for row in range(20):
        source, target = sides(batch, row)
        starts.add(next(i for i in range(40) if target[i:] + target[:i] == source))
    assert len(starts) > 10


def test_shares_of_noise_are_what_the_config_says() -> None:
    raw = texts([511] * 200, 512)
    tokens = 511 * 200
    masked = make(**only(masking=0.2, deletion=0.1)).collate(raw)
    assert int((masked["sources"] == MASK).sum()) / tokens == pytest.approx(0.2, abs=0.01)
    kept = sum(len(sides(masked, row)[0]) for row in range(200))
    assert kept / tokens == pytest.approx(0.9, abs=0.01)
    filled = make(**only(infilling=0.3)).collate(raw)
    gaps = int((filled["sources"] == MASK).sum())
    hidden = tokens - sum(len(sides(filled, row)[0]) for row in range(200)) + gaps
    assert hidden / tokens == pytest.approx(0.3, abs=0.005)
    # Poisson's mean; a row's last gap is cut where it has hidden enough.
    assert hidden / gaps == pytest.approx(3.0, abs=0.1)


@pytest.mark.parametrize("settings", [{"kind": "span_corruption"}, {"kind": "denoising", "rotation": 0.5}])
def test_a_row_is_the_same_in_any_batch(settings: dict[str, Any]) -> None:
    objective = make(**settings)
    width = objective._config.widths(64).text + 1
    raw = texts([width - 1, 13, 0, width - 1, 40, 2], width)
    whole = objective.examples(raw)
    for row in range(6):
        alone = objective.examples({key: values[row : row + 1] for key, values in raw.items()})
        for ours, theirs in zip(alone, whole, strict=True):
            assert np.array_equal(ours[0], theirs[row])
    other = objective.examples({**raw, "keys": raw["keys"] + 1})
    assert not np.array_equal(other.sources, whole.sources)


def test_keys_of_another_kind_are_named() -> None:
    with pytest.raises(ConfigError) as refusal:
        decode(SpanCorruptionConfig, {"infilling": 0.5, "target_length": 9})
    assert {problem.where for problem in refusal.value.problems} == {"target_length", "infilling"}
    problems = SpanCorruptionConfig().length_problems(4096, Seq2SeqConfig())
    assert [problem.where for problem in problems] == ["objective.num_sentinels"]
