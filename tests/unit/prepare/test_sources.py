"""Sources: every format gives the same documents, cut in parts or not; what is wrong is named."""

import csv
import gzip
import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import psutil
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.errors import DataError
from llmtrain.prepare import source_file, texts
from llmtrain.prepare.clean import CleanCounts, clean
from llmtrain.prepare.decompress import refuse_long_windows
from llmtrain.prepare.read import read_part, undecodable
from llmtrain.prepare.sources import find_files, plan_units

TEXTS = [
    "plain",
    'quoted "words", commas',
    "two\nlines\n\nand a blank one",
    "über 🎬 漢字",
    "",
    "x" * 3000,
    "last",
]


def read(path: Path | str, text_field: str = "text", txt_document: str = "auto") -> list[str]:
    """All documents of a source, cleaned, in order."""
    files, _ = find_files([str(path)])
    found: list[str] = []
    for unit in plan_units(files, txt_document):
        for part in unit:
            try:
                for batch in read_part(
                    part, [text_field], txt_document, files[0].path.parent, None, CleanCounts()
                ):
                    found += [text.decode() for text in clean(batch, "none", CleanCounts())]
            except UnicodeDecodeError as error:
                raise undecodable(part) from error
    return found


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))


def write_csv(path: Path, texts: list[str]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["label", "text", "source"])
        rows.writerows([i, text, "s"] for i, text in enumerate(texts))


def write_parquet(path: Path, texts: list[str]) -> None:
    table = pyarrow.table({"id": range(len(texts)), "text": texts})
    pyarrow.parquet.write_table(table, path, row_group_size=2)


WRITERS: dict[str, Callable[[Path, list[str]], None]] = {
    "jsonl": write_jsonl,
    "csv": write_csv,
    "parquet": write_parquet,
    "txt": lambda path, texts: path.write_text("\n\n".join(texts)),
}


def gzipped(data: bytes) -> bytes:
    """The same at any time: the contents below name tests."""
    return gzip.compress(data, mtime=0)


COMPRESS = {"gz": gzipped, "zst": zstandard.compress}


def compressed(path: Path, compression: str) -> Path:
    packed = path.with_name(f"{path.name}.{compression}")
    packed.write_bytes(COMPRESS[compression](path.read_bytes()))
    return packed


