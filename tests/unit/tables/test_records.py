"""Rows of tables as files have them."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from llmtrain.errors import DataError
from llmtrain.prepare.source_file import SourceFile
from llmtrain.tables.records import read_records


def rows(path: Path, kind: str, compression: str = "", **options: Any) -> list[dict[str, Any]]:
    status = os.stat(path)
    file = SourceFile(path, path.name, kind, compression, status.st_size, status.st_mtime_ns)
    return [record.values for record in read_records(file, scratch=path.parent, **options)]


def test_csv_with_and_without_a_header(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"Good, très bien",1\nBad,0\n')
    assert rows(path, "csv") == [{"text": "Good, très bien", "label": "1"}, {"text": "Bad", "label": "0"}]
    assert rows(path, "csv", header=False)[0] == {"0": "text", "1": "label"}


def test_tsv_keeps_quotes(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\n"said\t1\n')
    assert rows(path, "tsv") == [{"text": '"said', "label": "1"}]


def test_json_lines_parquet_and_json_are_alike(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    expected = [{"text": "a b", "label": 1, "tags": ["x", "y"]}, {"text": "ç", "label": 2, "tags": []}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in expected))
    (tmp_path / "a.json").write_text(json.dumps(expected, indent=1))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(expected), tmp_path / "a.parquet")
    assert rows(tmp_path / "a.jsonl", "jsonl") == expected
    assert rows(tmp_path / "a.jsonl", "json") == expected, "JSON lines under the name .json"
    assert rows(tmp_path / "a.json", "json") == expected
    assert rows(tmp_path / "a.jsonl.gz", "jsonl", "gz") == expected
    assert rows(tmp_path / "a.parquet", "parquet") == expected


@pytest.mark.parametrize(
    ("text", "tokens", "tags"),
    [
        ("EU\tB-ORG\nis\tO\n\n", ["EU", "is"], ["B-ORG", "O"]),
        ("-DOCSTART- -X- O O\n\nEU NNP I-NP I-ORG\nis VBZ I-VP O\n", ["EU", "is"], ["I-ORG", "O"]),
        ("# text = EU is\n1\tEU\tB-ORG\t-\t-\n2\tis\tO\t-\tO\n", ["EU", "is"], ["B-ORG", "O"]),
    ],
    ids=["two columns", "CoNLL-2003", "numbered, with comments"],
)
def test_columns_of_words_and_tags(tmp_path: Path, text: str, tokens: list[str], tags: list[str]) -> None:
    path = tmp_path / "a.conll"
    path.write_text(text)
    [row] = rows(path, "conll")
    assert row["tokens"] == tokens
    assert row["tags"] == tags


def test_each_question_of_squads_form_is_a_row(tmp_path: Path) -> None:
    answers = [{"text": "Paris", "answer_start": 0}]
    question = {"id": "1", "question": "Where?", "answers": answers}
    none = {"id": "2", "question": "Why?", "answers": [], "is_impossible": True}
    document = {"data": [{"title": "t", "paragraphs": [{"context": "Paris.", "qas": [question, none]}]}]}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document))
    first, second = rows(path, "json")
    assert first["answers"] == answers
    assert first["context"] == "Paris."
    assert second["is_impossible"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "text,label\nx\n", "a.csv line 2: got 1 values; allowed: 2"),
        ("a.csv", "text,text\nx,y\n", "a.csv header: got field text twice"),
        ("a.jsonl", '{"text": 1}\n[1]\n', "a.jsonl line 2: got a JSON list"),
        ("a.jsonl", "{\n", "a.jsonl line 1: got invalid JSON"),
        ("a.json", '{"data": [1]}', "a.json: got another form of JSON"),
        ("a.json", "[1]", "a.json item 1: got a JSON int"),
        ("a.conll", "a\tO\nb\n\n", "a.conll line 2"),
    ],
)
def test_a_mistake_names_file_and_line(tmp_path: Path, name: str, content: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        rows(path, path.suffix[1:])
    assert said in str(caught.value)
