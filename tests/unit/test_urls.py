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
        ("s3://bucket/a?region=x&secret_key=abc&scheme=http", "s3://bucket/a?region=…&secret_key=…&scheme=…"),
        ("abfss://c@account/a?sas_token=abc", "abfss://account/a?sas_token=…"),
        ("data.path=https://u:secret@h/a", "data.path=https://h/a"),
        ("data.mixture={'https://u:secret@h/a?t=secret': 0.5, s3://k:secret@b: 0.5}",
         "data.mixture={'https://h/a': 0.5, s3://b: 0.5}"),
        ("http://[::1]:18999/a,b?code=S", "http://[::1]:18999/a,b"),
        ("http://u:pw@[::1]:18999/?x=S,S", "http://[::1]:18999/"),
        ("http://h/a#access_token=S", "http://h/a"),
        ("http://u:pa/S@h/x", "http://h/x"),
        ("http://u:p#S@h/x", "http://h/x"),
        ("http://u:p?S@h/x", "http://h/x"),
        ("http://u:pa S@h/x", "http://h/x"),
        ("http://h/a b?code=S", "http://h/a b"),
        ("http://h/x;jsessionid=S", "http://h/x"),
        ("http:/u:S@h/x?sig=S", "http:/h/x"),
        ("/tmp/https:/u:S@h/x?sig=S", "/tmp/https:/h/x"),
        ("s3://KEY:SE/CRET@b/x", "s3://b/x"),
        ("s3://b/p?token=a'S", "s3://b/p?token=…"),
        ("az://c/p?sv=S", "az://c/p?sv=…"),
        ("abfs://c@a/p?se=1&S", "abfs://a/p?se=…&…"),
        ("simplecache::s3://k:S@b/x", "simplecache::s3://b/x"),
        ('"http://u:S@h/x"', '"http://h/x"'),
        ("data.path=http://u:S@h/x y?sig=S", "data.path=http://h/x y"),
        ("http://h/x?sig=S: got no such file (HTTP 404)", "http://h/x: got no such file (HTTP 404)"),
        ("https://host:8080/pkg@1.2/file", "https://host:8080/pkg@1.2/file"),
        ("file:///tmp/a@b", "file:///tmp/a@b"),
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
