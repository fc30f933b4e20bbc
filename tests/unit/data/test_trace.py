"""What made a step, against the documents that the corpora were written from."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from llmtrain.corpus.corpus import Corpus
from llmtrain.data.datasets.base import EMPTY, TokenSequences
from llmtrain.data.loader import Loader
from llmtrain.data.mixture import begin
from llmtrain.data.stream import Stream, combine_digests
from llmtrain.data.trace import Sample, digest_of, hash_digests, parts_of, samples_of, until
from llmtrain.objectives.causal_lm import CausalLM
from tests.support.corpora import EOS, random_documents, write_corpus

DOCUMENTS = {name: random_documents(40, seed, longest=50) for seed, name in enumerate("ab")}
DOCUMENTS_PER_TAR = 10
SHARES = {"a": 0.7, "b": 0.3}
G = 6


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    for name, documents in DOCUMENTS.items():
        write_corpus(folder / name, {"train": documents}, samples_per_tar=2)
    return folder


def open_sources(corpora: Path, packing: str = "concat", overlap: int = 0) -> dict[str, TokenSequences]:
    splits = {name: Corpus.open(corpora / name).split("train") for name in DOCUMENTS}
    return {
        name: TokenSequences(split, 24, packing=packing, overlap=overlap)  # type: ignore[arg-type]
        for name, split in splits.items()
    }


def make_stream(sources: dict[str, TokenSequences]) -> Stream:
    return Stream(sources, begin(G, SHARES, {}), seed=3, shuffle_tars=2)


def contains(whole: list[int], part: list[int]) -> bool:
    return any(whole[i : i + len(part)] == part for i in range(len(whole) - len(part) + 1))


@pytest.mark.parametrize(("packing", "overlap"), [("concat", 0), ("best_fit", 0), ("best_fit", 5)])
def test_parts_are_of_the_documents_that_they_name(corpora: Path, packing: str, overlap: int):
    sources = open_sources(corpora, packing, overlap)
    stream = make_stream(sources)
    seen = set()
    for step in range(1, 40):
        for sample in samples_of(stream, step):
            raw = sources[sample.corpus].get(np.array([sample.row]))
            held = raw["tokens"][0][raw["documents"][0] >= 0].tolist()
            for part in parts_of(sources, sample):
                tar = int(part.tar[-len("000000.tar") :].removesuffix(".tar"))
                number = tar * DOCUMENTS_PER_TAR + part.document
                tokens, held = held[: part.tokens], held[part.tokens :]
                assert len(tokens) == part.tokens > 0
                assert contains([*DOCUMENTS[sample.corpus][number], EOS], tokens)
                assert f"/{sample.corpus}/" in part.tar
                seen.add((sample.corpus, number))
            assert held == []
    assert len(seen) == sum(map(len, DOCUMENTS.values()))


def test_samples_are_those_that_ranks_read(corpora: Path):
    stream = make_stream(open_sources(corpora))
    loaders = [
        Loader(stream, CausalLM().collate, micro_size=1, data_rank=rank, data_size=3).steps()
        for rank in range(3)
    ]
    for step in range(1, 30):
        micro_batches = [micro for loader in loaders for micro in next(loader).micro_batches]
        read = [
            (number, int(i)) for m in micro_batches for number, i in zip(m.samples, m.indices, strict=True)
        ]
        assert [(sample.sample, sample.row) for sample in samples_of(stream, step)] == read
        assert digest_of(stream, step) == combine_digests(sum(micro.digest for micro in micro_batches))


def test_each_source_is_drawn_in_its_own_order(corpora: Path):
    stream = make_stream(open_sources(corpora))
    samples = [sample for step in range(1, 60) for sample in samples_of(stream, step)]
    assert [sample.sample for sample in samples] == list(range(59 * G))
    for name in SHARES:
        drawn = [sample for sample in samples if sample.corpus == name]
        assert [sample.position for sample in drawn] == list(range(len(drawn)))
        assert [sample.epoch for sample in drawn] == sorted(sample.epoch for sample in drawn)


def test_a_step_is_read_as_it_was_before_the_timeline_went_on(corpora: Path):
    """With drop_last an epoch's length depends on the step's size: that of then counts."""
    source = {"": open_sources(corpora)["a"]}
    first = begin(G, {"": 1.0}, {})
    both = first.changed(30, 35, {"": 1.0}, {})

    def open_stream(timeline):
        return Stream(source, timeline, seed=3, shuffle_tars=2, drop_last=True)

    then, now = open_stream(first), open_stream(both)
    again = open_stream(until(both, 30))
    steps = range(1, 31)
    assert [digest_of(again, step) for step in steps] == [digest_of(then, step) for step in steps]
    assert [digest_of(now, step) for step in steps] != [digest_of(then, step) for step in steps]
    assert until(both, 31).segments == both.segments


def test_skipped_tars_leave_rows_empty(corpora: Path):
    sources = open_sources(corpora)
    stream = make_stream(sources)
    whole = list(samples_of(stream, 1))
    [corpus, tar] = next((s.corpus, p.tar) for s in whole for p in parts_of(sources, s))
    bad = sources[corpus].tar_names.index(tar)
    skipped = frozenset({(stream.names.index(corpus), 0, bad)})
    left = list(samples_of(stream, 1, skipped))
    for sample, before in zip(left, whole, strict=True):
        is_bad = before.corpus == corpus and parts_of(sources, before)[0].tar == tar
        assert sample.row == (EMPTY if is_bad else before.row)
        assert (parts_of(sources, sample) == []) == is_bad
    assert left != whole
    assert digest_of(stream, 1, skipped) != digest_of(stream, 1)


def test_the_hash_is_of_steps_and_digests_in_their_order():
    digests = [(1, 5), (2, 7), (3, 2**48 - 1)]
    told = hash_digests(digests)
    assert told == hash_digests(iter(digests))
    assert len(told) == 32
    others = [digests[:2], [(1, 5), (2, 7), (4, 2**48 - 1)], [(1, 5), (2, 8), (3, 2**48 - 1)]]
    others += [list(order) for order in itertools.permutations(digests) if list(order) != digests]
    assert len({told, *map(hash_digests, others)}) == 1 + len(others)


def test_data_without_documents_has_no_parts():
    class Pictures:
        fingerprint = ""

    sample = Sample(step=1, sample=0, corpus="", epoch=0, position=0, row=4)
    assert parts_of({"": Pictures()}, sample) == []  # type: ignore[dict-item]
