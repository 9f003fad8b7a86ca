"""How are whole numbers stored in few bits, so that both ways run at memory speed? (FORMAT.md, section 8.1)

Gaps and the bits of positive floats have a top part that is unevenly distributed and low bits that are noise. A *packed* array
keeps the low `shift` bits as they are, densely, and the rest as planes of one byte each. Each piece is compressed by zstd
where that makes it smaller. With a top part of about four bits an entropy coder of whole bytes is within 1 % of the best, and
nothing in it looks like a match to zstd, which would cost time.

Source: the split is that of Golomb-Rice codes, Rice (1979), "Some practical universal noiseless coding techniques", with a
Huffman code (zstd's literals) instead of the unary one.
"""

import struct
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from numcodecs import zstd

from actstore.errors import ErrorKind, FormatError

UInts = npt.NDArray[np.unsignedinteger[Any]]

_RAW, _ZSTD, _CONSTANT = 0, 1, 2
_LEVEL: Final = 1
"""Of zstd: higher ones find matches that cost more than they save (measured on gaps and exponents)."""

_TOP_BITS: Final = 4
"""Bits of the mean that stay in the top part."""

_MAX_BITS: Final = 64
_HEADER: Final = struct.Struct("<BB")
_PIECE: Final = struct.Struct("<BI")
_FRAME: Final = struct.Struct("<IB")
"""How a zstd frame begins: a magic number and the descriptor of its header."""

_FRAME_MAGIC: Final = 0xFD2FB528


def pack_ints(numbers: UInts, shift: int | None = None) -> bytes:
    """Return an array of whole numbers in few bytes; `unpack_ints` gives it back.

    Args:
        numbers: Unsigned, one-dimensional.
        shift: Low bits that are kept as they are; chosen from the mean if None.

    >>> unpack_ints(pack_ints(np.array([5, 0, 70_000], np.uint32)), 3)[0].tolist()
    [5, 0, 70000]
    """
    if not len(numbers):
        return b""
    if shift is None:
        shift = max(0, int(numbers.mean()).bit_length() - _TOP_BITS)
    top = (numbers >> numbers.dtype.type(shift)) if shift else numbers
    n_planes = (int(top.max()).bit_length() + 7) // 8
    pieces = [_HEADER.pack(shift, n_planes)]
    low = numbers
    for bits in _widths(shift):
        pieces.append(_pack_piece(_pack_bits((low & low.dtype.type((1 << bits) - 1)).astype(np.uint8), bits)))
        low = low >> low.dtype.type(bits)
    planes = ((top >> top.dtype.type(8 * plane)).astype(np.uint8) for plane in range(n_planes))
    pieces += map(_pack_piece, planes)
    return b"".join(pieces)


def bits_of(values: Any) -> Any:
    """Return the bits of floats as unsigned numbers: of an array as a view, of one number as a number."""
    return values.view(f"<u{values.itemsize}")


def pack_values(values: npt.NDArray[np.floating[Any]], most: Any) -> bytes:
    """Return positive floats in few bytes: how far the bits of each are below those of a largest one.

    The bits of positive floats ascend with them. Largest values of the same number of draws differ less between latents than
    smallest ones do, so distances from them have one distribution. `unpack_values` gives the floats back.

    Args:
        values: Little-endian float16 or float32, one-dimensional.
        most: The bits of a value that is not smaller, or an array of them, one for each value; fit the dtype.
    """
    below = most - bits_of(values)
    if not len(below):
        return b""
    n_bits = int(below.max()).bit_length()
    # Exponent and two or three bits of the fraction are unevenly distributed, the rest is noise.
    return pack_ints(below, 0 if n_bits <= 8 else 8 if values.itemsize == 2 else min(20, n_bits - 8))


def unpack_values(
    data: bytes | memoryview, most: Any, count: int, dtype: np.dtype[Any], offset: int = 0
) -> tuple[npt.NDArray[Any], int]:
    """Return `count` floats that `pack_values` packed at `offset` with the same `most`, and where what follows begins.

    Raises:
        FormatError: the bytes are none that it writes.
    """
    below, end = unpack_ints(data, count, f"<u{dtype.itemsize}", offset)
    if not isinstance(most, np.ndarray) and most >> (8 * dtype.itemsize):
        raise damaged_ints(f"the bits {most:#x} of a value where {dtype} was expected")
    np.subtract(most if isinstance(most, np.ndarray) else below.dtype.type(most), below, out=below)
    return below.view(dtype), end


