"""Every objective over a real corpus: what a sample asks depends on seed, epoch and sample alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from llmtrain.data.loader import KEYS, Loader
from llmtrain.data.stream import Origins, Stream
from llmtrain.data.streaming import open_stream, plan_timeline
from llmtrain.interchange.trained import build_module
from llmtrain.labels import IGNORE_INDEX
from llmtrain.objectives.base import Batch, Objective
from llmtrain.train.resolve import Resolved, resolve
from tests.support.training import compose

OBJECTIVES = {
    "causal_lm": ["model=gpt_tiny"],
    "mlm": ["model=bert_tiny", "objective=mlm"],
    "mlm of words": ["model=bert_tiny", "objective=mlm", "objective.whole_words=true"],
    "mlm, best fit": ["model=bert_tiny", "objective=mlm", "data.packing=best_fit"],
    "mlm_nsp": ["model=bert_tiny", "objective=mlm_nsp"],
    "mlm_sop": ["model=bert_tiny", "objective=mlm_sop"],
    "permuted_lm": ["model=xlnet_tiny", "objective=permuted_lm"],
    "span_corruption": ["model=t5_tiny", "objective=span_corruption"],
    "span_corruption, best fit": ["model=t5_tiny", "objective=span_corruption", "data.packing=best_fit"],
    "denoising": ["model=bart_tiny", "objective=denoising", "objective.rotation=0.5"],
    "seq2seq": ["model=transformer_tiny", "objective=seq2seq"],
}
DRAWN = {*OBJECTIVES} - {"causal_lm", "seq2seq"}
GLOBAL_SIZE = 16


class Reading:
    """A run's data as a rank reads them."""

    def __init__(self, resolved: Resolved) -> None:
        self.config = config = resolved.config
        self.objective: Objective = config.objective.build(config.model, config.data, resolved.corpora)
        length = config.batch.sequence_length
        self.sources = config.objective.open(config.model, config.data, resolved.corpora, "train", length)
        timeline = plan_timeline(config, self.sources, None, 0, print)
        self.stream: Stream = open_stream(config.data, self.sources, timeline, seed=config.seed)

    def steps(
        self, micro_size: int = 2, data_rank: int = 0, data_size: int = 1, workers: int = 0
    ) -> list[list[Batch]]:
        """The micro-batches of two steps."""
        loader = Loader(
            self.stream,
            self.objective.collate,
            micro_size=micro_size,
            data_rank=data_rank,
            data_size=data_size,
            workers=workers,
        )
        reading = loader.steps()
        steps = [[micro.batch for micro in next(reading).micro_batches] for _ in range(2)]
        reading.close()
        return steps

    def epoch(self, number: int) -> Batch:
        """The first samples of the corpus as they are read in that epoch."""
        indices = np.arange(GLOBAL_SIZE)
        places = Origins(np.zeros_like(indices), np.full_like(indices, number), indices)
        return self.objective.collate({**self.stream.get(places), KEYS: self.stream.keys(places)})


@pytest.fixture(params=OBJECTIVES, ids=str)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def reading(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> Reading:
    corpus = request.getfixturevalue("paired_corpus" if name == "seq2seq" else "corpus")
    settings = [f"data.path={corpus}", f"data.cache.dir={tmp_path}", "batch.sequence_length=64"]
    sizes = [f"batch.global_size={GLOBAL_SIZE}", "batch.micro_size=2"]
    return Reading(resolve(compose([*OBJECTIVES[name], *settings, *sizes])))


def assert_same(ours: list[list[Batch]], theirs: list[list[Batch]]) -> None:
    for our_step, their_step in zip(ours, theirs, strict=True):
        for our, their in zip(our_step, their_step, strict=True):
            assert our.keys() == their.keys()
            assert all(torch.equal(our[key], their[key]) for key in our)


def test_batches_are_the_same_at_any_number_of_processes(reading: Reading) -> None:
    alone = reading.steps()
    assert {len(step) for step in alone} == {GLOBAL_SIZE // 2}
    for size in (2, 4):
        ranks = [reading.steps(data_rank=rank, data_size=size) for rank in range(size)]
        together = [[batch for share in step for batch in share] for step in zip(*ranks, strict=True)]
        assert_same(together, alone)
    assert_same(reading.steps(workers=2), alone)
    # Nor does it matter what else is in a batch.
    for whole, parts in zip(reading.steps(micro_size=GLOBAL_SIZE), alone, strict=True):
        for key in ("sources", "tokens", "labels"):
            if key in parts[0]:
                assert torch.equal(whole[0][key], torch.cat([part[key] for part in parts]))


def test_every_epoch_asks_for_other_tokens(reading: Reading, name: str) -> None:
    first, again, second = reading.epoch(0), reading.epoch(0), reading.epoch(1)
    assert_same([[first]], [[again]])
    drawn = {key for key in first if not torch.equal(first[key], second[key])}
    assert bool(drawn) == (name in DRAWN)
    asked = int((first["labels"] != IGNORE_INDEX).sum())
    assert reading.objective.target_count(first) == asked > 0


def test_an_evaluation_gives_what_the_config_says(reading: Reading) -> None:
    model = build_module(reading.config.model, torch.device("cpu"))
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    with torch.no_grad():
        terms = reading.objective.evaluate(model.eval(), reading.epoch(0))
    assert {*terms.metrics} == {*reading.config.objective.measures()}
