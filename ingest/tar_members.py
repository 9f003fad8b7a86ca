"""What files are in a tar archive, read as a stream?

The standard library's reader takes a damaged header in the middle, or a missing end, for the end of the archive, and keeps
every header and a header's extensions in memory. This one yields whole members or fails, and holds none of it. Nothing is
ever written to disk; links, devices and folders are passed over.

Source: POSIX.1-2008, "pax Interchange Format"; GNU tar manual, "Basic Tar Format" (types L, K and S).
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

BLOCK = 512
_MAX_EXTENSION = 1 << 20
"""Bytes of a pax or long-name header; real ones are below 10 kB."""

_COPY = 1 << 20
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_WITHOUT_DATA = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)
_EXTENSIONS = (
    tarfile.XHDTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class TarError(OSError):
    """The archive is damaged, cut off, or of a kind that is not read."""


class _Header(NamedTuple):
    name: str
    size: int
    type: bytes


@dataclass(slots=True)
class TarMember:
    """One regular file of an archive. Its data can be read until the next member is asked for."""

    name: str
    size: int
    stream: BinaryIO
    n_read: int = 0

    def read(self) -> bytes:
        """Return all of it; the caller has looked at `size`."""
        data = _read_exactly(self.stream, self.size - self.n_read)
        self.n_read = self.size
        return data


def read_members(stream: BinaryIO) -> Iterator[TarMember]:
    """Yield the regular files of an archive in order; reads the stream to its end.

    Raises:
        TarError: damaged or cut off headers or data, no end mark, something behind it, or a sparse file.
    """
    fields: dict[str, str] = {}
    while (header := _read_header(stream)) is not None:
        if header.type in _EXTENSIONS:
            fields |= _read_fields(stream, header)
            continue
        name, size = fields.get("path", header.name), int(fields.get("size", header.size))
        if header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in fields):
            raise TarError(f"member {name!r} is a sparse file, which is not read")
        fields = {}
        if header.type in _WITHOUT_DATA:
            continue
        member = TarMember(name, size, stream)
        if header.type in _REGULAR and not name.endswith("/"):
            yield member
        _skip(stream, _padded(size) - member.n_read)
    _check_end(stream)


def _read_header(stream: BinaryIO) -> _Header | None:
    """Return the next header, None at the end mark."""
    block = _read_exactly(stream, BLOCK, what="a header or the end mark")
    if not block.strip(b"\0"):
        return None
    total = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if _number(block[148:156]) != total:
        raise TarError("damaged tar header (its checksum is wrong)")
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0]
    if prefix and block[257:263] == b"ustar\0":
        name = prefix + b"/" + name
    return _Header(name.decode("utf-8", "surrogateescape"), _number(block[124:136]), block[156:157])


def _number(field: bytes) -> int:
    """Return a header's number: octal digits, or, where the first bit says so, a binary one (GNU)."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if digits.strip(b"01234567"):
        raise TarError(f"damaged tar header (the number {field!r})")
    return int(digits or b"0", 8)


def _read_fields(stream: BinaryIO, header: _Header) -> dict[str, str]:
    """Return what an extension says of the member behind it; what holds for all members names none and changes nothing."""
    if header.size > _MAX_EXTENSION:
        raise TarError(f"a header of {header.size} bytes, more than {_MAX_EXTENSION}")
    data = _read_exactly(stream, _padded(header.size))[: header.size]
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    if header.type not in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
        return {}
    fields = dict(_pax_fields(data))
    if not fields.get("size", "0").isdecimal():
        raise TarError("damaged pax header")
    return fields


def _pax_fields(data: bytes) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(data) and data[at]:
        length, space, _ = data[at : at + 20].partition(b" ")
        if not space or not length.isdigit() or not 0 < int(length) <= len(data) - at:
            raise TarError("damaged pax header")
        key, equals, value = (
            data[at : at + int(length)].removesuffix(b"\n")[len(length) + 1 :].partition(b"=")
        )
        if not equals:
            raise TarError("damaged pax header")
        yield key.decode("utf-8", "replace"), value.decode("utf-8", "surrogateescape")
        at += int(length)


def _check_end(stream: BinaryIO) -> None:
    while data := stream.read(_COPY):
        if data.strip(b"\0"):
            raise TarError("data behind the end of the archive: archives joined into one file are not read")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _skip(stream: BinaryIO, size: int) -> None:
    while size:
        size -= len(_read_exactly(stream, min(size, _COPY)))


def _read_exactly(stream: BinaryIO, size: int, *, what: str = "more of a file") -> bytes:
    """Return `size` bytes.

    Raises:
        TarError: the stream ends before.
    """
    pieces = []
    left = size
    while left:
        piece = stream.read(min(left, _COPY))
        if not piece:
            raise TarError(f"the archive ends where {what} should follow")
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)
