"""Tokenizers of others that ask for too much, or crash their library: each is one line."""

from __future__ import annotations

import base64
import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from llmtrain.errors import DataError
from llmtrain.interchange.huggingface_tokenizer import tokenizer_files
from llmtrain.tokenizers.folder import load_tokenizer
from llmtrain.tokenizers.sentencepiece import SentencePieceTokenizer
from tests.support.tokenizers import texts, train_tokenizer, write_tokenizer

BILLION = 10**9
Json = dict[str, Any]


def refusal(path: Path) -> str:
    started = time.process_time()
    with pytest.raises(DataError) as caught:
        load_tokenizer(path)
    assert time.process_time() - started < 5
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000
    return str(caught.value)


def replace(pattern: Json, content: str) -> Json:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*steps: Json) -> Json:
    return {"type": "Sequence", "normalizers": list(steps)}


def charsmap(content: bytes) -> Json:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(content).decode()}


def in_vocabulary(i: Any) -> Callable[[Json], None]:
    return lambda spec: spec["model"]["vocab"].update(far=i)


def with_normalizer(step: Any) -> Callable[[Json], None]:
    return lambda spec: spec.update(normalizer=step)


def with_model(**keys: Any) -> Callable[[Json], None]:
    return lambda spec: spec["model"].update(keys)


def template(times: int, ids: int) -> Json:
    """A post-processor that puts so many ids, so many times, before a text."""
    special = {"SpecialToken": {"id": "X", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    tokens = {"X": {"id": "X", "ids": [0] * ids, "tokens": ["a"] * ids}}
    return {
        "type": "TemplateProcessing",
        "single": [*[special] * times, text],
        "pair": [text],
        "special_tokens": tokens,
    }


DOUBLED = replace({"String": "a"}, "aa")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            in_vocabulary(BILLION),
            "got the id 1,000,000,000 in a vocabulary of 401; allowed: ids below 66,338",
        ),
        (in_vocabulary(2**32 - 1), "got the id 4,294,967,295"),
        (in_vocabulary(2**32), "got an invalid tokenizer (invalid value"),
        (in_vocabulary(-1), "got an invalid tokenizer (invalid value"),
        (with_normalizer(sequence(*[DOUBLED] * 30)), "normalizer: steps that make texts 1,073,741,824 times"),
        (
            with_normalizer(replace({"Regex": "."}, "x" * 1000)),
            "normalizer: steps that make texts 1,000 times",
        ),
        (with_normalizer({"type": "Prepend", "prepend": "x" * 1000}), "texts 1,001 times as long"),
        (
            lambda spec: spec.update(decoder={"type": "Sequence", "decoders": [DOUBLED] * 30}),
            "decoder: steps",
        ),
        # The library would end the process, for want of memory.
        (
            with_normalizer(charsmap(b"\xff" * 8)),
            "precompiled_charsmap of 8 bytes with a trie of 4,294",
        ),
        (with_normalizer(charsmap(b"")), "precompiled_charsmap of 0 bytes"),
        (with_normalizer(charsmap(bytes(8) + b"x" * 1000 + b"\0")), "1,000 bytes for a character"),
        (with_normalizer({"type": "Precompiled", "precompiled_charsmap": "!"}), "that is not base64"),
        (with_model(continuing_subword_prefix="#", merges=[["a", "é"]]), "whose second piece does not begin"),
        (with_model(continuing_subword_prefix="#", merges=["a é"]), "whose second piece does not begin"),
        (with_model(continuing_subword_prefix="x" * 100), "continuing_subword_prefix of 100 characters"),
        (with_model(max_input_chars_per_word=10**18), "max_input_chars_per_word"),
        (
            with_normalizer(sequence(*[{"type": "ByteLevel"}] * 24)),
            "normalizer: steps that make texts 16,777,216",
        ),
        (
            lambda spec: spec.update(post_processor=template(1000, 100_000)),
            "post_processor: 100,000,000 ids around a text, more than 1,000",
        ),
        (
            lambda spec: spec.update(
                post_processor={"type": "Sequence", "processors": [template(10, 30)] * 4}
            ),
            "post_processor: 1,200 ids around a text",
        ),
        (lambda spec: spec["added_tokens"][0].update(content="x" * 10_000), "a piece of 10,000 characters"),
        (with_model(vocab=5), "got an invalid tokenizer (invalid type"),
        (lambda spec: spec.update(added_tokens=5), "got an invalid tokenizer (invalid type"),
        (lambda spec: spec["model"]["vocab"].update({"x" * 10_000: 390}), "a piece of 10,000 characters"),
        (
            with_normalizer(replace({"Regex": "a|" * 50_000 + "b"}, "x")),
            "a pattern of 100,001 characters",
        ),
        # It would panic.
        (with_normalizer(replace({"Regex": ""}, "xx")), "got an invalid tokenizer (index out of bounds"),
        (lambda spec: spec.update(pre_tokenizer={"type": "FixedLength", "length": 0}), "chunk size must be"),
        (lambda spec: spec["added_tokens"][0].update(content="\ud800"), "a lone surrogate"),
    ],
)
def test_a_tokenizer_that_asks_for_too_much(
    change: Callable[[Json], None], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    write_tokenizer(tmp_path, "gpt2", 400)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert message in refusal(tmp_path)
    assert capfd.readouterr().err == "", "a panic's report"


def test_a_text_that_a_tokenizer_fails_on(tmp_path: Path):
    """A regular expression that takes exponential time, which the library gives up by a panic."""
    write_tokenizer(tmp_path, "gpt2", 400)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["normalizer"] = replace({"Regex": "(a+)+$"}, "x")
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load_tokenizer(tmp_path)
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_arrays([text])):
        with pytest.raises(DataError, match=r"a tokenizer that fails on a text \(Onig: Regex search error"):
            encode("a" * 40 + "b")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"eos_token": 5}, "eos_token: got 5; allowed: text or a section of keys or null"),
        ({"eos_token": ["</s>"]}, "eos_token: got ['</s>']"),
        ({"eos_token": {}}, "eos_token: got {}"),
        ({"mask_token": {"content": 5}}, "mask_token: got {'content': 5}"),
        ([], "got an invalid tokenizer (a list instead of an object)"),
    ],
)
def test_a_special_token_of_another_type(name: str, content: Any, message: str, tmp_path: Path):
    write_tokenizer(tmp_path, "gpt2", 400)
    (tmp_path / name).write_text(json.dumps(content))
    assert f"{name}: {message}" in refusal(tmp_path)


