"""Files of others: only files, only so long, only of their types."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import pytest
import yaml

from llmtrain import reading
from llmtrain.errors import DataError


def test_a_pipe_a_device_a_socket_and_a_folder_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for path, kind in (
            (tmp_path / "pipe", "a pipe, not a file"),
            (tmp_path / "link", "a device, not a file"),
            (tmp_path, "a folder, not a file"),
        ):
            with pytest.raises(OSError, match=kind):
                reading.read_bytes(path, 100)
        with pytest.raises(OSError, match="No such device"):
            reading.read_bytes(tmp_path / "socket", 100)


def test_a_link_to_a_file_is_followed(tmp_path):
    (tmp_path / "blob").write_bytes(b"content")
    (tmp_path / "link").symlink_to(tmp_path / "blob")
    assert reading.read_bytes(tmp_path / "link", 7) == b"content"


def test_a_file_beyond_the_bound_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "hole"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="a file of 1,099,511,627,776 bytes, more than 1,000"):
        reading.read_bytes(path, 1000)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff", "invalid UTF-8 at byte 0"),
        (b"[" * 1_000_000, "nested too deeply"),
        (b"1" * 10_000, "a number of more than 4,300 digits"),
        (b"{", "invalid JSON"),
        (b"[]", "a list instead of an object"),
        (b"true", "true or false instead of an object"),
        (b"1", "a number instead of an object"),
    ],
)
def test_what_is_no_object_is_told_in_a_phrase(content, reason):
    with pytest.raises(ValueError, match=reason):
        reading.parse_object(content)


@dataclass(frozen=True)
class _Entry:
    file: str
    size: int
    share: float | None = None


@dataclass(frozen=True)
class _File:
    name: str
    entries: tuple[_Entry, ...]
    is_good: bool = True


GOOD = {"name": "a", "entries": [{"file": "b", "size": 1, "share": 1}], "later": {"anything": 1}}


def test_keys_of_later_versions_are_left_alone():
    assert reading.decode_file(_File, GOOD, "x.json", DataError) == _File("a", (_Entry("b", 1, 1.0),))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"name": 7}, "x.json: name: got 7; allowed: text"),
        ({"name": None}, "x.json: name: got nothing; allowed: text"),
        ({"is_good": "yes"}, "x.json: is_good: got 'yes'; allowed: true or false"),
        ({"is_good": 1}, "x.json: is_good: got 1; allowed: true or false"),
        (
            {"entries": {"file": "b", "size": 1}},
            "x.json: entries: got {'file': 'b', 'size': 1}; allowed: a list",
        ),
        ({"entries": [3]}, "x.json: entries[0]: got 3; allowed: a section of keys"),
        ({"entries": [{"file": "b"}]}, "x.json: entries[0].size: got nothing; allowed: a whole number"),
        (
            {"entries": [{"file": "b", "size": "1"}]},
            "x.json: entries[0].size: got '1'; allowed: a whole number",
        ),
        (
            {"entries": [{"file": "b", "size": 1.0}]},
            "x.json: entries[0].size: got 1.0; allowed: a whole number",
        ),
        (
            {"entries": [{"file": "b", "size": 10**400}]},
            "x.json: entries[0].size: got a whole number of 1,329 bits; "
            "allowed: a whole number between -2^63 and 2^63",
        ),
        (
            {"entries": [{"file": "b", "size": 1, "share": "1"}]},
            "x.json: entries[0].share: got '1'; allowed: a finite number, or null",
        ),
    ],
)
def test_a_field_of_another_type_is_named_with_its_file(change, line):
    with pytest.raises(DataError) as failure:
        reading.decode_file(_File, GOOD | change, "x.json", DataError)
    assert str(failure.value) == line


def test_a_missing_field_is_named():
    with pytest.raises(DataError, match=r"x\.json: name: got nothing; allowed: text"):
        reading.decode_file(_File, {"entries": []}, "x.json", DataError)


def test_a_key_twice_is_refused_where_it_may_not_be():
    content = '{"a": {"b": 1, "b": 2}}'
    assert reading.parse_object(content) == {"a": {"b": 2}}
    with pytest.raises(ValueError, match="the key 'b' twice"):
        reading.parse_object(content, unique=True)


def test_half_a_character_is_refused_where_it_may_not_be_and_two_halves_are_one():
    assert reading.parse_json(r'"\ud83d\ude00"', utf8=True) == "😀"
    for content in (r'["\ud83d"]', r'{"\udc00": 1}', '"\ud800"'):
        with pytest.raises(ValueError, match="a lone surrogate"):
            reading.parse_json(content, utf8=True)
        reading.parse_json(content)  # as a name of a file that is no UTF-8


def test_more_values_than_may_be_take_no_memory():
    with pytest.raises(ValueError, match="3,000,000 values, more than 1,000,000"):
        reading.parse_json(b"[" + b"[]," * 1_499_999 + b"[]]")
    assert len(reading.parse_json(b"[" + b"0," * 99_999 + b"0]")) == 100_000


@pytest.mark.parametrize("number", ["1" + ":1" * 500_000, "1" * 500_000, "1." + "1" * 500_000])
def test_a_number_in_yaml_takes_no_time(number: str):
    with pytest.raises(ValueError, match="invalid YAML: an invalid date or number"):
        reading.parse_yaml(f"a: {number}".encode())


def test_yaml_is_read_as_ever():
    content = b"a: 1\nb: 1.5\nc: 1:30\nd: 0x10\ne: 1e3\nf: 1.0e+3\ng: [true, null, x]\nh: .inf"
    assert reading.parse_yaml(content) == yaml.safe_load(content)
