from dataclasses import replace
from pathlib import Path

import pytest

from llmtrain.corpus.config import Mixture, TokenDataConfig
from llmtrain.corpus.corpora import open_corpora
from llmtrain.errors import DataError
from tests.support.corpora import random_documents, write_corpus


def make(folder: Path, **validation: int) -> TokenDataConfig:
    """Corpora with so many validation documents each."""
    for seed, (name, count) in enumerate(validation.items()):
        documents = random_documents(20, seed)
        write_corpus(folder / name, {"train": documents, "validation": documents[:count]})
    return TokenDataConfig(str(folder), mixture=dict.fromkeys(validation, 1.0))


def test_corpora_without_held_out_text_are_left_out_of_evaluation(tmp_path: Path):
    corpora = open_corpora(make(tmp_path, a=5, b=0, c=3))
    assert corpora.without("validation") == ["b"]
    assert list(corpora.splits("validation", optional=corpora.by_name)) == ["a", "c"]
    assert list(corpora.splits("train", optional=corpora.by_name)) == ["a", "b", "c"]
    with pytest.raises(DataError, match="b: got an empty split 'validation'"):
        corpora.splits("validation")


def test_no_held_out_text_at_all(tmp_path: Path):
    corpora = open_corpora(make(tmp_path, a=0, b=0))
    with pytest.raises(DataError, match="a: got an empty split 'validation'"):
        corpora.splits("validation", optional=corpora.by_name)


def test_corpora_that_none_is_drawn_of_need_no_training_text(tmp_path: Path):
    documents = random_documents(20)
    write_corpus(tmp_path / "a", {"train": documents, "validation": documents})
    write_corpus(tmp_path / "b", {"train": [], "validation": documents})
    data = TokenDataConfig(str(tmp_path), mixture={"a": 1.0, "b": 0.0})
    assert data.undrawn == ["b"]
    assert list(open_corpora(data).splits("train", data.undrawn)) == ["a"]
    later = replace(data, curriculum=(Mixture(step=5, mixture={"a": 1.0, "b": 1.0}),))
    assert later.undrawn == []


def test_a_corpus_of_documents_without_tokens_is_refused(tmp_path: Path):
    write_corpus(tmp_path / "a", {"train": [[], [], []], "validation": []})
    with pytest.raises(DataError, match="split 'train' of 3 documents without any token"):
        open_corpora(TokenDataConfig(str(tmp_path / "a"))).splits("train")


def test_corpora_of_different_tokenizers_are_refused(tmp_path: Path):
    config = make(tmp_path, a=1, b=1)
    documents = random_documents(5)
    write_corpus(tmp_path / "b", {"train": documents}, tokenizer=b"another")
    with pytest.raises(DataError, match=r"data\.mixture\.b: got .*/b, prepared with another tokenizer"):
        open_corpora(config)


def test_a_fingerprint_stands_for_all(tmp_path: Path):
    config = make(tmp_path, a=1, b=1)
    both = open_corpora(config).fingerprint
    assert open_corpora(config).fingerprint == both
    alone = open_corpora(TokenDataConfig(str(tmp_path / "a"))).fingerprint
    assert alone == open_corpora(config).by_name["a"].manifest.fingerprint
    write_corpus(tmp_path / "b", {"train": random_documents(5, 9)})
    assert open_corpora(config).fingerprint != both
