"""Folders as transformers saves them - model, tokenizer, config - through every verb: imported, evaluated,
generated with, trained on and exported again, a command each."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer as Library
from tokenizers import processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
)

from llmtrain.cli import main as cli
from llmtrain.interchange.huggingface import export_folder
from llmtrain.models.bert.config import BertConfig as OurBertConfig
from llmtrain.models.bert.model import Bert
from llmtrain.tokenizers.config import TokenizerConfig
from llmtrain.tokenizers.folder import load_tokenizer
from llmtrain.tokenizers.sentencepiece import train
from tests.support import warm
from tests.support.gguf_files import small_model, write_gguf
from tests.support.tokenizers import texts, write_tokenizer

pytestmark = pytest.mark.slow

VOCAB_SIZE = 400


@dataclass(frozen=True)
class Folder:
    """One that transformers saved."""

    tokenizer: str
    make: Callable[[], Any]
    is_own_process: bool = False
    """Each verb is started as a user starts it."""


def gpt2() -> Any:
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
    return small_model("gpt2", **sizes, head_dim=None, tie_word_embeddings=True, vocab_size=VOCAB_SIZE)


def bert() -> Any:
    torch.manual_seed(0)
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            max_position_embeddings=128,
        )
    ).eval()


FOLDERS = {
    "gpt2": Folder("gpt2", gpt2, is_own_process=True),
    "bert": Folder("bert", bert, is_own_process=True),
    "llama": Folder("llama", lambda: small_model("llama", vocab_size=VOCAB_SIZE)),
    "qwen3": Folder("gpt2", lambda: small_model("qwen3", vocab_size=VOCAB_SIZE)),
    "gemma2": Folder("llama", lambda: small_model("gemma2", vocab_size=VOCAB_SIZE, sliding_window=8)),
}
TRAINING = (
    "train.steps=3",
    "batch.global_size=4",
    "batch.micro_size=4",
    "batch.sequence_length=64",
    "evaluation.at_start=false",
    "evaluation.every=null",
    "data.workers=0",
)


OTHERS = [
    pytest.param(name, marks=pytest.mark.in_turns(3, by="name")) for name in ("llama", "qwen3", "gemma2")
]


@pytest.fixture(scope="module", params=["gpt2", "bert", *OTHERS])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def place(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `theirs` and a file of text."""
    path = tmp_path_factory.mktemp(name)
    FOLDERS[name].make().save_pretrained(path / "theirs")
    write_tokenizer(path / "theirs", FOLDERS[name].tokenizer, VOCAB_SIZE)
    lines = [" ".join(text.split()) for text in texts(400)]
    (path / "texts.txt").write_text("\n".join(lines))
    return path


def run(verb: str, *overrides: str, own_process: bool = False) -> None:
    """Raises AssertionError with what it said when it failed."""
    if not own_process:
        assert cli.run_verb(verb, list(overrides)) == 0
        return
    done = warm.llmtrain(verb, *overrides)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def made(name: str, place: Path) -> Path:
    """`place` with what each verb made of the folder."""
    own = FOLDERS[name].is_own_process
    run("import", f"source={place}/theirs", f"output={place}/imported", own_process=own)
    run(
        "prepare",
        f"source={place}/texts.txt",
        f"output={place}/corpus",
        "txt_document=line",
        f"tokenizer.model={place}/imported",
        "workers=1",
        own_process=own,
    )
    data = f"data.path={place}/corpus"
    evaluated = ("sequence_length=64", f"output={place}/before.json")
    run("evaluate", f"checkpoint={place}/imported", data, *evaluated, own_process=own)
    run(
        "train",
        "model=pretrained",
        f"model.path={place}/imported",
        data,
        f"run.dir={place}/run",
        *TRAINING,
        own_process=own,
    )
    run("export", f"checkpoint={place}/imported", f"output={place}/imported-hf", own_process=own)
    run("export", f"checkpoint={place}/run", f"output={place}/run-hf")
    return place


def test_what_was_not_trained_comes_back_bit_for_bit(made: Path) -> None:
    theirs, again = (load_file(made / f / "model.safetensors") for f in ("theirs", "imported-hf"))
    assert theirs.keys() == again.keys()
    assert all(torch.equal(again[name], theirs[name]) for name in theirs)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (made / "imported-hf" / file).read_bytes() == (made / "theirs" / file).read_bytes()
    before, after = (json.loads((made / f / "config.json").read_text()) for f in ("theirs", "imported-hf"))
    of_tokenizer = {f"{role}_token_id" for role in ("bos", "eos", "pad")}
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert changed <= {"transformers_version", "exported_by", *of_tokenizer}
    tokenizers = [AutoTokenizer.from_pretrained(made / f) for f in ("theirs", "imported-hf", "run-hf")]
    for text in texts(5):
        first, second, third = (tokenizer(text).input_ids for tokenizer in tokenizers)
        assert first == second == third


def test_training_changed_every_weight_and_no_setting(made: Path) -> None:
    configs = [json.loads((made / f / "config.json").read_text()) for f in ("imported-hf", "run-hf")]
    assert configs[0] == configs[1]
    before, after = (load_file(made / f / "model.safetensors") for f in ("imported-hf", "run-hf"))
    assert before.keys() == after.keys()
    assert not any(torch.equal(after[name], before[name]) for name in before)


