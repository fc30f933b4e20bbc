"""CSV and TSV: what csv's writer wrote is read back, and no row is swallowed, cut or filled in silence."""

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.errors import DataError
from llmtrain.prepare import source_file
from llmtrain.prepare.clean import CleanCounts
from llmtrain.prepare.read import read_part
from llmtrain.prepare.sources import find_files, plan_units

PIECES = ["a", "é", '"', '""', ",", "\t", "\n", "\r\n", "\r", " ", "漢", "'", "\\", ";"]
CELLS = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)


def read(path: Path, quoting: str = "auto", text_field: str = "text") -> tuple[list[str], CleanCounts]:
    """The column as it stands in the file, and the counts."""
    ((part,),) = plan_units(find_files([str(path)])[0], "auto")
    counts = CleanCounts()
    batches = read_part(part, [text_field], "auto", path.parent, None, counts, quoting)
    return [bytes(text).decode() for batch in batches for text in batch], counts


def written(rows: list[list[str]], **dialect: object) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, **dialect).writerows(rows)  # type: ignore[arg-type]
    return text.getvalue().encode()


@settings(deadline=None, max_examples=200)
@given(
    cells=st.lists(st.tuples(CELLS, CELLS), max_size=12),
    kind=st.sampled_from(["csv", "tsv"]),
    ending=st.sampled_from(["\n", "\r\n", "\r"]),
    all_quoted=st.booleans(),
    batch_bytes=st.integers(1, 40),
    cut=st.floats(0, 1),
)
def test_what_csv_wrote_is_read_back_and_a_cut_is_seen(
    tmp_path_factory: pytest.TempPathFactory,
    cells: list[tuple[str, str]],
    kind: str,
    ending: str,
    all_quoted: bool,
    batch_bytes: int,
    cut: float,
):
    path = tmp_path_factory.mktemp("table") / f"a.{kind}"
    rows = [["id", "text", "end"], *([str(i), *pair] for i, pair in enumerate(cells))]
    delimiter = "\t" if kind == "tsv" else ","
    # The writer of older Pythons quotes those line ends alone that end its rows.
    quoting = csv.QUOTE_ALL if all_quoted or ending != "\r\n" else csv.QUOTE_MINIMAL
    data = written(rows, delimiter=delimiter, lineterminator=ending, quoting=quoting)
    path.write_bytes(data)
    texts = [text for text, _ in cells]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source_file, "BATCH_BYTES", batch_bytes)
        assert read(path, "double")[0] == texts
        path.write_bytes(data[: int(cut * len(data))])
        try:
            found, _ = read(path, "double")
        except DataError as error:
            assert f"a.{kind} " in str(error) or "not UTF-8" in str(error)  # noqa: PT017
        except UnicodeDecodeError:
            pass
        else:
            # What stands behind the text may be cut; the text is whole.
            assert found == texts[: len(found)]


@settings(deadline=None, max_examples=100)
@given(cells=st.lists(st.text(st.sampled_from(["a", "é", '"', ",", " ", "漢"])), max_size=12))
def test_a_tsv_is_text_between_tabs(tmp_path_factory: pytest.TempPathFactory, cells: list[str]):
    path = tmp_path_factory.mktemp("table") / "a.tsv"
    path.write_text("id\ttext\n" + "".join(f"{i}\t{cell}\n" for i, cell in enumerate(cells)))
    found, counts = read(path)
    assert found == cells
    assert counts.quotes_kept == sum(len(c) > 1 and c[0] == c[-1] == '"' for c in cells)


ROWS = "id,text\n1,one\n"