def unpack_ints(
    data: bytes | memoryview, count: int, dtype: Any = np.uint32, offset: int = 0
) -> tuple[npt.NDArray[Any], int]:
    """Return `count` numbers that `pack_ints` packed at `offset`, and where what follows begins.

    Memory: that of `count` numbers and a few bytes for each, whatever the bytes say; `count` is the caller's to bound.

    Raises:
        FormatError: the bytes are none that it writes, or numbers do not fit into `dtype`.
    """
    kind = np.dtype(dtype)
    if not count:
        return np.empty(0, kind), offset
    try:
        shift, n_planes = _HEADER.unpack_from(data, offset)
        offset += _HEADER.size
        if shift + 8 * max(0, n_planes - 1) >= 8 * kind.itemsize and (shift or n_planes):
            raise damaged_ints(f"numbers of {shift} bits and {n_planes} bytes where {kind} was expected")
        numbers = np.zeros(count, kind)
        at = 0
        for bits in _widths(shift):
            piece, offset = _unpack_piece(data, offset, -(-count * bits // 8))
            _add(numbers, _unpack_bits(piece, bits, count), at)
            at += bits
        for _ in range(n_planes):
            piece, offset = _unpack_piece(data, offset, count)
            _add(numbers, piece, at)
            at += 8
    except (struct.error, ValueError, RuntimeError) as error:
        raise damaged_ints(str(error)) from error
    return numbers, offset


def damaged_ints(found: str) -> FormatError:
    """Return the error for bytes that are no packed numbers; readers add which object it was."""
    return FormatError(ErrorKind.OBJECT_DAMAGED, f"packed numbers cannot be read: {found}")


def _add(numbers: npt.NDArray[Any], piece: npt.NDArray[np.uint8], at: int) -> None:
    kind = numbers.dtype.type
    if at:
        part = piece.astype(numbers.dtype)
        part <<= kind(at)
        numbers |= part
    else:
        numbers[...] = piece


def _widths(shift: int) -> list[int]:
    """Return the widths of the pieces that `shift` low bits are cut into: whole bytes, then 4, 2 and 1 bits."""
    return [8] * (shift // 8) + [bits for bits in (4, 2, 1) if shift & bits]


def _pack_bits(numbers: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Return numbers of `bits` bits with 8 / `bits` of them in a byte, the first one lowest."""
    if bits == 8:
        return numbers
    per_byte = 8 // bits
    padded = numbers
    if len(numbers) % per_byte:
        padded = np.zeros(-(-len(numbers) // per_byte) * per_byte, np.uint8)
        padded[: len(numbers)] = numbers
    packed = padded[::per_byte].copy()
    for place in range(1, per_byte):
        packed |= padded[place::per_byte] << np.uint8(place * bits)
    return packed


def _unpack_bits(packed: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.uint8]:
    if bits == 8:
        return packed
    per_byte = 8 // bits
    numbers = np.empty((len(packed), per_byte), np.uint8)
    for place in range(per_byte):
        np.right_shift(packed, np.uint8(place * bits), out=numbers[:, place])
    numbers &= np.uint8((1 << bits) - 1)
    return numbers.reshape(-1)[:count]


def _pack_piece(piece: npt.NDArray[np.uint8]) -> bytes:
    first = piece[0]
    if first == piece[-1] and (piece == first).all():
        return _PIECE.pack(_CONSTANT, 1) + bytes([int(first)])
    packed: bytes = zstd.compress(piece, _LEVEL)
    if len(packed) < len(piece):
        return _PIECE.pack(_ZSTD, len(packed)) + packed
    return _PIECE.pack(_RAW, len(piece)) + piece.tobytes()


def _frame_size(frame: bytes | memoryview) -> int | None:
    """Return how many bytes a zstd frame says that it holds; None if it does not say. Source: RFC 8878, section 3.1.1.1."""
    magic, descriptor = _FRAME.unpack_from(frame)
    if magic != _FRAME_MAGIC:
        raise ValueError("a piece is no zstd frame")
    is_single = descriptor >> 5 & 1
    n_bytes = (is_single, 2, 4, 8)[descriptor >> 6]
    at = _FRAME.size + (1 - is_single) + (0, 1, 2, 4)[descriptor & 3]
    field = bytes(frame[at : at + n_bytes])
    if len(field) != n_bytes:
        raise ValueError("a piece ends in the header of its zstd frame")
    if not n_bytes:
        return None
    return int.from_bytes(field, "little") + (256 if n_bytes == 2 else 0)


def _unpack_piece(data: bytes | memoryview, offset: int, count: int) -> tuple[npt.NDArray[np.uint8], int]:
    method, nbytes = _PIECE.unpack_from(data, offset)
    offset += _PIECE.size
    end = offset + nbytes
    if end > len(data):
        raise ValueError(f"a piece ends at byte {end} of {len(data)}")
    part = data[offset:end]
    if method == _CONSTANT and nbytes == 1:
        return np.full(count, part[0], np.uint8), end
    if method == _ZSTD:
        declared = _frame_size(part)
        if declared != count:  # before as much is allocated as the frame says
            raise ValueError(f"a piece is said to have {declared} bytes, {count} were expected")
        # Into as much: frames may follow that are said to hold more.
        whole = np.empty(count, np.uint8)
        zstd.decompress(part, whole)
        return whole, end
    if method != _RAW:
        raise ValueError(f"a piece has the unknown method {method}")
    if len(part) != count:
        raise ValueError(f"a piece has {len(part)} bytes, {count} were expected")
    return np.frombuffer(part, np.uint8), end
