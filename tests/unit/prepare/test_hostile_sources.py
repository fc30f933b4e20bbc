"""Sources made to harm: each ends in one line that names it, in bounded memory and time, before it takes what
it claims."""

import gzip
import io
import json
import os
import shutil
import tarfile
import time
import tracemalloc
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from llmtrain.errors import DataError
from llmtrain.prepare import decompress, parquet_pages, source_file, tars
from llmtrain.prepare.clean import LONGEST_MARKS, CleanCounts, clean
from llmtrain.prepare.folder_scan import SkippedFiles, printable_path, short_name
from llmtrain.prepare.parquet_pages import Page, rows_at_a_time
from llmtrain.prepare.read import read_part
from llmtrain.prepare.source_file import Batch, SourceFile, refuse_utf16
from llmtrain.prepare.sources import (
    contents_fingerprint,
    find_files,
    find_line_pairs,
    plan_units,
)


def batches(path: Path, files: list[SourceFile] | None = None) -> Iterator[Batch]:
    files = files or find_files([str(path)])[0]
    for unit in plan_units(files, "auto"):
        for part in unit:
            yield from read_part(
                part, ["text"], "auto", path.parent, tars.Vocabulary(50, eos_id=2), CleanCounts()
            )


def refusal(path: Path, files: list[SourceFile] | None = None) -> str:
    """The one line with which the source is refused, less its folder."""
    with pytest.raises(DataError) as caught:
        for _ in batches(path, files):
            pass
    (line,) = str(caught.value).splitlines()
    assert line.isprintable()
    assert line.startswith(str(path))
    return line.removeprefix(f"{path.parent}/")


@contextmanager
def python_memory_below(most: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


# --------------------------------------------------------------------------------------- what is packed


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet"])
@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_what_is_packed_gives_no_more_than_a_multiple_of_itself(
    tmp_path: Path, kind: str, compression: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(decompress, "UNPACKED_BYTES", 20_000)
    content = {"jsonl": b'{"text": "x"}\n', "csv": b"text\n"}
    data = content.get(kind, b"some text\n") * 400_000
    path = tmp_path / f"a.{kind}.{compression}"
    path.write_bytes(gzip.compress(data) if compression == "gz" else zstandard.compress(data))
    line = refusal(path)
    assert f"a.{kind}.{compression}: got more than " in line
    assert f"bytes of unpacked data from a file of {path.stat().st_size:,} bytes; allowed: 256 for" in line
    assert line.endswith("if the contents are intended, decompress the file and give the result as source")
    assert [*tmp_path.iterdir()] == [path]


def test_a_parquet_is_unpacked_only_where_the_disk_has_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.parquet.gz"
    path.write_bytes(gzip.compress(os.urandom(100_000)))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=50_000))
    assert "90% of the free space on the disk of output; free disk space" in refusal(path)
    assert [*tmp_path.iterdir()] == [path]


def test_a_few_bytes_of_zstd_are_unpacked_a_little_at_a_time(tmp_path: Path):
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress(bytes(400 << 20)))
    assert path.stat().st_size < 15_000  # less than was unpacked at once
    (file,), _ = find_files([str(path)])
    with python_memory_below(200 << 20), decompress.open_source(file) as stream:
        assert len(stream.read(100)) == 100


def test_no_later_frame_of_zstd_has_a_longer_window(tmp_path: Path):
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    long = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress(b"one ") + long.compress(b"two") + long.flush())
    assert "got damaged .zst data" in refusal(path)


# ---------------------------------------------------------------------------------------------- parquet


def write_repeated(path: Path, value: str, count: int, **options: object) -> None:
    """`value` so many times, by a dictionary of one."""
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(count, np.int32)), [value])
    table = pyarrow.table({"text": column})
    pyarrow.parquet.write_table(table, path, compression="zstd", **options)


@pytest.mark.parametrize("store_schema", [True, False])
def test_a_value_that_millions_of_rows_repeat(
    tmp_path: Path, store_schema: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(decompress, "UNPACKED_BYTES", 20 << 20)
    monkeypatch.setattr(parquet_pages, "BATCH_BYTES", 16 << 20)
    path = tmp_path / "a.parquet"
    write_repeated(path, "x" * 1_000_000, 6000, store_schema=store_schema)
    assert path.stat().st_size < 1000
    before = pyarrow.default_memory_pool().max_memory()
    assert "a.parquet: got more than 20,971,520 bytes of rows from a file of" in refusal(path)
    assert pyarrow.default_memory_pool().max_memory() - before < 100 << 20


def test_rows_without_text_count_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decompress, "UNPACKED_BYTES", 1 << 20)
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.nulls(1_000_000, pyarrow.string())}), path)
    assert "bytes of rows from a file of" in refusal(path)


def test_a_page_too_large_is_told_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parquet_pages, "PAGE_BYTES", 1 << 20)
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["fine", "y" * (2 << 20)]})
    pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=False, row_group_size=1)
    line = refusal(path)
    assert "a.parquet row 2 or later: got damaged parquet data (a page of 2,097,162 bytes, more than" in line


