"""The tokenizer: lossless, reproducible, and clear about what it refuses."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmtrain.errors import DataError
from llmtrain.prepare.clean import CleanCounts, clean
from llmtrain.tokenizers.base import Tokenizer
from llmtrain.tokenizers.config import SMALLEST_VOCABULARY, TokenizerConfig
from llmtrain.tokenizers.folder import load_tokenizer
from llmtrain.tokenizers.sentencepiece import SentencePieceTokenizer, train


def documents(count: int = 300) -> list[str]:
    """Documents of 400 random words."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice([*"aeioubcdfglmnrstü"], rng.integers(2, 9))) for _ in range(400)]
    return [" ".join(rng.choice(words, 30)) + " 123\n\tnext   line" for _ in range(count)]


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return SentencePieceTokenizer(train(documents(), TokenizerConfig(kind=request.param, vocab_size=340)))


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@example(text="")
@example(text="  two  spaces   and more    ")
@example(text=" \n\n\t\t line\n")
@example(text="emoji 👩‍👩‍👧🎬 and ꙮ 漢字")
@example(text="<s> </s> <pad> <unk> <0x0A>")
def test_decode_gives_back_every_clean_text(tokenizer: Tokenizer, text: str):
    for clean_text in clean([text], "nfc", CleanCounts()):
        text = clean_text.decode()
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_byte_lengths()[ids].sum() == len(clean_text)
        assert tokenizer.unk_id not in ids
        assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} & set(ids)


VOCABULARIES = {
    "no spaces": ["abcabcabdab" * 5] * 20,
    "only spaces": ["    "],
    "chinese": ["".join(map(chr, range(0x4E00, 0x4E40)))] * 20,
    "digits": ["0123456789"] * 10,
    "code": ["\tif (a  ==  b) {\n\t\treturn   f(a);\n}\n"] * 10,
    "one character": ["a"],
    "rare spaces": ["abcdefgh" * 1000 + " x"] * 4,
}


@pytest.fixture(
    scope="module", params=[(n, kind) for n in VOCABULARIES for kind in ("unigram", "bpe")], ids=str
)
def narrow(request: pytest.FixtureRequest) -> Tokenizer:
    """The smallest vocabulary that can be learned of a text that lacks something."""
    name, kind = request.param
    config = TokenizerConfig(kind=kind, vocab_size=SMALLEST_VOCABULARY)
    try:
        model = train(VOCABULARIES[name], config)
    except DataError as error:
        least = int(error.problems[0].allowed.removeprefix("at least ").split()[0])
        model = train(VOCABULARIES[name], replace(config, vocab_size=least))
    return SentencePieceTokenizer(model)


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"))
    | st.text(" \t\na1漢", max_size=30)
)
@example(text=" ")
@example(text="a b\n   c\t\t d ")
@example(text="\x00\x85\u2028 \u00a0")
def test_every_vocabulary_gives_back_every_text(narrow: Tokenizer, text: str):
    ids = narrow.encode(text)
    assert narrow.decode(ids) == text
    assert narrow.token_byte_lengths()[ids].sum() == len(text.encode())
    assert narrow.is_lossless


def test_batches_arrays_and_single_texts_agree(tokenizer: Tokenizer):
    texts = documents(5)
    single = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(texts) == single
    assert [ids.tolist() for ids in tokenizer.encode_arrays([t.encode() for t in texts])] == single


def test_ids_and_byte_lengths(tokenizer: Tokenizer):
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2, 3)
    lengths = tokenizer.token_byte_lengths()
    assert lengths.dtype == np.int32
    assert lengths.shape == (tokenizer.vocab_size,) == (340,)
    assert lengths[:4].tolist() == [0, 0, 0, 0]
    assert lengths[4:260].tolist() == [1] * 256
    assert lengths[260:].min() >= 1
    assert tokenizer.is_lossless


def test_training_depends_on_documents_and_config_alone():
    config = TokenizerConfig(vocab_size=320)
    assert train(documents(), config) == train(documents(), config)
    assert train(documents(), config) != train(documents(200), config)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_vocabulary_larger_than_the_data_allow_names_the_largest(kind: str):
    with pytest.raises(DataError) as caught:
        train(documents(), TokenizerConfig(kind=kind, vocab_size=8192))
    (problem,) = caught.value.problems
    assert problem.where == "tokenizer.vocab_size"
    largest = int(problem.allowed.split()[2])
    assert (
        SentencePieceTokenizer(train(documents(), TokenizerConfig(kind=kind, vocab_size=largest))).vocab_size
        == largest
    )


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_vocabulary_too_small_for_the_characters_names_the_smallest(kind: str):
    text = ["".join(map(chr, range(0x4E00, 0x4E80)))] * 20
    config = TokenizerConfig(kind=kind, vocab_size=SMALLEST_VOCABULARY, character_coverage=1.0)
    with pytest.raises(DataError) as caught:
        train(text, config)
    smallest = int(caught.value.problems[0].allowed.split()[2])
    config = TokenizerConfig(kind=kind, vocab_size=smallest, character_coverage=1.0)
    assert SentencePieceTokenizer(train(text, config)).vocab_size == smallest


