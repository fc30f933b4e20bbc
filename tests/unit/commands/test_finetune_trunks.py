"""Each trunk of `llmtrain finetune` that users have as a Hugging Face folder, and encoder-decoders as trunks:
tuned, exported, and held to what transformers' own pipeline says."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, processors

from llmtrain.cli import main as cli
from tests.support.tokenizers import write_tokenizer

WORDS = ["the", "film", "was", "a", "fine", "old", "tale", "of", "two", "men", "and", "one", "dog"]
SHORT = ("batch.global_size=16", "batch.micro_size=16", "batch.sequence_length=64", "optimizer.lr=3e-3")
SMALL: dict[str, Any] = {"vocab_size": 500, "num_hidden_layers": 1, "num_attention_heads": 2}
DIMS: dict[str, Any] = {**SMALL, "hidden_size": 32, "intermediate_size": 48}
SIDES: dict[str, Any] = {
    "vocab_size": 500,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
FOLDERS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "roberta": ("bert", transformers.RobertaForMaskedLM, {**DIMS, "max_position_embeddings": 128}),
    "xlnet": (
        "bert",
        transformers.XLNetLMHeadModel,
        {"vocab_size": 500, "d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 48},
    ),
    "gpt2": (
        "gpt2",
        transformers.GPT2LMHeadModel,
        {"vocab_size": 500, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 128},
    ),
    "llama": ("llama", transformers.LlamaForCausalLM, {**DIMS, "max_position_embeddings": 128}),
    "t5": (
        "t5",
        transformers.T5ForConditionalGeneration,
        {"vocab_size": 500, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2},
    ),
    "bart": ("bert", transformers.BartForConditionalGeneration, {**SIDES, "max_position_embeddings": 128}),
}
"""Architecture → kind of tokenizer, class and size of its model."""
TEMPLATES = {
    "roberta": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]"),
    "xlnet": ("$A [SEP] [CLS]", "$A [SEP] $B:1 [SEP]:1 [CLS]:2"),
    "t5": ("$A </s>", "$A </s> $B </s>"),
    "bart": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]"),
}


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts with the word that decides their label."""
    draw = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("reviews") / "reviews.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for number in range(160):
            words = [*draw.choice(WORDS, draw.integers(3, 8)), ("awful", "great")[number % 2]]
            draw.shuffle(words)
            writer.writerow([" ".join(words), ("bad", "good")[number % 2]])
    return path


def folder_of(name: str, where: Path) -> Path:
    """A folder as transformers writes it, of random weights, with a tokenizer."""
    kind, cls, size = FOLDERS[name]
    write_tokenizer(where, kind)
    tokenizer = Tokenizer.from_file(str(where / "tokenizer.json"))
    ids: dict[str, Any] = {}
    if name in TEMPLATES:
        named = ("[CLS]", "[SEP]") if kind == "bert" else ("</s>",)
        specials = [(token, tokenizer.token_to_id(token)) for token in named]
        one, two = TEMPLATES[name]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=one, pair=two, special_tokens=specials
        )
        tokenizer.save(str(where / "tokenizer.json"))
    if name == "bart":
        end = tokenizer.token_to_id("[SEP]")
        ids = {"eos_token_id": end, "decoder_start_token_id": end, "forced_eos_token_id": end}
        ids |= {
            "bos_token_id": tokenizer.token_to_id("[CLS]"),
            "pad_token_id": tokenizer.token_to_id("[PAD]"),
        }
        said = json.loads((where / "tokenizer_config.json").read_text())
        (where / "tokenizer_config.json").write_text(json.dumps({**said, "eos_token": "[SEP]"}))
    elif name == "roberta":
        ids = {"pad_token_id": tokenizer.token_to_id("[PAD]")}
    elif name == "t5":
        ids = {"eos_token_id": tokenizer.token_to_id("</s>"), "pad_token_id": tokenizer.token_to_id("<pad>")}
        ids["decoder_start_token_id"] = ids["pad_token_id"]
    torch.manual_seed(0)
    cls(cls.config_class(**size, **ids)).save_pretrained(where)
    return where


