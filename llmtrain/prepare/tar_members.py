"""The members of a tar, each of them or an error.

Reads the stream once, and strictly: tarfile takes a shard that was cut between two members for whole, ends at
the first of tars that were put together, and passes over what follows a damaged header.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from typing import IO

from llmtrain.errors import DataError, Problem
from llmtrain.prepare import streams
from llmtrain.prepare.scan import brief

BLOCK = tarfile.BLOCKSIZE
LONGEST_HEADER = 1 << 20
"""Of an extended header: a name has 4,096 bytes at most, an attribute 64 KiB."""
_RECORDS = (b"path", b"size")
_SPARSE = b"GNU.sparse."
_EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_AGAIN = "copy or download it again"


def tar_members(
    stream: IO[bytes], where: str, wanted: Callable[[str], bool], largest: int | None = None
) -> Iterator[tuple[str, bytes | None]]:
    """(name, content) of every member but folders; no content for what is no file or not `wanted`. `where`
    names the tar; a member of more than `largest` bytes, LONGEST_LINE by default, is an error.

    Raise DataError for whatever may hide a member.
    """
    return _Tar(stream, where, largest or streams.LONGEST_LINE).members(wanted)


class _Tar:
    def __init__(self, stream: IO[bytes], where: str, largest: int) -> None:
        self._stream, self._where, self._largest = stream, where, largest
        self._offset = 0

    def members(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes | None]]:
        own: dict[str, str] = {}
        common: dict[str, str] = {}
        ended = False
        while True:
            header = self._stream.read(BLOCK)
            self._offset += len(header)
            if own and not any(header):
                raise self._error("an extended header without the member that it belongs to", "a tar", _AGAIN)
            if not any(header):
                if len(header) == BLOCK:
                    # Another tar may follow, and zeros up to a full record.
                    ended, common = True, {}
                    continue
                if ended:
                    return
            if len(header) < BLOCK:
                if ended:
                    raise self._error(f"{len(header):,} bytes behind its end that are no tar")
                raise self._truncated("its list of members: no end mark")
            member = self._member(header, ended)
            ended = False
            what = f"member {brief(member.name)}"
            if member.type == tarfile.GNUTYPE_LONGNAME:
                own["path"] = _text(self._header(member.size, what).rstrip(b"\0"))
            elif member.type == tarfile.XGLTYPE:
                common |= self._records(self._header(member.size, what))
            elif member.type in _EXTENSIONS:
                own |= self._records(self._header(member.size, what))
            elif member.type == tarfile.GNUTYPE_LONGLINK:
                self._skip(member.size, what)
            else:
                records, own = common | own, {}
                yield from self._plain(member, records, wanted)

    def _plain(
        self, member: tarfile.TarInfo, records: dict[str, str], wanted: Callable[[str], bool]
    ) -> Iterator[tuple[str, bytes | None]]:
        """A member that stands for itself, with what its extended headers say of it."""
        name = records.get("path", member.name)
        what = f"member {brief(name)}"
        size = self._size(records["size"]) if "size" in records else member.size
        if member.type == tarfile.GNUTYPE_SPARSE or "sparse" in records:
            got = f"{what} that is sparse"
            raise self._error(got, "files with all of their bytes", "pack it without --sparse")
        if member.type in (tarfile.LNKTYPE, tarfile.SYMTYPE):
            yield name, None
        elif not member.isreg():
            self._skip(size, what)
            if not member.isdir():
                yield name, None
        elif wanted(name):
            yield name, self._content(size, what)
        else:
            self._skip(size, what)
            yield name, None

    def _member(self, header: bytes, ended: bool) -> tarfile.TarInfo:
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            place = f"{error} at byte {self._offset - BLOCK:,}" + (", behind its end" if ended else "")
            raise self._error(f"a damaged tar ({place})", "a tar", _AGAIN) from error
        if member.size < 0:
            got = f"a damaged tar (a size of {member.size} at byte {self._offset - BLOCK:,})"
            raise self._error(got, "a tar", _AGAIN)
        return member

    def _size(self, text: str) -> int:
        if not text.isdecimal() or len(text) > 20:
            raise self._error("a damaged tar (an extended header)", "a tar", _AGAIN)
        return int(text)

    def _records(self, data: bytes) -> dict[str, str]:
        """What counts of a POSIX.1-2001 extended header: records `LENGTH KEY=VALUE\\n`."""
        records: dict[str, str] = {}
        start = 0
        while start < len(data):
            space = data.find(b" ", start, start + 10)
            length = data[start:space] if space > 0 else b""
            if not length.isdigit() or not len(length) + 3 <= int(length) <= len(data) - start:
                raise self._error("a damaged tar (an extended header)", "a tar", _AGAIN)
            key, _, value = data[space + 1 : start + int(length) - 1].partition(b"=")
            if key in _RECORDS:
                records[key.decode()] = _text(value)
            elif key.startswith(_SPARSE):
                records["sparse"] = ""
            start += int(length)
        return records

    def _header(self, size: int, what: str) -> bytes:
        if size > LONGEST_HEADER:
            got = f"{what}, an extended header of {size:,} bytes"
            raise self._error(got, f"{LONGEST_HEADER:,}", "pack it again without extended attributes")
        return self._content(size, what)

    def _read(self, count: int, what: str) -> bytes:
        data = self._stream.read(count)
        self._offset += len(data)
        if len(data) != count:
            raise self._truncated(what)
        return data

    def _content(self, size: int, what: str) -> bytes:
        if size > self._largest:
            got = f"{what} of more than {self._largest >> 20} MiB"
            raise self._error(got, "", "cut it into smaller documents")
        return self._read(-(-size // BLOCK) * BLOCK, what)[:size]

    def _skip(self, size: int, what: str) -> None:
        left = -(-size // BLOCK) * BLOCK
        while left:
            left -= len(self._read(min(left, streams.BATCH_BYTES), what))

    def _truncated(self, what: str) -> DataError:
        got = f"a truncated tar: it ends after {self._offset:,} bytes, inside {what}"
        return self._error(got, "a whole tar", _AGAIN)

    def _error(self, got: str, allowed: str = "", remedy: str = "") -> DataError:
        return DataError(Problem(self._where, got, allowed, remedy))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