@pytest.mark.parametrize(
    ("name", "content", "quoting", "message"),
    [
        (
            "a.csv",
            ROWS + '2,"two\n3,three\n4,four\n',
            "auto",
            "line 3: got an unclosed quote",
        ),
        (
            "a.csv",
            ROWS + '2,"two\n3,"three"\n',
            "auto",
            "line 3: got .* other text, on line 4",
        ),
        (
            "a.csv",
            'a,b,text\n1,"x\ny",z\n2,"x\ny","two\n3\n',
            "auto",
            "line 5: got an unclosed quote",
        ),
        (
            "a.csv",
            ROWS + '2,"two" more\n',
            "auto",
            "line 3: got .* other text, on line 3",
        ),
        (
            "a.csv",
            ROWS + '2,"a \\" b"\n',
            "auto",
            "line 3: .*quoting=none if quotes are text",
        ),
        ("a.tsv", 'id\ttext\n1\t"x\n', "double", r"a\.tsv line 2: got an unclosed quote"),
        ("a.tsv", 'id\ttext\n1\t"x\ny"\n', "auto", "line 3: got 1 values; allowed: 2"),
        ("a.tsv", 'id\ttext\n1\t"x\ty"\n', "auto", "line 2: got 3 values; .*; give quoting=double if"),
        (
            "a.tsv",
            '"id"\t"text"\n1\tx\n',
            "auto",
            'header: .*"id", "text"; give quoting=double',
        ),
        ("a.csv", ROWS + "2\n", "auto", "line 3: got 1 values; allowed: 2, as many as the header has"),
        ("a.csv", ROWS + "\n\n2,two,more\n", "auto", "line 5: got 3 values"),
        ("a.csv", "text,id,text\na,1,b\n", "auto", "header: got field text 2 times; allowed: one column"),
        ("a.csv", "text ,\ttext\na,b\n", "auto", "header: got field text 2 times"),
        ("a.csv", ",id\na,1\n", "auto", "header: got no field text; allowed: , id"),
        ("a.csv", ROWS + "2," + "x" * 4000 + "\n", "auto", "line 3: got a line of more than 0 MiB"),
        (
            "a.csv",
            ROWS + '2,"' + "x\n" * 1500 + '"\n',
            "auto",
            "line 3: .* extends to line",
        ),
    ],
)
def test_rows_that_are_refused_by_their_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str, quoting: str, message: str
):
    monkeypatch.setattr(source_file, "LONGEST_LINE", 8000)
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name, quoting)


def test_quotes_that_close_each_other_over_rows_are_counted(tmp_path: Path):
    path = tmp_path / "a.csv"
    rows = "".join(f"{i},plain,x\n" for i in range(2, 6))
    path.write_text('id,text,more\n1,"open,x\n' + rows + '6,closed",x\n')
    found, counts = read(path)
    assert len(found) == 1
    assert counts.like_rows == {f"{path} line 2": 1}
    assert read(path, "none")[0][0] == '"open'


def test_quotes_that_are_text(tmp_path: Path):
    (tmp_path / "a.csv").write_text('id,text\n1,5" pipe\n2,"quoted"\n3,"\n')
    assert read(tmp_path / "a.csv", "none")[0] == ['5" pipe', '"quoted"', '"']
    assert read(tmp_path / "a.csv", "none")[1].quotes_kept == 1


def test_spaces_behind_delimiters_and_around_names(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_text('id, text, more\n1, "one, two",x\n2,  plain "text" , y\n')
    assert read(path)[0] == ["one, two", 'plain "text" ']
    path.write_text(" text,id\n as it is,1\n")
    assert read(path)[0] == [" as it is"]


def test_zero_bytes_are_control_characters(tmp_path: Path):
    (tmp_path / "a.csv").write_bytes(b"id,text\n1,a\0b\n")
    found, counts = read(tmp_path / "a.csv")
    assert (found, counts.controls_removed) == (["ab"], 1)


def test_a_table_without_rows_has_none(tmp_path: Path):
    for content in ("", "\n\n", "id,text", "id,text\n"):
        (tmp_path / "a.csv").write_text(content)
        assert read(tmp_path / "a.csv")[0] == []


def test_lines_of_a_value_are_rows_only_where_they_have_the_delimiters(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_text('id,text\n1,"Dear Sir,\n\nthank you, and bye,\nA."\n2,"two\nlines"\n')
    assert read(path)[1].like_rows == {}