@pytest.fixture(params=sorted(WRITERS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("compression", ["", "gz", "zst"])
def test_rows_of_every_format(tmp_path: Path, kind: str, compression: str):
    path = tmp_path / f"texts.{kind}"
    WRITERS[kind](path, TEXTS)
    path = compressed(path, compression) if compression else path
    expected = ["\n\n".join(TEXTS)] if kind == "txt" else [text for text in TEXTS if text]
    assert read(path) == expected
    assert sorted(tmp_path.glob("*.parquet")) == sorted(tmp_path.glob("texts.parquet"))


@pytest.mark.parametrize("unit_bytes", [1, 7, 50, 3000])
def test_parts_neither_share_nor_miss_a_document(
    tmp_path: Path, kind: str, unit_bytes: int, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / f"texts.{kind}"
    # The longest is many parts long for each size, and not thousands: each is opened and read.
    WRITERS[kind](path, [text[: 60 * unit_bytes] for text in TEXTS] * 3)
    modes = ("line", "paragraph", "file") if kind == "txt" else ("auto",)
    whole = {mode: read(path, txt_document=mode) for mode in modes}
    monkeypatch.setattr(source_file, "UNIT_BYTES", unit_bytes)
    monkeypatch.setattr(source_file, "BATCH_BYTES", 16)
    for mode, documents in whole.items():
        assert read(path, txt_document=mode) == documents
    if kind in ("txt", "jsonl"):
        assert len(list(plan_units(find_files([str(path)])[0], "line"))) > 3


@settings(max_examples=200, deadline=None)
@given(
    lines=st.lists(st.sampled_from(["", " ", "a", "bc def", "x" * 40, "é" * 9]), max_size=40),
    unit_bytes=st.integers(1, 60),
    mode=st.sampled_from(["auto", "line", "paragraph"]),
    ending=st.sampled_from(["\n", "\r\n"]),
)
def test_a_compressed_text_has_the_documents_of_the_plain_one(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], unit_bytes: int, mode: str, ending: str
):
    folder = tmp_path_factory.mktemp("text")
    path = folder / "a.txt"
    path.write_bytes(ending.join(lines).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source_file, "UNIT_BYTES", unit_bytes)
        patch.setattr(source_file, "BATCH_BYTES", 16)
        patch.setattr(texts, "AUTO_DOCUMENT_BYTES", 20)
        plain = read(path, txt_document=mode)
        assert read(compressed(path, "zst"), txt_document=mode) == plain
    words = [word for line in lines for word in line.split()]
    assert [word for document in plain for word in document.split()] == words
    if mode == "paragraph":
        assert plain == read(path, txt_document="paragraph")


def test_auto_packs_paragraphs_to_about_4_kib(tmp_path: Path):
    paragraphs = [f"{i} " + "word " * 60 for i in range(100)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs))
    documents = read(tmp_path / "a.txt")
    assert all(4096 <= len(document) < 4096 + 400 for document in documents[:-1])
    assert "\n\n".join(documents) == "\n\n".join(paragraphs)
    (tmp_path / "lines.txt").write_text("\n".join(paragraphs))
    documents = read(tmp_path / "lines.txt")
    assert all(8192 <= len(document) < 8192 + 400 for document in documents[:-1])
    assert "\n".join(documents) == "\n".join(paragraphs)


@pytest.mark.parametrize("mode", ["auto", "paragraph"])
def test_blank_lines_are_no_documents(tmp_path: Path, mode: str):
    (tmp_path / "a.txt").write_text("\n \n\none\n\n\n\ntwo\n\n\n")
    (part,) = next(plan_units(find_files([str(tmp_path / "a.txt")])[0], mode))
    batches = read_part(part, ["text"], mode, tmp_path, None, CleanCounts())
    raw = [document for batch in batches for document in batch]
    assert [bytes(document).split() for document in raw] == (
        [[b"one", b"two"]] if mode == "auto" else [[b"one"], [b"two"]]
    )


def test_a_row_longer_than_the_csv_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(source_file, "BATCH_BYTES", 1000)
    texts = ["a", "b" * 800, "c\n" * 5000, "d", "e" * 20_000, "f"]
    write_csv(tmp_path / "long.csv", texts)
    assert read(tmp_path / "long.csv") == [text.strip("\n") for text in texts]


def test_byte_order_marks_are_no_text(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext")
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext,b\nx,1\n")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\n')
    assert read(tmp_path / "a.txt") == ["text"]
    assert read(tmp_path / "a.txt", txt_document="file") == ["text"]
    assert read(tmp_path / "a.csv") == ["x"]
    assert read(tmp_path / "a.jsonl") == ["x"]


def test_several_zstd_frames_and_gzip_members_are_one_file(tmp_path: Path):
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"one ") + zstandard.compress(b"two"))
    (tmp_path / "a.txt.gz").write_bytes(gzipped(b"one ") + gzipped(b"two"))
    assert read(tmp_path / "a.txt.zst") == read(tmp_path / "a.txt.gz") == ["one two"]


