"""Read the members of a tar file, strictly: every member, or an error.

Reads the stream once. Python's tarfile accepts a file that was truncated between two members, stops after the
first of several concatenated tar files, and ignores everything after a damaged header.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from typing import IO

from llmtrain.errors import DataError, Problem
from llmtrain.prepare import source_file
from llmtrain.prepare.folder_scan import short_name

BLOCK = tarfile.BLOCKSIZE
LONGEST_HEADER = 1 << 20
"""Maximum bytes of an extended header: a name has at most 4,096 bytes, an attribute 64 KiB."""
_RECORDS = (b"path", b"size")
_SPARSE = b"GNU.sparse."
_EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_AGAIN = "copy or download it again"


def tar_members(
    stream: IO[bytes], where: str, wanted: Callable[[str], bool], largest: int | None = None
) -> Iterator[tuple[str, bytes | None]]:
    """Yield (name, content) of all members except folders; content is None for members that are not files or
    not `wanted`.

    where: name of the tar file for messages; largest: maximum bytes of a member, default LONGEST_LINE.
    Raise DataError for damage that may hide a member, and for larger members.
    """
    return _Tar(stream, where, largest or source_file.LONGEST_LINE).members(wanted)


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
                raise self._error("an extended header without its member", "a tar file", _AGAIN)
            if not any(header):
                if len(header) == BLOCK:
                    # Another tar file may follow, or zeros up to a full record.
                    ended, common = True, {}
                    continue
                if ended:
                    return
            if len(header) < BLOCK:
                if ended:
                    raise self._error(f"{len(header):,} bytes after its end that are not a tar file")
                raise self._truncated("its list of members: no end mark")
            member = self._member(header, ended)
            ended = False
            what = f"member {short_name(member.name)}"
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
        """Yield an ordinary member, with the attributes that its extended headers override."""
        name = records.get("path", member.name)
        what = f"member {short_name(name)}"
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
            reason = f"{error} at byte {self._offset - BLOCK:,}" + (", after its end" if ended else "")
            raise self._error(f"a damaged tar file ({reason})", "a tar file", _AGAIN) from error
        if member.size < 0:
            got = f"a damaged tar file (a size of {member.size} at byte {self._offset - BLOCK:,})"
            raise self._error(got, "a tar file", _AGAIN)
        return member

    def _size(self, text: str) -> int:
        if not text.isdecimal() or len(text) > 20:
            raise self._error("a damaged tar file (an extended header)", "a tar file", _AGAIN)
        return int(text)

    def _records(self, data: bytes) -> dict[str, str]:
        """Return the relevant records `LENGTH KEY=VALUE\\n` of a POSIX.1-2001 extended header."""
        records: dict[str, str] = {}
        start = 0
        while start < len(data):
            space = data.find(b" ", start, start + 10)
            length = data[start:space] if space > 0 else b""
            if not length.isdigit() or not len(length) + 3 <= int(length) <= len(data) - start:
                raise self._error("a damaged tar file (an extended header)", "a tar file", _AGAIN)
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
            raise self._error(got, "", "split it into smaller documents")
        return self._read(-(-size // BLOCK) * BLOCK, what)[:size]

    def _skip(self, size: int, what: str) -> None:
        left = -(-size // BLOCK) * BLOCK
        while left:
            left -= len(self._read(min(left, source_file.BATCH_BYTES), what))

    def _truncated(self, what: str) -> DataError:
        got = f"a truncated tar file: it ends after {self._offset:,} bytes, inside {what}"
        return self._error(got, "a complete tar file", _AGAIN)

    def _error(self, got: str, allowed: str = "", remedy: str = "") -> DataError:
        return DataError(Problem(self._where, got, allowed, remedy))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
