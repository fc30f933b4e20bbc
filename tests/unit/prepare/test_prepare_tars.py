"""Tars made by others as sources: what is a document, what is refused by name, that no cut goes unseen."""

import gzip
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.corpus.corpus import Corpus
from llmtrain.errors import DataError
from llmtrain.prepare import source_file
from llmtrain.prepare.clean import CleanCounts
from llmtrain.prepare.config import NearDuplicatesConfig, PrepareConfig, SplitConfig
from llmtrain.prepare.job import prepare
from llmtrain.prepare.read import read_part
from llmtrain.prepare.sources import find_files, plan_units
from llmtrain.prepare.tars import Vocabulary
from llmtrain.tokenizers.config import TokenizerConfig
from llmtrain.tokenizers.folder import load_tokenizer
from llmtrain.tokenizers.sentencepiece import train

EOS = 2
VOCABULARY = Vocabulary(size=50, eos_id=EOS)
Members = list[tuple[str, bytes]]


def write(path: Path, members: Members, format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w", format=format) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def npy(ids: object, dtype: str = "int64") -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(ids, dtype))
    return buffer.getvalue()


def npz(values: list[int]) -> bytes:
    file = io.BytesIO()
    np.savez(file, np.array(values))
    return file.getvalue()


def header(shape: str) -> bytes:
    """A .npy of no data whose header gives that shape."""
    text = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def read(path: Path, vocabulary: Vocabulary | None = None) -> tuple[list[object], CleanCounts]:
    files, _ = find_files([str(path)])
    counts = CleanCounts()
    found: list[object] = []
    for unit in plan_units(files, "auto"):
        for part in unit:
            for batch in read_part(part, ["text"], "auto", path.parent, vocabulary, counts):
                found += [d.tolist() if isinstance(d, np.ndarray) else d for d in batch]
    return found, counts


def test_members_are_grouped_by_key_and_others_counted(tmp_path: Path):
    members = [
        ("a/0.txt", b"first"),
        ("a/0.json", b'{"url": "no text here"}'),
        ("a/0.jpg", b"x" * 700),
        ("a/1.json", b'{"text": "second"}'),
        ("b/1.json", b'{"text": null}'),
        ("b/2.cls", b"1"),
        ("b/3.v2.txt", b"not a .txt: webdataset's key ends at the first dot"),
        ("b/4.npy", npy([1])),
        ("b/5.txt", "über".encode()),
    ]
    found, counts = read(write(tmp_path / "a.tar", members))
    assert found == ["first", "second", "", "über"]
    assert counts.members_ignored == 5


def test_a_shard_of_webdataset_itself(tmp_path: Path):
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i in range(5):
            writer.write({"__key__": f"{i:04d}", "txt": f"text {i}", "json": {"n": i}})
    assert read(tmp_path / "a.tar")[0] == [f"text {i}" for i in range(5)]


def test_arrays_are_documents_where_a_tokenizer_is_given(tmp_path: Path):
    members = [
        ("0.npy", npy([5, 6, 7], "uint16")),
        ("0.txt", b"the same as text"),
        ("1.txt", b"text"),
        ("2.npy", npy([8, EOS, 9, 10, EOS], "int32")),
        ("3.tokens.npy", npy([11])),
        ("3.ends.npy", npy([1])),
        ("4.npy", npy([])),
    ]
    path = write(tmp_path / "a.tar", members)
    found, counts = read(path, VOCABULARY)
    assert found == [[5, 6, 7], "text", [8], [9, 10], [11], []]
    assert counts.members_ignored == 2
    assert read(path)[0] == ["the same as text", "text"]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_of_tar_with_long_names_links_and_folders(tmp_path: Path, format: int):
    names = ["d" * 60 + "/" + "n" * 60 + f"{i}.txt" for i in range(3)]
    if format != tarfile.USTAR_FORMAT:
        names += ["ü" * 150 + ".txt", "x" * 300 + ".txt"]
    path = write(tmp_path / "a.tar", [(name, name.encode()) for name in names], format)
    with tarfile.open(path, "a", format=format) as tar:
        tar.add(tmp_path, "folder", recursive=False)
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "else.txt"
        tar.addfile(link)
    assert read(path)[0] == names


@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=2000), min_size=1, max_size=6),
    place=st.floats(0, 1, exclude_max=True),
    batch_bytes=st.sampled_from([1, 600, 1 << 20]),
)
def test_wherever_a_tar_is_cut_it_is_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], place: float, batch_bytes: int
):
    folder = tmp_path_factory.mktemp("tar")
    path = write(folder / "a.tar", [(f"{i}.txt", text.encode()) for i, text in enumerate(texts)])
    whole = path.read_bytes()
    end = whole.rstrip(b"\0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source_file, "BATCH_BYTES", batch_bytes)
        # tarfile ignores a byte order mark as little as it keeps one: the reader drops it.
        assert read(path)[0] == [text.removeprefix("\ufeff") for text in texts]
        for cut in (int(place * len(end)), len(end) // 512 * 512):
            path.write_bytes(whole[:cut])
            with pytest.raises(DataError, match=r"a\.tar: got a truncated tar file: it ends after"):
                read(path)
            (folder / "a.tar.gz").write_bytes(gzip.compress(whole[:cut]))
            with pytest.raises(DataError, match=r"a\.tar\.gz: got a truncated tar file: it ends after"):
                read(folder / "a.tar.gz")


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (("k.txt", b"good \xfc"), r"a\.tar member k\.txt: got bytes that are not UTF-8: 0xfc at byte 5"),
        (("k.json", b"{"), r"a\.tar member k\.json: got invalid JSON"),
        (("k.json", b"[1]"), r"member k\.json: got a JSON list; allowed: one JSON object"),
        (("k.json", b'{"body": ""}'), r"member k\.json: got no field text; allowed: body"),
        (("k.json", b'{"text": 1}'), r"member k\.json: got field text that is a int"),
        (("k.npy", npy([1, 50])), r"a\.tar member k\.npy: got the token id 50; allowed: 0 to 49"),
        (("k.npy", npy([-1, 3])), r"a\.tar member k\.npy: got the token id -1"),
        (("k.npy", npy([1.5], "float32")), r"member k\.npy: got an array of float32"),
        (("k.npy", npy([[1], [2]])), r"member k\.npy: got an array of int64 with 2 dimensions"),
        (("k.npy", b"no array"), r"member k\.npy: got no array"),
        (("k.npy", npz([1])), r"member k\.npy: got no array"),
        (("k.npy", npy([1, 2], "object")), r"member k\.npy: got an array of Python's objects"),
        (("k.npy", npy([1, 2])[:-1]), r"member k\.npy: got 15 bytes of an array of 2 int64"),
        (("k.npy", header("(10**15,)")), r"member k\.npy: got no array"),
        (("k.npy", header("(1000000000000000,)")), r"member k\.npy: got 0 bytes of an array of 1,000,000,"),
        (("k.npy", header("(-3,)")), r"member k\.npy: got 0 bytes of an array of -3"),
        (("k.npy", header("(" * 999)), r"member k\.npy: got no array"),
        (
            ("k.json", b'{"text": "a", "text": "b"}'),
            r"member k\.json: got invalid JSON \(field text 2 times\)",
        ),
        (("k.txt", "Привет, мир\n".encode("utf-16-le")), r"member k\.txt: got text that seems to be UTF-16"),
    ],
)
def test_what_is_refused_is_named(tmp_path: Path, member: tuple[str, bytes], message: str):
    path = write(tmp_path / "a.tar", [("0.txt", b"fine"), member])
    with pytest.raises(DataError, match=message):
        read(path, VOCABULARY)


