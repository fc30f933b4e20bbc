"""Changes of binary files that leave their framing whole, so that what lies behind it is read."""

from __future__ import annotations

import ast
import gzip
import io
import struct
import tarfile
import zlib
from collections.abc import Callable
from importlib import import_module
from typing import Any

import zstandard

from tests.support.mutations import NAUGHTY_TEXTS, Random, dump, of_bytes, of_json, parse

_DESCRIPTIONS = (
    "|O",
    "<f8",
    "<u2",
    "<i8",
    ">u4",
    "|V8",
    "<U99",
    "|S0",
    "<M8[s]",
    "x",
    [("a", "<u4")],
    [],
    7,
    "",
)
_SHAPES: tuple[Any, ...] = (
    *((), (0,), (1,), (-1,), (2**31,), (2**60,), (2**63,), (2**32, 2**32), (3, 4), (0, 2**62)),
    *([5], 7, None, (1.5,), (1,) * 64, "(1,)"),
)
_NPY_MAGIC = b"\x93NUMPY"


def of_npy(content: bytes, source: Random) -> bytes:
    """Another header, or other numbers behind it."""
    length = int.from_bytes(content[8:10], "little")
    body = content[10 + length :]
    if not content.startswith(_NPY_MAGIC) or source.random() < 0.4:
        return content[: 10 + length] + of_bytes(body, source)
    header = ast.literal_eval(content[10 : 10 + length].decode("latin-1"))
    key = source.choice(("descr", "fortran_order", "shape", "shape", "none"))
    if key == "none":
        del header[source.choice(list(header))]
    else:
        values = {"descr": _DESCRIPTIONS, "fortran_order": (True, None, "no", 1), "shape": _SHAPES}
        header[key] = source.choice(values[key])
    text = repr(header).encode("latin-1") + b"\n"
    if source.random() < 0.1:
        text = of_bytes(text, source)
    return _NPY_MAGIC + b"\x01\x00" + struct.pack("<H", len(text)) + text + body


def of_safetensors(content: bytes, source: Random) -> bytes:
    """Another header, whose length fits."""
    length = int.from_bytes(content[:8], "little")
    header, body = content[8 : 8 + length], content[8 + length :]
    if source.random() < 0.3:
        return content[: 8 + length] + of_bytes(body, source)
    if source.random() < 0.5:
        entries = parse(header)
        fields = dict(entries[source.randrange(len(entries))][1])
        place = source.choice(("dtype", "shape", "data_offsets"))
        fields[place] = _other_field(place, fields[place], source)
        entries[source.randrange(len(entries))] = (entries[0][0], type(entries)(fields.items()))
        header = dump(entries).encode()
    else:
        header = of_json(header, source)
    return struct.pack("<Q", len(header)) + header + body


