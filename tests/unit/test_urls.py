"""What of a URL may be stored, shown and sent."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.urls import without_credentials, without_credentials_in


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("https://user:secret@host/a?sig=secret", "https://host/a"),
        ("HTTPS://user:secret@host/a?sig=secret#b", "HTTPS://host/a"),
        ("s3://key:secret@bucket/a", "s3://bucket/a"),
        ("s3://key:sec@ret'@bucket/a", "s3://bucket/a"),
        ("s3://bucket/a?b", "s3://bucket/a?b"),
        ("s3://bucket/a?region=x&secret_key=abc&scheme=http", "s3://bucket/a?region=x&secret_key=…&scheme=http"),
        ("abfss://c@account/a?sas_token=abc", "abfss://account/a?sas_token=…"),
        ("data.path=https://u:secret@h/a", "data.path=https://h/a"),
        ("data.mixture={'https://u:secret@h/a?t=secret': 0.5, s3://k:secret@b: 0.5}",
         "data.mixture={'https://h/a': 0.5, s3://b: 0.5}"),
        ("no url: user@host, a?key=b", "no url: user@host, a?key=b"),
        ("/plain/path@2?x", "/plain/path@2?x"),
    ],
)  # fmt: skip
def test_texts(text: str, bare: str):
    assert without_credentials(text) == bare


@given(user=st.text(), password=st.text(min_size=3), before=st.sampled_from(["", "a=", "[s3://b, "]))
def test_no_password_is_left(user: str, password: str, before: str):
    url = f"{before}gs://{quote(user, safe='')}:{quote(password, safe='')}@bucket/corpus"
    assert without_credentials(url) == f"{before}gs://bucket/corpus"


def test_trees():
    tree = {
        "path": "s3://k:s@b",
        "mixture": {"https://h?s": 1.0},
        "list": ["https://u@h"],
        "none": None,
        "n": 1,
    }
    bare = {"path": "s3://b", "mixture": {"https://h": 1.0}, "list": ["https://h"], "none": None, "n": 1}
    assert without_credentials_in(tree) == bare