def test_a_zstd_of_any_window(tmp_path: Path):
    for name, window_log in (("a.txt.zst", 31), ("b.txt.zst", 28), ("c.txt.zst", 20)):
        parameters = zstandard.ZstdCompressionParameters(window_log=window_log, enable_ldm=True)
        compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        (tmp_path / name).write_bytes(compressor.compress(b"long window") + compressor.flush())
        assert read(tmp_path / name) == ["long window"]
    files, _ = find_files([str(tmp_path)])
    (note,) = refuse_long_windows(files, workers=1)
    assert note.startswith("2 .zst with long windows (")
    assert note.endswith("a.txt.zst: 2,048 MiB): a worker holds as much memory while it reads one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2200 << 20))
        assert refuse_long_windows(files, workers=1) == [note]
        with pytest.raises(
            DataError, match=r"workers: got 4, of which 2 hold 2,304 MiB .*lower workers to 1"
        ):
            refuse_long_windows(files, workers=4)


@pytest.mark.parametrize("mode", ["auto", "line", "paragraph"])
def test_old_line_ends_are_line_ends(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(source_file, "BATCH_BYTES", 16)
    lines = ["one", "", "two words", "x" * 30, "", "end"]
    (tmp_path / "new.txt").write_bytes("\n".join(lines).encode())
    (tmp_path / "old.txt").write_bytes("\r".join(lines).encode())
    whole = read(tmp_path / "new.txt", txt_document=mode)
    for unit_bytes in range(1, 40):
        monkeypatch.setattr(source_file, "UNIT_BYTES", unit_bytes)
        if mode == "auto":
            whole = read(tmp_path / "new.txt", txt_document=mode)
        assert read(tmp_path / "old.txt", txt_document=mode) == whole
    (tmp_path / "old.jsonl").write_bytes(b'{"text": "a"}\r{"text": "b"}\r')
    assert read(tmp_path / "old.jsonl") == ["a", "b"]


def test_null_is_an_empty_text(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n\n{"text": "x"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": [None, "x", None]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.jsonl") == read(tmp_path / "a.parquet") == ["x"]


# ------------------------------------------------------------------------------------------- refuse


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good\n" * 10 + b"bad \xe9t\xe9", "0xe9 at byte 54"),
        ("a.csv", b"text\ngood\nbad \xff\n", "0xff at byte 14"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "0xff at byte 24"),
        ("a.txt.gz", gzipped(b"ab\xff"), "0xff at byte 2 of the uncompressed text"),
        ("a.txt", "utf-16".encode("utf-16"), r"a\.txt: got text that seems to be UTF-16"),
        ("a.txt", "Привет, мир\n".encode("utf-16-le"), r"a\.txt: got text that seems to be UTF-16"),
        (
            "a.txt",
            b"some ASCII first\n" * 9 + "then more\n".encode("utf-16-be"),
            "got text that seems to be UTF-16",
        ),
        (
            "a.txt.gz",
            gzipped("wide\n".encode("utf-32-le") * 9),
            r"a\.txt\.gz: got text that seems to be UTF-32",
        ),
        ("a.csv", "id,text\n1,x\n".encode("utf-16-le"), r"a\.csv line 1: got text that seems to be UTF-16"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": "a", "text": "b"}\n',
            r"line 2: got invalid JSON \(field text 2 times\)",
        ),
        ("a.json", b'[\n{"text": "x"}\n]\n', r"a\.json line 1: got invalid JSON .*jq -c"),
        ("a.json", b'[{"text": "x"}]\n', r"a\.json line 1: got a JSON list; .*jq -c"),
        ("a.txt.zst", b"\x28\xb5\x2f\xfd\x00\xb0" + bytes(20), r"damaged \.zst data \(.*too much memory"),
        ("a.txt", b"cut" + "é".encode()[:1], "0xc3 at byte 3"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', r"a\.jsonl line 3: got invalid JSON"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', r"a\.jsonl line 2: got a JSON list"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"body": "y", "id": 3}\n',
            r"line 2: got no field text; allowed: body, id",
        ),
        ("a.jsonl", b'{"text": 3}\n', "line 1: got field text that is a int"),
        ("a.csv", b"body,label\nx,1\n", r"a\.csv header: got no field text; allowed: body, label"),
        (
            "a.csv",
            b"text,label\nx,1\ny,1,2\n",
            r"a\.csv line 3: got 3 values; allowed: 2, as many as the header",
        ),
        ("a.parquet", b"no parquet", "got an invalid parquet file"),
        ("a.txt.gz", gzipped(b"long text " * 1000)[:-20], r"a\.txt\.gz: got damaged \.gz data"),
        ("a.txt.gz", b"no gzip", r"damaged \.gz data"),
        ("a.jsonl.zst", zstandard.compress(b"long text " * 1000)[:-2], r"damaged \.zst data"),
        ("a.jsonl.zst", b"no zstd at all", r"damaged \.zst data"),
        ("a.parquet.gz", gzipped(b"x" * 1000)[:-9], r"damaged \.gz data"),
        ("a.csv.gz", gzipped(b"text\n" + b"some words\n" * 5000)[:-9], r"damaged \.gz data"),
    ],
)
def test_contents_that_are_refused(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_parquet_that_is_refused(tmp_path: Path):
    path = tmp_path / "a.parquet"
    write_parquet(path, TEXTS * 200)
    with pytest.raises(DataError, match=r"a\.parquet: got no field body; allowed: id, text"):
        read(path, "body")
    with pytest.raises(DataError, match="got field id of type int64; allowed: text"):
        read(path, "id")
    data = path.read_bytes()
    path.write_bytes(data[:-50])
    with pytest.raises(DataError, match="got an invalid parquet file"):
        read(path)
    path.write_bytes(data[:100] + b"\0" * 3000 + data[3100:])
    with pytest.raises(DataError, match=r"a\.parquet row 1 or later: got damaged parquet data"):
        read(path)


def test_a_row_of_parquet_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(source_file, "UNIT_BYTES", 1)
    values = [b"fine"] * 1500 + [b"ab\xff", None]
    for column in (pyarrow.array(values), pyarrow.array(values).view(pyarrow.string())):
        table = pyarrow.table({"text": column})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=700)
        with pytest.raises(DataError, match=r"a\.parquet row 1,501 field text: got .* 0xff at byte 2"):
            read(tmp_path / "a.parquet")