def test_null_still_says_that_there_is_none(tmp_path: Path):
    write_tokenizer(tmp_path, "gpt2", 400)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null, "eos_token": "<|endoftext|>"}')
    assert load_tokenizer(tmp_path).special_ids.keys() == {"eos"}


def sentencepiece_model(**options: Any) -> bytes:
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts(), model_writer=content, minloglevel=2, **options
    )
    return content.getvalue()


BPE = sentencepiece_model(vocab_size=320, model_type="bpe", byte_fallback=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", {"extra_ids": BILLION}, "extra_ids: got 1000000000; allowed: 0 to 10,000"),
        ("tokenizer_config.json", {"extra_ids": -5}, "extra_ids: got -5"),
        ("tokenizer_config.json", {"extra_ids": "100"}, "extra_ids: got '100'; allowed: a whole number"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": "a"}}, "added_tokens_decoder: got 'x'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: "a"}}, "allowed: ids of tokens"),
        ("tokenizer_config.json", {"added_tokens_decoder": []}, "added_tokens_decoder: got []"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"320": {"content": 5}}}, "decoder.320: got"),
        ("added_tokens.json", {"<a>": "320"}, "ids.<a>: got '320'; allowed: a whole number"),
        ("added_tokens.json", ["<a>"], "added_tokens.json: got a list instead of an object"),
        ("config.json", [], "config.json: got a list instead of an object"),
    ],
)
def test_what_stands_beside_a_sentencepiece_model(name: str, content: Any, message: str, tmp_path: Path):
    (tmp_path / "tokenizer.model").write_bytes(BPE)
    (tmp_path / name).write_text(json.dumps(content))
    assert message in refusal(tmp_path)


@pytest.mark.parametrize("i", [BILLION, 2**62])
def test_a_far_id_behind_a_sentencepiece_model_is_left_out(i: int, tmp_path: Path):
    (tmp_path / "tokenizer.model").write_bytes(BPE)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<far>": i, "<near>": 320}))
    assert load_tokenizer(tmp_path).vocab_size == 321