def test_evaluation_is_that_of_random_weights(name: str, made: Path) -> None:
    figures = json.loads((made / "before.json").read_text())
    assert figures["targets"] > 100
    assert figures["loss"] == pytest.approx(math.log(VOCAB_SIZE), abs=1.0)


@pytest.mark.parametrize("kind", ["imported", "run"])
def test_what_is_generated_is_what_transformers_generates(
    kind: str, name: str, made: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made / f"{kind}-hf")
    checkpoint = f"checkpoint={made}/{kind}"
    if name == "bert":
        prompt = "ubo das [MASK], don't stop."
        model = AutoModelForMaskedLM.from_pretrained(made / f"{kind}-hf")
        inputs = tokenizer(f"[CLS] {prompt} [SEP]", return_tensors="pt")
        with torch.no_grad():
            logits_TV = model(**inputs).logits[0]
        place = inputs.input_ids[0].tolist().index(tokenizer.mask_token_id)
        expected = [tokenizer.decode([i]) for i in logits_TV[place].topk(3).indices.tolist()]
        overrides = (checkpoint, f'prompt=["{prompt}"]', "generate.top_k=3")
    else:
        prompt = "Ubo das cafés"
        model = AutoModelForCausalLM.from_pretrained(made / f"{kind}-hf")
        ids_1T = tokenizer(prompt, return_tensors="pt").input_ids
        outputs = model.generate(ids_1T, max_new_tokens=12, do_sample=False, pad_token_id=0)
        expected = [tokenizer.decode(outputs[0], skip_special_tokens=True)]
        settings = ("generate.max_new_tokens=12", "generate.temperature=0")
        overrides = (checkpoint, f'prompt=["{prompt}"]', *settings)
    capfd.readouterr()
    assert cli.run_verb("generate", list(overrides)) == 0
    printed = capfd.readouterr().out
    for piece in expected:
        assert piece in printed


def test_masks_behind_a_sentencepiece_vocabulary_are_tokens_of_the_export(tmp_path: Path) -> None:
    (tmp_path / "spm.model").write_bytes(train(texts(), TokenizerConfig(vocab_size=340)))
    config = OurBertConfig(
        vocab_size=343,
        mask_id=340,
        cls_id=341,
        sep_id=342,
        hidden_size=32,
        num_layers=1,
        num_heads=2,
    )
    weights = {name: p.detach() for name, p in Bert(config).named_parameters()}
    export_folder(config, weights, tmp_path / "spm.model", tmp_path / "out")
    ours, theirs = (load(tmp_path / "out") for load in (load_tokenizer, AutoTokenizer.from_pretrained))
    assert (theirs.mask_token_id, theirs.cls_token_id, theirs.sep_token_id) == (340, 341, 342)
    (one, *_) = texts()
    before, after = ours.encode(one), ours.encode(" ubo.")
    assert theirs(f"{one}[MASK] ubo.", add_special_tokens=False).input_ids == [*before, 340, *after]
    assert len(theirs) == 343


def test_a_prompt_begins_as_the_tokenizer_begins_texts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With <s>, as those of Llama 3 and Mistral."""
    model = small_model("llama", vocab_size=VOCAB_SIZE)
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path, "llama", VOCAB_SIZE)
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    bos = [("<s>", library.token_to_id("<s>"))]
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=bos)
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids_1T = tokenizer("Ubo das", return_tensors="pt").input_ids
    assert ids_1T[0, 0] == tokenizer.bos_token_id
    # Their own guess would take a first token of the padding's id for padding.
    outputs = model.generate(
        ids_1T, attention_mask=torch.ones_like(ids_1T), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    settings = ["generate.max_new_tokens=12", "generate.temperature=0"]
    assert cli.run_verb("generate", [f"checkpoint={tmp_path}", 'prompt=["Ubo das"]', *settings]) == 0
    assert tokenizer.decode(outputs[0], skip_special_tokens=True) in capfd.readouterr().out


def test_a_gguf_file_imports_by_one_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = small_model("llama", vocab_size=VOCAB_SIZE)
    write_tokenizer(tmp_path, "gpt2", VOCAB_SIZE)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    path = write_gguf(tmp_path / "model.gguf", model, tokenizer=tokenizer.backend_tokenizer)
    assert cli.run_verb("import", [f"source={path}", f"output={tmp_path}/imported"]) == 0
    prompt = "Ubo das cafés"
    ids_1T = tokenizer(prompt, return_tensors="pt").input_ids
    outputs = model.generate(ids_1T, max_new_tokens=12, do_sample=False, pad_token_id=0)
    capfd.readouterr()
    settings = ["generate.max_new_tokens=12", "generate.temperature=0"]
    arguments = [f"checkpoint={tmp_path}/imported", f'prompt=["{prompt}"]', *settings]
    assert cli.run_verb("generate", arguments) == 0
    assert tokenizer.decode(outputs[0], skip_special_tokens=True) in capfd.readouterr().out
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(path.read_bytes()[:5000])
    assert cli.run_verb("import", [f"source={cut}", f"output={tmp_path}/other"]) == 2
    assert "cut.gguf: got a damaged GGUF file" in capfd.readouterr().err
    assert not (tmp_path / "other").exists()