def test_a_damaged_header_is_refused(tmp_path: Path):
    path = write(tmp_path / "a.tar", [("0.txt", b"fine"), ("1.txt", b"fine too")])
    data = bytearray(path.read_bytes())
    data[1024 + 10] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.tar: got a damaged tar file \(bad checksum at byte 1,024\)"):
        read(path)


def test_a_corpus_of_texts_and_of_their_ids_have_the_same_tokens(tmp_path: Path):
    texts = [f"document {i} says {i * i} and no more" for i in range(80)]
    model = tmp_path / "given.model"
    model.write_bytes(train(texts, TokenizerConfig(vocab_size=284)))
    tokenizer = load_tokenizer(model)
    ids = [tokenizer.encode(text) for text in texts]
    arrays = [(f"{i}.npy", npy(document)) for i, document in enumerate([*ids, ids[3]])]
    base = PrepareConfig(
        source=(str(write(tmp_path / "ids.tar", arrays)),),
        output=tmp_path / "ids",
        tokenizer=TokenizerConfig(model=model),
        split=SplitConfig(validation=0.0, test=0.0),
        sample_tokens=200,
        tar_bytes=3000,
        workers=1,
    )
    report = prepare(base)
    assert report is not None
    assert (report.duplicates_dropped, report.cleaning.tokenized) == (1, 81)
    assert "tokenized  81 documents were given as token ids" in report.lines()
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(replace(base, source=(str(tmp_path / "texts.jsonl"),), output=tmp_path / "texts"))
    again = replace(base, near_duplicates=NearDuplicatesConfig(threshold=0.6), output=tmp_path / "near")
    changed = [[*document[:-1], 5] for document in ids[::4]]
    arrays = [(f"{i}.npy", npy(document)) for i, document in enumerate([*ids, *changed])]
    report = prepare(replace(again, source=(str(write(tmp_path / "near.tar", arrays)),)))
    assert report is not None
    assert report.near_duplicates_dropped >= len(changed)
    # A corpus' own shards are a source too.
    prepare(replace(base, source=(str(tmp_path / "ids" / "train"),), output=tmp_path / "again"))
    for name in ("ids", "texts", "again"):
        split = Corpus.open(tmp_path / name, verify="checksum").split("train")
        tokens, _ = split.read(0, split.num_tokens)
        assert tokens.tolist() == [i for document in ids for i in [*document, tokenizer.eos_id]]
        assert split.num_bytes == sum(map(len, texts))


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_every_tar_of_several_put_together_is_read(tmp_path: Path, ending: str):
    parts = [write(tmp_path / f"{name}.tar", [(f"{name}.txt", name.encode())]).read_bytes() for name in "abc"]
    # The end mark of tar is two blocks of zeros; tarfile fills a record of 20.
    parts[1] = parts[1][: 2 * 512] + bytes(1024)
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[ending]
    path = tmp_path / f"all.tar{ending}"
    path.write_bytes(pack(b"".join(parts)))
    assert read(path)[0] == ["a", "b", "c"]
    path.write_bytes(b"".join(map(pack, parts)))
    assert read(path)[0] == ["a", "b", "c"]
    for garbage in (b"x", b"x" * 600, b"x" * 512 * 3):
        path.write_bytes(pack(parts[0] + garbage))
        with pytest.raises(DataError, match=r"all\.tar.*: got .* after its end"):
            read(path)


