"""Folders, GGUF files and tokenizers of others, changed at random: each is read, or refused in a few lines;
nothing crashes, hangs, or takes memory beyond all measure."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file

from llmtrain.checkpoint.foreign import read_foreign
from llmtrain.checkpoint.huggingface import export_folder
from llmtrain.checkpoint.huggingface_tokenizer import tokenizer_files
from llmtrain.commands.loading import load_trained
from llmtrain.data.tokenizer_folder import load_tokenizer
from llmtrain.families import skeleton_of
from llmtrain.generation.config import GenerateConfig
from llmtrain.generation.generate import generate
from tests.support.changed_files import as_json, change_bytes, change_json, outcomes
from tests.support.gguf_files import small_model, write_gguf
from tests.support.tokenizers import KINDS, texts, train_tokenizer, write_tokenizer
from tests.unit.checkpoint.test_folder_settings import FORMS

pytestmark = pytest.mark.slow

CASES = 40

Change = Callable[[Path, Random], None]


def in_json(name: str) -> Change:
    def change(folder: Path, rng: Random) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_bytes(as_json(change_json(content, rng)))

    return change


def in_bytes(name: str) -> Change:
    def change(folder: Path, rng: Random) -> None:
        (folder / name).write_bytes(change_bytes((folder / name).read_bytes(), rng))

    return change


def in_header(name: str) -> Change:
    """Of safetensors."""

    def change(folder: Path, rng: Random) -> None:
        content = (folder / name).read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = as_json(change_json(json.loads(content[8:end]), rng))
        (folder / name).write_bytes(len(header).to_bytes(8, "little") + header + content[end:])

    return change


def check(source: Path, change: Change, use: Callable[[Path], None], work: Path) -> None:
    """Change a copy of `source` in each of the cases, and use it."""

    def read(case: int) -> None:
        folder = work / "case"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        change(folder, Random(case))
        use(folder)

    use(source)
    assert outcomes(range(CASES), read) == {}


def export(form: str, folder: Path, shard_bytes: int = 10**9) -> Path:
    tensors = {name: torch.full(p.shape, 0.01) for name, p in skeleton_of(FORMS[form]).named_parameters()}
    export_folder(FORMS[form], tensors, None, folder, shard_bytes=shard_bytes)
    return folder


def use_model(folder: Path) -> None:
    trained = load_trained(folder)
    module = trained.build(torch.device("cpu"))
    settings = trained.resolve_generation(GenerateConfig(max_new_tokens=2), 3)
    if trained.config.family in ("gpt", "seq2seq"):
        generate(module, [[9, 10, 11]], settings, eos_ids=trained.end_ids(1))
    export_folder(trained.config, trained.weights, None, folder / "out", origin=trained.origin)


def use_gguf(folder: Path) -> None:
    imported, tokenizer = read_foreign(folder / "model.gguf")
    for name in imported.weights:
        _ = imported.weights[name]
    assert tokenizer is None or tokenizer.encode("das")


def use_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    for text in ("das <mask> [MASK] </s>", "Ünï １ 😀\n\t x", "a" * 3000):
        tokenizer.decode(tokenizer.encode(text))
    tokenizer.encode_arrays(["das", "fur"])
    tokenizer.word_starts()
    tokenizer.sentence_ends()
    tokenizer.ordinary_ids()
    tokenizer_files(tokenizer, None, str(folder))
    tokenizer.take_specials_for_text()
    tokenizer.encode("das <mask>")


@pytest.mark.parametrize("form", list(FORMS))
def test_config_json(form: str, tmp_path: Path):
    check(export(form, tmp_path / "theirs"), in_json("config.json"), use_model, tmp_path)


@pytest.mark.parametrize("form", ["llama", "t5"])
def test_generation_config_json(form: str, tmp_path: Path):
    folder = export(form, tmp_path / "theirs")
    settings = {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "eos_token_id": [1, 2]}
    more = {"num_beams": 1, "max_length": 40, "min_new_tokens": 1, "early_stopping": False, "min_p": 0.1}
    (folder / "generation_config.json").write_text(json.dumps(settings | more))
    check(folder, in_json("generation_config.json"), use_model, tmp_path)


@pytest.mark.parametrize("change", [in_json, in_bytes])
def test_the_index(change: Callable[[str], Change], tmp_path: Path):
    folder = export("llama", tmp_path / "theirs", 5000)
    check(folder, change("model.safetensors.index.json"), use_model, tmp_path)


@pytest.mark.parametrize("change", [in_header, in_bytes])
def test_safetensors(change: Callable[[str], Change], tmp_path: Path):
    folder = export("gpt2", tmp_path / "theirs")
    assert len(load_file(folder / "model.safetensors")) > 20
    check(folder, change("model.safetensors"), use_model, tmp_path)


def test_gguf(tmp_path: Path):
    (tmp_path / "theirs").mkdir()
    library = train_tokenizer("gpt2", 320)
    write_gguf(tmp_path / "theirs" / "model.gguf", small_model("llama"), tokenizer=library)
    check(tmp_path / "theirs", in_bytes("model.gguf"), use_gguf, tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_tokenizer_json(kind: str, name: str, tmp_path: Path):
    check(write_tokenizer(tmp_path / "theirs", kind, 400), in_json(name), use_tokenizer, tmp_path)


def test_a_bundle(tmp_path: Path):
    (tmp_path / "theirs").mkdir()
    load_tokenizer(write_tokenizer(tmp_path / "bert", "bert", 400)).save(tmp_path / "theirs")
    check(tmp_path / "theirs", in_json("tokenizer.bundle.json"), use_tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("kind", "change"),
    [("bert", in_bytes("vocab.txt")), ("gpt2", in_json("vocab.json")), ("gpt2", in_bytes("merges.txt"))],
)
def test_older_vocabularies(kind: str, change: Change, tmp_path: Path):
    (tmp_path / "theirs").mkdir()
    train_tokenizer(kind, 400).model.save(str(tmp_path / "theirs"))
    check(tmp_path / "theirs", change, use_tokenizer, tmp_path)


@pytest.mark.parametrize(("kind", "size"), [("bpe", 320), ("unigram", 120)])
def test_sentencepiece(kind: str, size: int, tmp_path: Path):
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts(),
        model_writer=content,
        vocab_size=size,
        model_type=kind,
        byte_fallback=kind == "bpe",
        minloglevel=2,
    )
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "spiece.model").write_bytes(content.getvalue())
    settings = {"extra_ids": 5, "added_tokens_decoder": {str(size + 5): {"content": "<q>"}}}
    (tmp_path / "theirs" / "tokenizer_config.json").write_text(json.dumps(settings))
    check(tmp_path / "theirs", in_bytes("spiece.model"), use_tokenizer, tmp_path)
    check(tmp_path / "theirs", in_json("tokenizer_config.json"), use_tokenizer, tmp_path)


def test_the_command_ends_in_one_line(tmp_path: Path):
    folder = export("llama", tmp_path / "theirs")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    command = [sys.executable, "-m", "llmtrain", "import", f"source={folder}", f"output={tmp_path / 'ours'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    (line,) = done.stderr.strip().split("\n")
    assert "config.json: got a pipe, not a file; allowed: a Hugging Face model folder holds this file" in line
