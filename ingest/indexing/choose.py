"""Which kind of index suits a number of rows, and into how many lists and shards? Pure functions of sizes.

Source: faiss wiki, "Guidelines to choose an index" (lists by number of vectors, 39 to 256 training vectors a list).
"""

import math
import os
from dataclasses import dataclass
from typing import Any, Final

from actstore.errors import ErrorKind, InvalidInputError

from .kinds import turned_width

FLAT_ROWS: Final = 20_000
"""Up to here all vectors are compared in a few milliseconds, and exactly."""

MOST_LISTS: Final = 65_536
"""More would need an index of the centroids: finding a query's lists is a comparison with all of them."""

SAMPLE_PER_LIST: Final = 64
"""Training vectors a list, of FAISS's 39 to 256."""

SHARD_BYTES: Final = 1 << 30
"""Of vectors in a shard's file: what a task holds in memory while it fills one, up to twice."""

RABITQ_BITS: Final = 1

_ID_BYTES: Final = 8
_RABITQ_FACTOR_BYTES: Final = 12


@dataclass(frozen=True, slots=True)
class Choice:
    """What to build, and why."""

    kind: str
    params: dict[str, Any]
    why: tuple[str, ...]
    """Lines for a person."""


def choose_kind(
    kind: str, *, n_rows: int, d: int, memory_bytes: int, n_lists: int | None, norm_limit: float
) -> Choice:
    """Return what to build.

    Args:
        kind: What was asked for: `auto` or a kind.
        n_rows: Rows to index.
        d: Width of their vectors.
        memory_bytes: What the vectors may take in the memory of a machine that answers queries.
        n_lists: What was asked for, or None.
        norm_limit: Norm over which a row counts as an attention sink; infinite if unknown.

    >>> choose_kind("auto", n_rows=10**6, d=768, memory_bytes=1 << 30, n_lists=None, norm_limit=9.0).kind
    'ivf_sq8'
    """
    why = [f"{n_rows:,} rows, {d:,} numbers each; a budget of {memory_bytes:,} bytes of memory for queries"]
    if kind == "auto":
        kind, reason = _pick(n_rows, d, memory_bytes)
        why.append(reason)
    else:
        why.append(f"{kind}: as asked")
    params: dict[str, Any] = {}
    if kind.startswith("ivf"):
        params["n_lists"] = n_lists or lists_for(n_rows)
        asked = "as asked" if n_lists else "the power of two next to 4 times the root of the rows"
        why.append(f"{params['n_lists']:,} lists: {asked}")
    elif n_lists is not None:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"n_lists={n_lists} was given, and an index of kind {kind} has no lists: leave it out, or ask for ivf_sq8",
        )
    if kind == "ivf_rabitq":
        params["bits"] = RABITQ_BITS
    if kind == "scan_sq8":
        params["norm_limit"] = norm_limit if math.isfinite(norm_limit) else None
    return Choice(kind, params, tuple(why))


def _pick(n_rows: int, d: int, memory_bytes: int) -> tuple[str, str]:
    sq8 = n_rows * row_bytes("ivf_sq8", d)
    if n_rows <= FLAT_ROWS:
        return "flat", f"flat: up to {FLAT_ROWS:,} rows are compared at once, exactly"
    if sq8 <= memory_bytes:
        return "ivf_sq8", f"ivf_sq8: {sq8:,} bytes at 8 bits a number are within the budget"
    one_bit = n_rows * row_bytes("ivf_rabitq", d)
    return (
        "ivf_rabitq",
        f"ivf_rabitq: {sq8:,} bytes at 8 bits a number are over the budget, {one_bit:,} at one bit",
    )


def lists_for(n_rows: int) -> int:
    """Return into how many lists so many rows go: a power of two.

    >>> lists_for(50_000), lists_for(10**6), lists_for(10**7), lists_for(10**12)
    (1024, 4096, 16384, 65536)
    """
    return min(MOST_LISTS, 1 << max(0, round(math.log2(max(1.0, 4.0 * math.sqrt(n_rows))))))


def sample_rows(kind: str, params: dict[str, Any], *, n_rows: int, d: int, memory_bytes: int) -> int:
    """Return how many rows an index is trained on: 0 of a kind that learns nothing, otherwise what memory allows.

    Args:
        kind: A kind.
        params: What it is built with.
        n_rows: Rows that there are.
        d: Width of the rows as they are read.
        memory_bytes: For two copies of the sample.
    """
    if kind == "flat":
        return 0
    wanted = SAMPLE_PER_LIST * int(params["n_lists"]) if "n_lists" in params else 65_536
    return min(n_rows, wanted, max(1024, memory_bytes // (8 * d)))


def row_bytes(kind: str, d: int) -> int:
    """Return the bytes of a vector in a file."""
    if kind == "flat":
        return 4 * d + _ID_BYTES
    if kind == "ivf_rabitq":
        return turned_width(d) * RABITQ_BITS // 8 + _RABITQ_FACTOR_BYTES + _ID_BYTES
    return d + _ID_BYTES


def rows_per_shard(kind: str, d: int, shard_rows: int) -> int:
    """Return how many rows a shard has at most: as asked, or what fits `SHARD_BYTES`."""
    return max(1, min(shard_rows, SHARD_BYTES // row_bytes(kind, d)))


def default_memory_bytes() -> int:
    """Return a quarter of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
