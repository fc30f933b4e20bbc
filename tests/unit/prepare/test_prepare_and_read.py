"""What `llmtrain prepare` writes is what training reads."""

import json
from pathlib import Path

import numpy as np
import pytest

from llmtrain.corpus.corpus import Corpus
from llmtrain.data.datasets.base import TokenSequences
from llmtrain.prepare.config import PrepareConfig, SplitConfig
from llmtrain.prepare.job import prepare
from llmtrain.tokenizers.config import TokenizerConfig
from llmtrain.tokenizers.folder import load_tokenizer

WORDS = ["the", "film", "was", "very", "good", "bad", "long", "and", "but", "not", "so", "much", "I", "seen"]


@pytest.mark.slow
def test_documents_come_back_as_they_went_in(tmp_path: Path):
    rng = np.random.default_rng(0)
    texts = {" ".join(rng.choice(WORDS, rng.integers(1, 60))) + f" №{i}\n\tüber 🎬" for i in range(200)}
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in sorted(texts)))
    prepare(
        PrepareConfig(
            source=(str(source),),
            output=tmp_path / "corpus",
            tokenizer=TokenizerConfig(vocab_size=300),
            split=SplitConfig(validation=0.2, test=0.1),
            sample_tokens=500,
            tar_bytes=8000,
            workers=1,
        )
    )

    corpus = Corpus.open(tmp_path / "corpus", verify="checksum")
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    assert len(corpus.manifest.splits["train"].shards) > 1
    found: list[str] = []
    num_bytes = 0
    for name in ("train", "validation", "test"):
        split = corpus.split(name)
        tokens, ends = split.read(0, split.num_tokens)
        assert len(ends) == split.num_documents
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            assert tokens[end - 1] == corpus.manifest.eos_id
            found.append(tokenizer.decode(tokens[start : end - 1].tolist()))
        num_bytes += split.num_bytes
    assert set(found) == texts
    assert len(found) == len(texts)
    assert num_bytes == sum(len(text.encode()) for text in texts)

    dataset = TokenSequences(corpus.split("train"), 64)
    assert dataset.get(np.arange(len(dataset)))["tokens"].max() < corpus.manifest.vocab_size