def test_config_refuses_less_than_the_bytes_and_special_tokens():
    (problem,) = TokenizerConfig(vocab_size=SMALLEST_VOCABULARY - 1).problems()
    assert "256 bytes" in problem.allowed
    assert not [*TokenizerConfig(vocab_size=SMALLEST_VOCABULARY).problems()]


def given_model(**options: object) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents()), model_writer=model, vocab_size=80, minloglevel=2, **options
    )
    return model.getvalue()


def test_a_model_without_eos_separates_with_bos():
    assert SentencePieceTokenizer(given_model(eos_id=-1, bos_id=1)).eos_id == 1


def test_a_model_without_eos_and_bos_is_refused():
    with pytest.raises(DataError, match="without an eos, sep or bos"):
        SentencePieceTokenizer(given_model(eos_id=-1, bos_id=-1))


def test_a_lossy_model_says_so():
    assert not SentencePieceTokenizer(given_model()).is_lossless


def test_what_is_no_model_is_refused(tmp_path):
    (tmp_path / "x.model").write_bytes(b"no model at all")
    with pytest.raises(DataError, match=r"x\.model: got an invalid sentencepiece model"):
        load_tokenizer(tmp_path / "x.model")
    with pytest.raises(DataError, match="No such file"):
        load_tokenizer(tmp_path / "missing.model")


def folder_with(path: Path, name: str, model: bytes, config: dict[str, object]) -> Path:
    (path / name).write_bytes(model)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_the_sentinels_of_t5_stand_behind_its_pieces(tmp_path: Path):
    from transformers import T5Tokenizer

    model = given_model(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    folder = folder_with(tmp_path, "spiece.model", model, {"extra_ids": 5})
    tokenizer, theirs = load_tokenizer(folder), T5Tokenizer.from_pretrained(folder, extra_ids=5)
    assert tokenizer.vocab_size == 85 == len(theirs)
    assert tokenizer.sentinel_ids == (84, 83, 82, 81, 80)
    assert list(tokenizer.sentinel_ids) == theirs.convert_tokens_to_ids([f"<extra_id_{n}>" for n in range(5)])
    assert tokenizer.special_ids == {"pad": 0, "eos": 1, "unk": 2}
    for text in (*documents(3), "a<extra_id_0>"):
        assert tokenizer.encode(text) == theirs(text, add_special_tokens=False).input_ids
    again = load_tokenizer(tokenizer.save(tmp_path))
    assert (again.vocab_size, again.sha256) == (85, tokenizer.sha256)


def test_tokens_added_to_llamas_and_what_special_pieces_are_called(tmp_path: Path):
    model = given_model(control_symbols=["<sep>", "<cls>"], user_defined_symbols=["<mask>"])
    added = {"added_tokens_decoder": {"80": {"content": "<pad>", "special": True}}}
    tokenizer = load_tokenizer(folder_with(tmp_path, "tokenizer.model", model, added))
    ids = {"unk": 0, "bos": 1, "eos": 2, "sep": 3, "cls": 4, "mask": 5, "pad": 80}
    assert tokenizer.special_ids == ids
    assert tokenizer.eos_id == 2
    assert set(tokenizer.ordinary_ids().tolist()) == set(range(6, 80))
    assert not {80, 3, 4} & set(tokenizer.encode("<pad> <sep> <cls>"))


def test_special_pieces_that_a_text_spells_out_can_be_text():
    options = {"control_symbols": ["<cls>"], "user_defined_symbols": ["<mask>", "<word>"]}
    tokenizer = SentencePieceTokenizer(given_model(**options))
    mask, text = tokenizer.special_ids["mask"], "a <mask> <cls> </s> b"
    assert tokenizer.typed_specials() == ["<mask>"]
    assert mask in tokenizer.encode(text)
    tokenizer.encode_specials_as_text()
    assert tokenizer.typed_specials() == []
    assert mask not in tokenizer.encode(text)
    assert tokenizer.pieces().index("<word>") in tokenizer.encode("a <word>")