@pytest.mark.parametrize(
    ("pages", "rows"),
    [
        ([Page(500, 1 << 20, 0)] * 50, 512),
        ([Page(500, 1 << 20, 0), Page(1, 1 << 20, 0)] * 50, 512),
        ([Page(1, 4 << 20, 0)] * 600, 32),
        ([Page(1 << 20, 10_000, 1 << 20)], 128),
        ([Page(100, 1 << 20, 0), Page(100_000, 9, 100 << 20)], 1),
        ([Page(1, 128 << 20, 0)] * 9, 1),
        ([Page(0, 0, 0)], 512),
        ([], 512),
    ],
)
def test_rows_that_memory_holds_together(pages: list[Page], rows: int):
    assert rows_at_a_time(pages) == rows


def test_any_byte_of_a_footer_may_be_wrong(tmp_path: Path):
    """Of some, Arrow's functions for Python ended the process."""
    path = tmp_path / "a.parquet"
    write_repeated(path, "text", 9, row_group_size=4)
    content = path.read_bytes()
    footer = int.from_bytes(content[-8:-4], "little")
    for place in range(len(content) - footer - 8, len(content)):
        for bit in (1, 128):
            changed = bytearray(content)
            changed[place] ^= bit
            path.write_bytes(changed)
            try:
                assert sum(map(len, batches(path))) <= 1 << 20
            except DataError as error:
                assert str(error).startswith(str(path))  # noqa: PT017


def test_a_footer_too_long_is_refused(tmp_path: Path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1" + bytes(9) + (17 << 20).to_bytes(4, "little") + b"PAR1")
    assert refusal(path).startswith(
        "a.parquet: got a list of row groups of 17,825,792 bytes; allowed: 16,777,"
    )


# -------------------------------------------------------------------------------------------- text, tables


@pytest.mark.parametrize(
    ("line", "got"),
    [
        (b'{"text": "x", "n": [' + b"{}," * 200 + b"{}]}", "more than 100 commas and brackets in"),
        (b'{"text": "x", "n": ' + b"7" * 5000 + b"}", "invalid JSON (a number of more than 4,300 digits)"),
        (b"[" * 90, "invalid JSON"),
        (b'{"\\u001b[31m\\ud800' + b"k" * 5000 + b'": 1}', "no field text; allowed: \\x1b[31m\\ud800kkk"),
    ],
)
def test_objects_that_are_refused(tmp_path: Path, line: bytes, got: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(source_file, "MOST_VALUES", 100)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    assert f"a.jsonl line 2: got {got}" in (refused := refusal(path)) or got in refused
    assert len(refused) < 500


def test_a_row_is_as_long_as_its_lines_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(source_file, "LONGEST_LINE", 1000)
    path = tmp_path / "a.csv"
    path.write_text("id,text\n" + ('"' + "some\n" * 100 + '",') * 9)
    assert "a row of more than 0 MiB" in refusal(path)


def test_a_line_of_json_beyond_what_parsing_may_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(source_file, "LONGEST_LINE", 16_000)
    monkeypatch.setattr(source_file, "BATCH_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x" * 4000}) + "\n")
    assert list(batches(path))
    path.write_text(json.dumps({"text": "x" * 6000}) + "\n")
    assert refusal(path) == (
        "a.jsonl: got a line of more than 0 MiB; allowed: shorter lines; split it into smaller documents"
    )


def test_a_row_of_many_values_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(source_file, "MOST_VALUES", 100)
    path = tmp_path / "a.csv"
    path.write_text("id,text\n" + "1," * 200)
    assert refusal(path) == "a.csv line 2: got a row of more than 100 values; allowed: fewer"


def test_batches_of_texts_without_a_byte_end_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(source_file, "BATCH_DOCUMENTS", 5)
    (tmp_path / "a.csv").write_text("id,text\n" + "1,\n" * 23)
    array = io.BytesIO()
    np.save(array, np.full(23, 2, np.uint8))
    member = tarfile.TarInfo("a.npy")
    member.size = len(array.getvalue())
    (tmp_path / "a.tar").write_bytes(member.tobuf() + array.getvalue().ljust(512, b"\0") + bytes(1024))
    for name in ("a.csv", "a.tar"):
        assert [len(batch) for batch in batches(tmp_path / name)] == [5, 5, 5, 5, 3]


def test_pairs_are_read_by_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(source_file, "BATCH_BYTES", 1000)
    for name in ("a", "b"):
        (tmp_path / name).write_text(("x" * 600 + "\n") * 9)
    files = find_line_pairs([str(tmp_path / "a")], [str(tmp_path / "b")])
    assert [len(batch.sources) for batch in batches(tmp_path, files)] == [1] * 9  # type: ignore[union-attr]


def test_zero_bytes_are_looked_at_in_the_memory_that_they_take():
    data = bytes(8 << 20)
    with python_memory_below(20 << 20):
        refuse_utf16(data, "a.txt")