@pytest.mark.in_turns(3)
@pytest.mark.parametrize("name", list(FOLDERS))
def test_a_folder_is_tuned_and_transformers_says_the_same(name: str, reviews: Path, tmp_path: Path) -> None:
    words = [f"model.path={folder_of(name, tmp_path / name)}", "objective=classification", *SHORT]
    words += [f"data.path={reviews}", f"data.cache.dir={tmp_path / 'cache'}", f"run.dir={tmp_path / 'run'}"]
    assert cli.run_verb("finetune", [*words, "data.split.validation=0.2", "train.epochs=1"]) == 0
    assert cli.run_verb("export", [f"checkpoint={tmp_path / 'run'}", f"output={tmp_path / 'exported'}"]) == 0
    output = tmp_path / "said.jsonl"
    said = [f"checkpoint={tmp_path / 'run'}", f"input={reviews}", f"output={output}"]
    assert cli.run_verb("predict", said) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()][:20]
    pipeline = transformers.pipeline("text-classification", str(tmp_path / "exported"))
    for row, theirs in zip(rows, pipeline([row["text"] for row in rows]), strict=True):
        assert theirs["label"] == row["prediction"]
        assert theirs["score"] == pytest.approx(row["probability"], abs=1e-4)


def test_tags_over_the_encoder_of_t5(corpus: Path, reviews: Path, tmp_path: Path, capsys: Any) -> None:
    """A pre-trained T5's decoder goes unused; the export is a T5ForTokenClassification, with its labels."""
    pretrain = [f"data.path={corpus}", f"run.dir={tmp_path / 'trunk'}", "model=t5_tiny", "model.num_layers=1"]
    pretrain += ["model.hidden_size=32", *SHORT, "train.steps=2", "evaluation.every=null"]
    assert cli.run_verb("train", pretrain) == 0
    path = tmp_path / "rows.jsonl"
    with open(path, "w") as file:
        for row in csv.DictReader(reviews.open()):
            tokens = row["text"].split()
            tags = ["B-MOOD" if word in ("awful", "great") else "O" for word in tokens]
            file.write(json.dumps({"tokens": tokens, "tags": tags}) + "\n")
    capsys.readouterr()
    words = [f"model.path={tmp_path / 'trunk'}", "objective=tagging", f"data.path={path}", *SHORT]
    words += ["data.text_field=tokens", "data.label_field=tags", f"data.cache.dir={tmp_path / 'cache'}"]
    words += [f"run.dir={tmp_path / 'run'}", "data.split.validation=0.2", "train.epochs=20"]
    assert cli.run_verb("finetune", words) == 0
    unused = capsys.readouterr().err.split("unused of")[1].splitlines()[0]
    assert "decoder.0.attention.qkv.weight" in unused
    assert "encoder." not in unused.replace("decoder.", "")
    assert cli.run_verb("evaluate", [f"checkpoint={tmp_path / 'run'}", "format=json"]) == 0
    assert json.loads(capsys.readouterr().out)["entity_f1"] > 0.7
    assert cli.run_verb("export", [f"checkpoint={tmp_path / 'run'}", f"output={tmp_path / 'exported'}"]) == 0
    theirs = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "exported")
    assert type(theirs).__name__ == "T5ForTokenClassification"
    assert theirs.config.id2label == {0: "B-MOOD", 1: "O"}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["model=bert_tiny", "objective.trunk=encoder"], "objective.trunk: got encoder; allowed: null"),
        (["model=t5_tiny", "objective.trunk=decoder"], "objective.trunk: got 'decoder'"),
        (["model=gpt_tiny", "objective=seq2seq"], "objective: got seq2seq with model.family=gpt"),
    ],
)
def test_a_trunk_that_is_none_is_refused(
    more: list[str], said: str, corpus: Path, reviews: Path, tmp_path: Path, capsys: Any
) -> None:
    words = [f"data.path={reviews}", f"data.tokenizer={corpus}", f"data.cache.dir={tmp_path / 'cache'}"]
    words += [] if "objective=seq2seq" in more else ["objective=classification"]
    assert cli.run_verb("finetune", [*words, f"run.dir={tmp_path / 'run'}", *SHORT, *more]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("llmtrain: error")]
    assert len(lines) == 1
    assert said in lines[0]