def _other_field(place: str, old: Any, source: Random) -> Any:
    if place == "dtype":
        return source.choice(("F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "C64", "F4", ""))
    numbers = [*old]
    if not numbers:
        return [2**60]
    at = source.randrange(len(numbers))
    numbers[at] = source.choice((0, 1, numbers[at] + 1, numbers[at] * 2, 2**31, 2**60, 2**63))
    return source.choice((numbers, numbers[::-1], numbers * 2))


def of_png(content: bytes, source: Random) -> bytes:
    """Another chunk, whose checksum fits."""
    chunks, place = [], 8
    while place < len(content):
        size = int.from_bytes(content[place : place + 4], "big")
        chunks.append([content[place + 4 : place + 8], content[place + 8 : place + 8 + size]])
        place += 12 + size
    at = source.choice((0, source.randrange(len(chunks))))
    name, data = chunks[at]
    if name == b"IHDR" and source.random() < 0.5:
        sizes = [source.choice((0, 1, 28, 10_000, 2**16, 2**31 - 1, 2**32 - 1)) for _ in range(2)]
        data = struct.pack(">II", *sizes) + data[8:]
    elif source.random() < 0.2:
        chunks.insert(at, [b"tEXt", b"Comment\0" + b"\x1b" * source.choice((1, 1 << 20))])
    else:
        data = of_bytes(data, source)
    chunks[at] = [name, data]
    return content[:8] + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def of_sentencepiece(content: bytes, source: Random) -> bytes:
    """Another piece or setting."""
    proto: Any = import_module("sentencepiece.sentencepiece_model_pb2")
    spec = proto.ModelProto.FromString(content)
    at = source.randrange(len(spec.pieces))
    piece = spec.pieces[at]
    what = source.choice(("text", "text", "score", "type", "drop", "again", "setting", "setting", "charsmap"))
    if what == "text":
        piece.piece = source.choice(
            (*filter(_is_utf8, NAUGHTY_TEXTS), spec.pieces[-1].piece, "▁", "<0x00>", "<extra_id_0>")
        )
    elif what == "score":
        piece.score = source.choice((0.0, -1e38, 1e38, float("nan"), float("inf"), -float("inf")))
    elif what == "type":
        piece.type = source.randint(1, 6)
    elif what == "drop":
        del spec.pieces[at : at + source.choice((1, 1, 8, 512))]
    elif what == "again":
        spec.pieces.append(piece)
    elif what == "charsmap":
        spec.normalizer_spec.precompiled_charsmap = source.randbytes(source.choice((0, 1, 4, 64, 4096)))
    else:
        settings = source.choice((spec.trainer_spec, spec.normalizer_spec, spec.denormalizer_spec))
        _change_setting(settings, source)
    return spec.SerializeToString(deterministic=True)


def _change_setting(settings: Any, source: Random) -> None:
    field = source.choice(settings.DESCRIPTOR.fields)
    kinds: dict[Any, tuple[Any, ...]] = {
        "STRING": NAUGHTY_TEXTS,
        "BYTES": (b"", b"\xff" * 100, bytes(8)),
        "BOOL": (True, False),
        "FLOAT": (0.0, -1.0, 1e38, float("nan")),
        "INT32": (-(2**31), -1, 0, 1, 2, 10_000, 2**31 - 1),
        "UINT64": (0, 1, 2**64 - 1),
        "ENUM": (1, 2, 3, 4),
    }
    kind = next(name for name in kinds if getattr(field, f"TYPE_{name}") == field.type)
    value = source.choice([each for each in kinds[kind] if not isinstance(each, str) or _is_utf8(each)])
    holder = getattr(settings, field.name)
    if isinstance(holder, str | bytes | bool | int | float):
        setattr(settings, field.name, value)
    else:
        holder.append(value)


def _is_utf8(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


_INSIDE: dict[str, Callable[[bytes, Random], bytes]] = {
    ".npy": of_npy,
    ".json": of_json,
    ".png": of_png,
}


def of_tar(content: bytes, source: Random) -> bytes:
    """One member of another name, kind, size or content, the headers' checksums being right."""
    members = []
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for member in tar:
            file = tar.extractfile(member)
            members.append((member, file.read() if file else b""))
    at = source.randrange(len(members))
    member, data = members[at]
    what = source.choice(("content", "content", "content", "name", "kind", "size", "drop", "again", "swap"))
    if what == "content":
        ending = next((e for e in _INSIDE if member.name.endswith(e)), None)
        data = _INSIDE[ending](data, source) if ending and source.random() < 0.8 else of_bytes(data, source)
        members[at] = member, data
    elif what == "drop":
        del members[at]
    elif what == "again":
        members.insert(source.randrange(len(members)), members[at])
    elif what == "swap":
        other = source.randrange(len(members))
        members[at], members[other] = members[other], members[at]
    elif what == "name":
        names = (
            "/etc/passwd",
            "../../up",
            "a\x1b[2Jb.txt",
            "",
            "x" * 300 + ".txt",
            "\ud8ff",
            member.name + "x",
        )
        member.name = source.choice((*names, "a\nb.json", members[0][0].name))
    elif what == "kind":
        member.type = source.choice(b"1234567xgLKSVZ").to_bytes(1, "big")
        member.linkname = source.choice(("/etc/passwd", "..", ""))
    out = bytearray()
    for number, (info, held) in enumerate(members):
        info.size = len(held)
        if what == "size" and number == at:
            info.size = source.choice((0, 1, len(held) + 1, len(held) + 512, 2**31, 2**33 - 1, 2**60, 2**63))
        header = info.tobuf(tarfile.GNU_FORMAT, errors="surrogateescape" if what != "name" else "replace")
        out += header + held + bytes(-len(held) % tarfile.BLOCKSIZE)
    return bytes(out) + bytes(source.choice((0, 512, 1024, 10240)))


def _within(
    unpack: Callable[[bytes], bytes], pack: Callable[[bytes], bytes]
) -> Callable[[bytes, Random], bytes]:
    """Changes of what is compressed, and now and then a great deal of nothing."""

    def change(content: bytes, source: Random) -> bytes:
        inside = unpack(content)
        if len(inside) >= _MUCH:
            raise ValueError("a change too many")
        if source.random() < 0.03:
            # Both formats allow for several, one behind the other.
            return pack(source.choice((b"\0", b"a")) * _MUCH) * 10
        return pack(of_bytes(inside, source))

    return change


_MUCH = 64 << 20


def _gzip(content: bytes) -> bytes:
    return gzip.compress(content, 1, mtime=0)


FORMATS: dict[str, Callable[[bytes, Random], bytes]] = {
    "npy": of_npy,
    "safetensors": of_safetensors,
    "png": of_png,
    "sentencepiece": of_sentencepiece,
    "tar": of_tar,
    "gz": _within(gzip.decompress, _gzip),
    "zst": _within(lambda c: zstandard.decompress(c), lambda c: zstandard.compress(c, 1)),
}