def test_columns_of_parquet(tmp_path: Path):
    path = tmp_path / "a.parquet"
    words = ["ä", None, "b"]
    for column in (
        pyarrow.array(words).dictionary_encode(),
        pyarrow.array(words, pyarrow.large_string()),
        pyarrow.array(words, pyarrow.string_view()),
        pyarrow.array([word and word.encode() for word in words], pyarrow.large_binary()),
    ):
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
        assert read(path) == ["ä", "b"]
    for column in ([["x"]], [{"a": "x"}], [Decimal("1.5")]):
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
        with pytest.raises(DataError, match=r"a\.parquet: got field text of type (list|struct|decimal)"):
            read(path)
    twice = pyarrow.table([["x"], ["y"], ["z"]], names=["text", "text", "id"])
    pyarrow.parquet.write_table(twice, path)
    with pytest.raises(DataError, match=r"a\.parquet: got 2 columns of the name text"):
        read(path)
    assert read(path, "id") == ["z"]
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.nulls(3)}), path)
    assert read(path) == []


def test_a_line_without_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(source_file, "LONGEST_LINE", 5000)
    monkeypatch.setattr(source_file, "BATCH_BYTES", 1000)
    (tmp_path / "a.txt").write_text("x" * 10_000)
    for mode in ("auto", "line", "paragraph", "file"):
        with pytest.raises(DataError, match=r"a\.txt: got a (line|file) of more than"):
            read(tmp_path / "a.txt", txt_document=mode)


def test_line_numbers_count_from_the_file_s_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(source_file, "UNIT_BYTES", 100)
    write_jsonl(tmp_path / "a.jsonl", ["some text"] * 50)
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write("{oops\n")
    with pytest.raises(DataError, match="line 51: got invalid JSON"):
        read(tmp_path / "a.jsonl")


@settings(deadline=None, max_examples=80)
@given(data=st.data(), kind=st.sampled_from(sorted(WRITERS)), compression=st.sampled_from(["", "gz", "zst"]))
def test_whatever_is_damaged_is_read_or_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str, compression: str
):
    path = tmp_path_factory.mktemp("damaged") / f"a.{kind}"
    WRITERS[kind](path, TEXTS)
    path = compressed(path, compression) if compression else path
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content)))
    content[place : place + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=20))
    path.write_bytes(content)
    try:
        read(path)
    except DataError as error:
        assert f"{path}" in str(error)  # noqa: PT017
        assert len(str(error).splitlines()) == 1  # noqa: PT017
