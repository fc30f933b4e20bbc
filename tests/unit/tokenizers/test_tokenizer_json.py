"""Tokenizers of Hugging Face folders: the ids of transformers, one file in corpora, and clear refusals."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import models, processors
from transformers import AutoTokenizer

from llmtrain.corpus.config import TokenDataConfig
from llmtrain.corpus.corpora import open_corpora
from llmtrain.errors import DataError
from llmtrain.prepare.config import PrepareConfig, SplitConfig
from llmtrain.prepare.job import prepare
from llmtrain.tokenizers.base import BUNDLE_FILE
from llmtrain.tokenizers.config import TokenizerConfig
from llmtrain.tokenizers.folder import find_tokenizer, load_tokenizer
from llmtrain.tokenizers.huggingface import JsonTokenizer
from tests.support.tokenizers import KINDS, SENTINELS, texts, train_tokenizer, write_tokenizer

TEXTS = [
    *texts(5),
    "",
    " \n two  spaces",
    "unseen ꙮ 😀 words",
    "a <|endoftext|> b </s> c [MASK] d <extra_id_2>",
]


@pytest.fixture(scope="module", params=list(KINDS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizers") / request.param, request.param)


def test_ids_are_those_of_transformers(folder: Path):
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    expected = [theirs(text, add_special_tokens=False).input_ids for text in TEXTS]
    assert [ours.encode(text) for text in TEXTS] == ours.encode_batch(TEXTS) == expected
    assert [ids.tolist() for ids in ours.encode_arrays([text.encode() for text in TEXTS])] == expected
    assert ours.vocab_size == len(theirs) == len(ours.pieces())
    for text, ids in zip(TEXTS, expected, strict=True):
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
    for role, piece in KINDS[folder.name].items():
        assert ours.special_ids[role.removesuffix("_token")] == theirs.convert_tokens_to_ids(piece)


def test_special_tokens_that_a_text_spells_out_can_be_text(folder: Path):
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    text = TEXTS[-1]
    spelled = {i for i in ours.special_ids.values() if ours.pieces()[i] in text}
    assert spelled
    assert spelled <= {*ours.encode(text)}
    assert {ours.pieces()[i] for i in spelled} <= {*ours.typed_specials()}
    ours.encode_specials_as_text()
    assert ours.typed_specials() == []
    if folder.name != "t5":  # there unigrams find special tokens even so
        split = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ours.encode(text) == split
    assert not spelled & {*ours.encode(text)}


def test_lengths_and_word_starts(folder: Path):
    tokenizer = load_tokenizer(folder)
    text = "Ubo das, 12 fur"
    ids = tokenizer.encode(text)
    lengths, starts = tokenizer.token_byte_lengths(), tokenizer.word_starts()
    # All but GPT-2's put a space before the first word too, and BERT's has commas of their own.
    assert lengths[ids].sum() == len(text) + (folder.name != "gpt2")
    assert starts[ids].sum() == {"gpt2": 3, "llama": 4, "bert": 5, "t5": 4}[folder.name]
    assert not lengths[list(tokenizer.special_ids.values())].any()
    assert starts[list(tokenizer.special_ids.values())].all()


def test_continuations_are_written_after_what_stands_before(folder: Path):
    tokenizer = load_tokenizer(folder)
    text = "für das cafés 12 ubo"
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    for cut in range(1, len(ids)):
        before = tokenizer.decode(ids[:cut]).rstrip("\ufffd")
        assert before + tokenizer.decode_after(ids[:cut], ids[cut:]) == whole


def test_one_file_holds_the_folder(folder: Path, tmp_path: Path):
    tokenizer = load_tokenizer(folder)
    # The cache of a corpus from elsewhere has names of its own.
    again = load_tokenizer(tokenizer.save(tmp_path).rename(tmp_path / "kept-0123.json"))
    assert (again.sha256, again.special_ids) == (tokenizer.sha256, tokenizer.special_ids)
    assert isinstance(again, JsonTokenizer)
    assert again.files == {path.name: path.read_text() for path in folder.iterdir()}
    assert load_tokenizer(folder / "tokenizer.json").sha256 == tokenizer.sha256


def test_what_stands_before_every_text():
    library = train_tokenizer("llama")
    without = JsonTokenizer({"tokenizer.json": library.to_str()}, "")
    ends = [(token, library.token_to_id(token)) for token in ("<s>", "</s>")]
    library.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    ours = JsonTokenizer({"tokenizer.json": library.to_str()}, "")
    assert (without.first_ids, ours.first_ids) == ((), (ours.bos_id,))
    assert ours.encode("das") == without.encode("das")


def test_ordinary_ids_are_those_of_text(folder: Path):
    tokenizer = load_tokenizer(folder)
    ordinary = set(tokenizer.ordinary_ids().tolist())
    assert len(tokenizer.sentinel_ids) == (SENTINELS if folder.name == "t5" else 0)
    assert ordinary.isdisjoint([*tokenizer.special_ids.values(), *tokenizer.sentinel_ids])
    assert ordinary >= {i for text in TEXTS[:5] for i in tokenizer.encode(text)} - {tokenizer.unk_id}
    # Those whose bytes are no text count too: they are what rare characters are made of.
    assert len(ordinary) == tokenizer.vocab_size - len(
        {*tokenizer.special_ids.values(), *tokenizer.sentinel_ids}
    )


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_older_folders_without_tokenizer_json(kind: str, tmp_path: Path):
    library = train_tokenizer(kind)
    library.model.save(str(tmp_path))
    assert find_tokenizer(tmp_path) == tmp_path / ("vocab.txt" if kind == "bert" else "vocab.json")
    tokenizer = load_tokenizer(tmp_path)
    expected = [encoding.ids for encoding in library.encode_batch(TEXTS, add_special_tokens=False)]
    assert tokenizer.encode_batch(TEXTS) == expected
    roles = {role.removesuffix("_token"): library.token_to_id(t) for role, t in KINDS[kind].items()}
    assert tokenizer.special_ids == roles
    # What it is carried as has all that AutoTokenizer asks for.
    assert isinstance(tokenizer, JsonTokenizer)
    for name, content in tokenizer.files.items():
        (tmp_path / "written").mkdir(exist_ok=True)
        (tmp_path / "written" / name).write_text(content)
    written = AutoTokenizer.from_pretrained(tmp_path / "written")
    assert [written(text, add_special_tokens=False).input_ids for text in TEXTS] == expected
    assert written.convert_tokens_to_ids(getattr(written, next(iter(KINDS[kind])))) in roles.values()


def test_pieces_may_hold_line_ends_of_unicode(tmp_path: Path):
    strange = ["a\u2028b", "\u2029", "##\x85", "\x0b", "\x0c", "\x1cx", "\x1d", "\x1e", "p\rq", "\rq"]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *strange[:4], "", "das", *strange[4:], "fur", "##s"]
    for name, end in (("unix", "\n"), ("windows", "\r\n")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "vocab.txt").write_bytes("".join(piece + end for piece in pieces).encode())
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
        ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
        assert ours.pieces() == pieces
        ids = [pieces.index("das"), pieces.index("fur"), pieces.index("##s")]
        assert ours.encode("das furs") == theirs("das furs", add_special_tokens=False).input_ids == ids


def test_merges_may_hold_line_ends_of_unicode(tmp_path: Path):
    vocabulary = ["<|endoftext|>", "a", "b", "\u2028", "\x85", "a\u2028", "a\u2028b", "b\x85", "ab"]
    (tmp_path / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(vocabulary)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na \u2028\na\u2028 b\nb \x85\na b\n")
    theirs = models.BPE.from_file(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    ours = load_tokenizer(tmp_path)
    assert isinstance(ours, JsonTokenizer)
    ours._library.pre_tokenizer = None
    texts = ["a\u2028b", "b\x85", "ab"]
    assert [ours.encode(text) for text in texts] == [[t.id for t in theirs.tokenize(text)] for text in texts]


def test_what_the_special_tokens_are_for_without_a_config(tmp_path: Path):
    write_tokenizer(tmp_path, "gpt2")
    (tmp_path / "tokenizer_config.json").unlink()
    end = load_tokenizer(tmp_path).special_ids
    assert end.keys() == {"bos", "eos"}
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "RobertaProcessing",
        "sep": ["b", 67],
        "cls": ["a", 66],
        "trim_offsets": True,
        "add_prefix_space": False,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.special_ids == {**end, "cls": tokenizer.encode("a")[0], "sep": tokenizer.encode("b")[0]}


def test_padding_and_truncation_of_the_file_are_left_alone(tmp_path: Path):
    library = train_tokenizer("bert")
    text = "cafés für das cafés für das"
    expected = library.encode(text, add_special_tokens=False).ids
    assert len(expected) > 4
    library.enable_padding(length=64)
    library.enable_truncation(4)
    library.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode(text) == expected


def test_a_corpus_carries_it(folder: Path, tmp_path: Path):
    source = tmp_path / "texts.txt"
    source.write_text("\n".join(text.replace("\n", " ").replace("\t", " ") for text in texts()))
    config = PrepareConfig(
        source=(str(source),),
        output=tmp_path / "corpus",
        tokenizer=TokenizerConfig(model=folder),
        split=SplitConfig(validation=0.0, test=0.0),
        txt_document="line",
        workers=1,
    )
    prepare(config)
    tokenizer = load_tokenizer(folder)
    corpora = open_corpora(TokenDataConfig(path=str(tmp_path / "corpus")))
    assert corpora.tokenizer_path.name == BUNDLE_FILE
    assert corpora.tokenizer_sha256 == tokenizer.sha256
    assert corpora.special_ids == tokenizer.special_ids
    assert corpora.sentinel_ids == tokenizer.sentinel_ids
    (split,) = corpora.splits("train").values()
    tokens, ends = split.read(0, split.num_tokens)
    assert (tokens[ends - 1] == tokenizer.eos_id).all()
    expected = {tuple(tokenizer.encode(line)) for line in source.read_text().split("\n")}
    assert {tuple(d[:-1].tolist()) for d in np.split(tokens, ends)[:-1]} == expected
    prepare(replace(config, tokenizer=TokenizerConfig(vocab_size=400), overwrite=True))
    replaced = open_corpora(TokenDataConfig(path=str(tmp_path / "corpus")))
    assert replaced.tokenizer_path.name == "tokenizer.model"
    assert not (tmp_path / "corpus" / BUNDLE_FILE).exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{", "got an invalid tokenizer (invalid JSON"),
        ("tokenizer.json", b"\xff\xfe\xfa", "got an invalid tokenizer (invalid UTF-8 at byte 0)"),
        ("tokenizer.json", b"[]", "got an invalid tokenizer (a list instead of an object)"),
        ("tokenizer.json", b'{"model": {"type": "BPE"}}', "got an invalid tokenizer ("),
        ("tokenizer.json", pickle.dumps({"a": 1}), "got an invalid tokenizer (invalid UTF-8 at byte 0)"),
        ("vocab.txt", "\n".join(["a", "b"]).encode(), "without an eos, sep or bos"),
        ("tokenizer.model", b"no model", "got an invalid sentencepiece model"),
        ("tokenizer.pkl", pickle.dumps({"a": 1}), "no tokenizer but tokenizer.pkl, which is not opened"),
        (BUNDLE_FILE, b'{"format": "llmtrain-tokenizer", "version": 9}', "got version 9"),
        ("README.md", b"words", "got no tokenizer; allowed: tokenizer.json, a sentencepiece .model"),
    ],
)
def test_what_is_no_tokenizer_is_one_line(name: str, content: bytes, message: str, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_tokenizer(tmp_path)
    assert message in str(caught.value)
    assert len(caught.value.problems) == 1
    assert "\n" not in str(caught.value)
