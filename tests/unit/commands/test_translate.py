"""An encoder–decoder from training to translated lines and BLEU, through the verbs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmtrain.cli import main as cli
from llmtrain.corpus.config import TokenDataConfig
from llmtrain.generation.answer import Texts
from llmtrain.generation.bleu import pairs_of
from llmtrain.interchange.trained import TrainedModel, load_trained
from llmtrain.models.encoder_decoder.config import Seq2SeqConfig
from llmtrain.objectives.reading import open_data, open_dataset
from llmtrain.objectives.span_corruption import SpanCorruptionConfig
from llmtrain.tokenizers.folder import load_tokenizer

TINY = (
    "model=transformer_tiny",
    "model.num_layers=1",
    "model.hidden_size=64",
    "model.num_heads=2",
    "model.mlp_hidden_size=128",
    "model.dropout=0.0",
    "batch.global_size=16",
    "batch.micro_size=16",
    "batch.sequence_length=48",
    "train.steps=30",
    "optimizer.lr=3e-3",
    "evaluation.every=null",
    "evaluation.max_samples=4",
    "data.workers=0",
)


@pytest.fixture(scope="module")
def run(paired_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "translate"
    assert cli.run_verb("train", [*TINY, f"data.path={paired_corpus}", f"run.dir={folder}"]) == 0
    return folder


def evaluate(run: Path, corpus: Path, *words: str) -> int:
    return cli.run_verb("evaluate", [f"checkpoint={run}", f"data.path={corpus}", "max_samples=2", *words])


def test_bleu(run: Path, paired_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sacrebleu.metrics import BLEU

    output = tmp_path / "figures.json"
    beams = ["generate.num_beams=2", "generate.max_new_tokens=12", f"output={output}"]
    assert evaluate(run, paired_corpus, "bleu=true", *beams) == 0
    figures = json.loads(output.read_text())
    assert 0 <= figures["bleu"] <= 100
    assert figures["bleu_pairs"] > 2, "a row holds several pairs"
    assert figures["bleu_signature"].startswith("nrefs:1|case:mixed")
    assert f"bleu            {figures['bleu']:.6g}" in capsys.readouterr().out
    # The same by hand: translate the sources as a file, and compare with the targets.
    trained = load_trained(run)
    data = TokenDataConfig(path=str(paired_corpus))
    corpora = open_data(trained.objective, data)
    dataset = open_dataset(trained.objective, trained.config, data, corpora, "validation", 48)
    texts = Texts(trained)
    pairs = [(texts.target(source), texts.target(target)) for source, target in pairs_of(dataset, 2)]
    lines = tmp_path / "sources.txt"
    lines.write_text("".join(f"{source}\n" for source, _ in pairs))
    words = [f"checkpoint={run}", f"prompt_file={lines}", f"output={tmp_path / 'out.txt'}", *beams[:2]]
    assert cli.run_verb("generate", words) == 0
    written = (tmp_path / "out.txt").read_text().splitlines()
    assert len(written) == len(pairs) == figures["bleu_pairs"]
    score = BLEU().corpus_score(written, [[target for _, target in pairs]]).score
    assert figures["bleu"] == pytest.approx(score)


def test_what_cannot_be_is_refused(
    run: Path, paired_corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluate(run, paired_corpus, "generate.num_beams=4") == 2
    assert "generate: got settings; allowed: none with bleu=false" in capsys.readouterr().err
    pipeline = [f"checkpoint={run}", "prompt=a", "parallel.pipeline=2"]
    assert cli.run_verb("generate", pipeline) == 2
    assert "parallel.pipeline: got 2; allowed: 1 where an encoder–decoder" in capsys.readouterr().err
    beams = [f"checkpoint={run}", "prompt=a", "generate.num_beams=2", "generate.temperature=0.7"]
    assert cli.run_verb("generate", beams) == 2
    assert "generate.temperature: got 0.7; allowed: 0 with num_beams=2" in capsys.readouterr().err
    assert cli.run_verb("generate", [f"checkpoint={run}", "prompt=a", "generate.top_k=3"]) == 2
    assert "generate.top_k: got 3; allowed: null with temperature=0" in capsys.readouterr().err
    assert cli.run_verb("generate", [f"checkpoint={run}"]) == 2
    assert "prompt: got nothing; allowed: a text that the model reads" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert evaluate(run, paired_corpus, "bleu=true") == 2
    assert 'bleu: got true without the package sacrebleu; pip install "llmtrain[seq2seq]"' in (
        capsys.readouterr().err
    )


def test_gaps_of_a_text_are_filled(corpus: Path) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer.model")
    n = tokenizer.vocab_size
    config = Seq2SeqConfig(
        vocab_size=n + 5,
        start_id=n,
        sentinel_id=n + 4,
        eos_id=tokenizer.eos_id,
        num_sentinels=4,
    )
    texts = Texts(
        TrainedModel(
            corpus, config, SpanCorruptionConfig(num_sentinels=4), {}, corpus / "tokenizer.model", 1, 32
        )
    )
    prompt = "the <extra_id_0> was <extra_id_1>."
    ids = texts.source(prompt)
    assert [token for token in ids if token >= n] == [n + 4, n + 3]
    assert ids[-1] == tokenizer.eos_id
    target = [n + 4, *tokenizer.encode("film"), n, n + 3, *tokenizer.encode(" good")]
    assert texts.target(target) == "<extra_0>film<extra_1> good"
    assert texts.answer(prompt, target) == "the film was good."
    assert texts.answer(prompt, target[:5]) == f"the {texts.target(target[1:5])} was <extra_id_1>."
    assert texts.answer("no gaps", target) == texts.target(target)