def changed(change: Callable[[Any], object]) -> bytes:
    spec = sentencepiece_model_pb2.ModelProto.FromString(BPE)
    change(spec)
    return spec.SerializeToString()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no model",
        BPE[:-100],
        changed(lambda spec: setattr(spec.pieces[300], "score", float("nan"))),
        changed(lambda spec: setattr(spec.pieces[300], "piece", "")),
        changed(lambda spec: setattr(spec.normalizer_spec, "precompiled_charsmap", b"\xff" * 8)),
        BPE.replace("▁".encode(), b"\xff\xff\xff"),
    ],
)
def test_what_is_no_sentencepiece_model(content: bytes, tmp_path: Path):
    (tmp_path / "x.model").write_bytes(content)
    assert "x.model: got an invalid sentencepiece model (" in refusal(tmp_path / "x.model")


def test_an_unknown_id_that_is_none_goes_out_as_the_library_has_it():
    odd = changed(lambda spec: setattr(spec.trainer_spec, "unk_id", BILLION))
    files = tokenizer_files(SentencePieceTokenizer(odd), None, "x")
    assert files["tokenizer.json"]["model"]["unk_token"] == "<unk>"


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ({"a": BILLION, "<s>": 1}, "got 1000000000; allowed: the id of a token"),
        ({"a": 10**8, "<s>": 1}, "got the id 100,000,000 in a vocabulary of 2"),
        ({"a": "0", "<s>": 1}, "vocab.json: 'a': got '0'; allowed: the id of a token"),
        ({"a": -1, "<s>": 1}, "got -1"),
        ({"a": None, "<s>": 1}, "got nothing"),
    ],
)
def test_a_vocabulary_with_odd_ids(vocabulary: Json, message: str, tmp_path: Path):
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("")
    assert message in refusal(tmp_path)


@pytest.mark.parametrize("key", ["do_lower_case", "strip_accents", "tokenize_chinese_chars"])
def test_a_setting_of_vocab_txt_of_another_type(key: str, tmp_path: Path):
    train_tokenizer("bert", 400).model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({key: "yes"}))
    assert f"tokenizer_config.json: {key}: got 'yes'; allowed: true or false, or null" in refusal(tmp_path)


@pytest.mark.parametrize("content", [{"files": 5}, {"files": {"tokenizer.json": 5}}, {"files": {"x": "{}"}}])
def test_a_bundle_of_other_types(content: Json, tmp_path: Path):
    bundle = {"format": "llmtrain-tokenizer", "version": 1, **content}
    (tmp_path / "tokenizer.bundle.json").write_text(json.dumps(bundle))
    assert "tokenizer.bundle.json" in refusal(tmp_path)


FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt", "tokenizer.bundle.json")


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file(name: str, tmp_path: Path):
    (tmp_path / "device").mkdir()
    os.mkfifo(tmp_path / name)
    (tmp_path / "device" / name).symlink_to("/dev/zero")
    assert f"{name}: got a pipe, not a file" in refusal(tmp_path)
    assert f"{name}: got a device, not a file" in refusal(tmp_path / "device")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"])
def test_a_companion_that_is_no_file(name: str, tmp_path: Path):
    write_tokenizer(tmp_path, "gpt2", 400)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    assert f"{name}: got a pipe, not a file" in refusal(tmp_path)


@pytest.mark.parametrize("name", [*FILES, "config.json"])
def test_a_file_of_eight_gigabytes(name: str, tmp_path: Path):
    if name == "config.json":
        (tmp_path / "tokenizer.model").write_bytes(BPE)
    with open(tmp_path / name, "wb") as file:
        file.truncate(8 << 30)
    assert f"{name}: got a file of 8,589,934,592 bytes, more than" in refusal(tmp_path)


def test_a_sentinel_of_any_number_is_none(tmp_path: Path):
    write_tokenizer(tmp_path, "gpt2", 400)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["model"]["vocab"][f"<extra_id_{'9' * 5000}>"] = 400
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert load_tokenizer(tmp_path).sentinel_ids == ()


def test_a_key_twice_is_refused(tmp_path: Path):
    """The library might read the other one."""
    write_tokenizer(tmp_path, "gpt2", 400)
    content = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(content.rstrip()[:-1] + ', "normalizer": null}')
    assert "got an invalid tokenizer (the key 'normalizer' twice)" in refusal(tmp_path)