def test_members_of_one_name_are_documents_of_their_own(tmp_path: Path):
    names = ("a.txt", "a.txt", "b.txt", "a.TXT", "a.txt")
    members = [(name, text.encode()) for name, text in zip(names, "12345", strict=True)]
    found, counts = read(write(tmp_path / "a.tar", members))
    assert found == [*"12345"]
    assert counts.members_repeated == 2


def test_every_member_without_a_document_is_counted(tmp_path: Path):
    members = [("__meta__.json", b"[]"), ("a/__meta__.json", b"{}"), ("0.txt", b"text"), ("0.jpg", b"")]
    path = write(tmp_path / "a.tar", members)
    with tarfile.open(path, "a") as tar:
        for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)):
            member = tarfile.TarInfo(f"{number}.txt")
            member.type, member.linkname = kind, "0.txt"
            tar.addfile(member)
    found, counts = read(path)
    assert (found, counts.members_ignored) == (["text"], 6)


def test_sparse_members_are_refused(tmp_path: Path):
    member = tarfile.TarInfo("holes.txt")
    member.type = tarfile.GNUTYPE_SPARSE
    path = tmp_path / "a.tar"
    path.write_bytes(member.tobuf() + bytes(1024))
    with pytest.raises(DataError, match=r"a\.tar: got member holes\.txt that is sparse; .*without --sparse"):
        read(path)
    pax = tarfile.TarInfo("holes.txt")
    pax.pax_headers = {"GNU.sparse.major": "1"}
    path.write_bytes(pax.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    with pytest.raises(DataError, match="that is sparse"):
        read(path)


def test_a_size_in_an_extended_header_is_the_member_s(tmp_path: Path):
    member = tarfile.TarInfo("a.txt")
    member.pax_headers = {"size": "4"}
    path = tmp_path / "a.tar"
    path.write_bytes(member.tobuf(tarfile.PAX_FORMAT) + b"text".ljust(512, b"\0") + bytes(1024))
    assert read(path)[0] == ["text"]
    member.pax_headers = {"size": "-4"}
    path.write_bytes(member.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    with pytest.raises(DataError, match=r"a\.tar: got a damaged tar file \(an extended header\)"):
        read(path)


@settings(deadline=None, max_examples=100)
@given(data=st.binary(max_size=100), place=st.integers(0, 200), cut=st.integers(0, 2))
def test_whatever_stands_in_an_array_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, place: int, cut: int
):
    array = bytearray(npy([1, 2, 3]))
    array[place : place + len(data) * cut] = data
    path = write(tmp_path_factory.mktemp("tar") / "a.tar", [("a.npy", bytes(array))])
    try:
        found, _ = read(path, VOCABULARY)
        assert all(0 <= token < VOCABULARY.size for tokens in found for token in tokens)
    except DataError as error:
        assert "a.tar member a.npy: got" in str(error)  # noqa: PT017


def test_members_too_large_and_damaged_extensions_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / "a.tar", [("0.jpg", b"x" * 3000), ("1.txt", b"y" * 3000)])
    monkeypatch.setattr(source_file, "LONGEST_LINE", 2000)
    with pytest.raises(
        DataError, match=r"a\.tar: got member 1\.txt of more than 0 MiB; split it into smaller"
    ):
        read(path)
    monkeypatch.setattr(source_file, "LONGEST_LINE", 1 << 20)
    pax = tarfile.TarInfo("pax")
    pax.type = tarfile.XHDTYPE
    for record, message in (
        (b"99 path=x\n", "an extended header"),
        (b"9 path=x\n", "header without its member"),
    ):
        pax.size = len(record)
        path.write_bytes(pax.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0") + bytes(1024))
        with pytest.raises(DataError, match=rf"a\.tar: got an? .*{message}"):
            read(path)
