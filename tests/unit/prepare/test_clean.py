"""Cleaning: what goes, what stays, and that batches are cleaned as their documents alone are."""

import unicodedata

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmtrain.prepare.clean import CleanCounts, clean, digests, split_of

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=8)


def cleaned(*documents: str, normalization: str = "nfc") -> list[str]:
    return [text.decode() for text in clean(documents, normalization, CleanCounts())]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("a\r\nb\rc\n", "a\nb\nc"),
        ("a\x00b\x07c\x1ed\x7fe\x85f", "abcdef"),
        ("tab\tand\nnewline stay", "tab\tand\nnewline stay"),
        ("a▁b", "a b"),
        ("e\u0301", "é"),
        ("e\x00\u0301", "é"),  # a control character that kept two code points apart
        ("ﬁ", "ﬁ"),
        ("\ud83d alone", "\ufffd alone"),
        ("👩‍👩‍👧 joins", "👩‍👩‍👧 joins"),
    ],
)
def test_one_document(raw: str, expected: str):
    assert cleaned(raw) == [expected]


def test_normalization_forms():
    assert cleaned("ﬁ e\u0301", normalization="nfkc") == ["fi é"]
    assert cleaned("ﬁ e\u0301", normalization="none") == ["ﬁ e\u0301"]


def test_counts():
    counts = CleanCounts()
    documents = ["", " \n\t", "\x00", "a\x01\x02", "e\u0301", "x▁y▁z", "plain"]
    assert clean(documents, "nfc", counts) == [b"a", "é".encode(), b"x y z", b"plain"]
    assert counts == CleanCounts(
        documents_read=7, empty_dropped=3, documents_normalized=1, controls_removed=3, spaces_replaced=2
    )


def test_replaced_surrogates_are_counted():
    counts = CleanCounts()
    assert clean(["\ud83d and \ude00", "none", "\x1e \udfff"], "nfc", counts)[0] == "� and �".encode()
    assert counts.surrogates_replaced == 3


def test_bytes_that_are_no_utf8_are_refused():
    with pytest.raises(UnicodeDecodeError):
        clean([b"good", b"bad \xff"], "nfc", CleanCounts())


@given(TEXTS, st.sampled_from(["none", "nfc", "nfkc"]))
@example(["a\x1eb", "c"], "nfc")
@example(["e", "\u0301"], "nfc")
def test_a_batch_is_cleaned_as_its_documents(documents: list[str], normalization: str):
    alone = [text for document in documents for text in clean([document], normalization, CleanCounts())]
    assert clean(documents, normalization, CleanCounts()) == alone
    as_bytes = [document.encode() for document in documents]
    assert clean(as_bytes, normalization, CleanCounts()) == alone


@given(TEXTS)
def test_cleaning_twice_changes_nothing_and_leaves_no_control(documents: list[str]):
    once = clean(documents, "nfc", CleanCounts())
    counts = CleanCounts()
    assert clean(once, "nfc", counts) == once
    assert counts == CleanCounts(documents_read=len(once))
    for text in once:
        assert not any(unicodedata.category(c) == "Cc" and c not in "\n\t" for c in text.decode())


def test_splits_follow_the_hash_alone():
    documents = [f"document {i}".encode() for i in range(20_000)]
    keys = digests(documents)[:, 1]
    where = split_of(keys, validation=0.1, test=0.2)
    assert np.bincount(where) / len(where) == pytest.approx([0.7, 0.1, 0.2], abs=0.01)
    # Fixed values: another hash would move every document of every corpus.
    assert digests([b"document 0"]).tolist() == [[6264347385238488317, 12253820018167395901]]
    assert split_of(keys[:12], 0.3, 0.3).tolist() == [0, 1, 1, 0, 0, 2, 1, 1, 1, 0, 0, 0]
    # A larger share keeps what a smaller one held out.
    assert set(np.flatnonzero(where == 1)) <= set(np.flatnonzero(split_of(keys, 0.15, 0.1) == 1))