def test_marks_without_end_are_put_in_order_in_linear_time():
    few = "e" + "\u0301\u0323" * (LONGEST_MARKS // 4) + "x"
    many = "a" + "\u0301" * 100_000 + "\u0323" * 100_000 + "b"
    started = time.process_time()
    (cleaned,) = clean([many.encode()], "nfc", CleanCounts())
    assert time.process_time() - started < 10
    assert sorted(unicodedata.normalize("NFD", cleaned.decode()[:500]))[-1] == "\u0301"
    assert len(cleaned.decode()) in range(len(many) - 2, len(many) + 1)
    assert clean([few.encode()], "nfc", CleanCounts()) == [unicodedata.normalize("NFC", few).encode()]


# ------------------------------------------------------------------------------------------------- tars


def extended(record: bytes, count: int = 1, kind: bytes = tarfile.XHDTYPE) -> bytes:
    header = tarfile.TarInfo("pax")
    header.type, header.size = kind, len(record) * count
    return header.tobuf() + (record * count).ljust(-(-header.size // 512) * 512, b"\0")


def plain(name: str, data: bytes) -> bytes:
    header = tarfile.TarInfo(name)
    header.size = len(data)
    return header.tobuf() + data.ljust(-(-len(data) // 512) * 512, b"\0")


def test_records_of_extended_headers_take_linear_time(tmp_path: Path):
    path = tmp_path / "a.tar"
    path.write_bytes(extended(b"6 a=b\n", 170_000) + plain("a.txt", b"text") + bytes(1024))
    started = time.process_time()
    assert list(batches(path)) == [["text"]]
    assert time.process_time() - started < 5


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_an_extended_header_too_long_is_refused(tmp_path: Path, kind: bytes):
    path = tmp_path / "a.tar"
    path.write_bytes(extended(b"6 a=b\n", 200_000, kind) + plain("a.txt", b"text") + bytes(1024))
    assert "an extended header of 1,200,000 bytes; allowed: 1,048,576" in refusal(path)


def test_a_chain_of_extended_headers_takes_no_memory(tmp_path: Path):
    path = tmp_path / "a.tar"
    chain = b"".join(extended(b"22 k%09d=0123456\n" % number) for number in range(3000))
    path.write_bytes(chain + plain("a.txt", b"text") + bytes(1024))
    with python_memory_below(3 << 20):
        assert list(batches(path)) == [["text"]]


@pytest.mark.parametrize(("name", "got"), [("a.txt", "of more than 128 MiB"), ("a.bin", "a truncated tar")])
def test_a_member_that_claims_more_than_there_is(tmp_path: Path, name: str, got: str):
    header = tarfile.TarInfo(name)
    header.size = 2**63
    path = tmp_path / "a.tar"
    path.write_bytes(header.tobuf(tarfile.GNU_FORMAT) + b"x" * 512)
    assert got in refusal(path)


def test_long_names_are_cut_in_messages(tmp_path: Path):
    path = tmp_path / "a.tar"
    long = extended(b"\x1b[31m" + b"n" * 900_000 + b".txt", 1, tarfile.GNUTYPE_LONGNAME)
    path.write_bytes(long + plain("a.txt", b"\xff") + bytes(1024))
    assert len(line := refusal(path)) < 500
    assert r"member \x1b[31mnnn" in line


# -------------------------------------------------------------------------------------- what is no file


def test_a_pipe_that_takes_a_source_s_place_is_refused(tmp_path: Path):
    path = tmp_path / "a.txt"
    for name in ("a.txt", "a.txt.gz", "a.txt.zst", "a.parquet"):
        path = tmp_path / name
        path.write_bytes(b"some text")
        files, _ = find_files([str(path)])
        path.unlink()
        os.mkfifo(path)
        assert "got a pipe, not a file; allowed: a readable file" in refusal(path, files)
        with pytest.raises(DataError, match="a pipe, not a file"):
            contents_fingerprint(files)


def test_what_is_no_file_is_left_out_or_refused(tmp_path: Path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "again").symlink_to(tmp_path)
    (tmp_path / "\x1b[31mred.other").touch()
    files, skipped = find_files([str(tmp_path)])
    assert [file.path.name for file in files] == ["a.txt"]
    assert {Path(name).name for name in skipped.special} == {"zero.txt", "pipe.txt"}
    assert all(note.isprintable() for note in [*skipped.notes(), *skipped.other])
    for name in ("zero.txt", "pipe.txt"):
        with pytest.raises(DataError, match="got a FIFO, socket or device; allowed: a file"):
            find_files([str(tmp_path / name)])
    with pytest.raises(DataError, match="the extension"):
        find_files(["/dev/zero"])


def test_names_are_shown_without_what_steers_a_terminal():
    assert printable_path("a\x1b[2Jb\n\udcff") == r"a\x1b[2Jb\n\xff"
    assert short_name("a\x1b\udcff\ud800") == r"a\x1b\xff\ud800"
    assert len(short_name("n" * 9999)) == 201
    assert SkippedFiles(hidden=["a"]).notes() == ["1 hidden files and folders left out: a"]
