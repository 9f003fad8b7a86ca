"""Which rows are furthest along a direction, found from compressed rows and proved?

All compressed rows are multiplied with the direction (`actstore.query.code_scan`). The product of each is within a known distance
of the true one, so the rows that could be among the best k are few; they are read as they are stored and scored exactly, best
first. The answer is proved when the k-th best exact score, after folding, is above all that a row not looked at could have; until
then more are looked at. Where that would be a large part of all rows, as among rows that tie, all are scanned instead. The rows
that were not compressed are always scored, and so are those that no index has. The answer is a scan's, row for row.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from actstore.activations import Activations
from actstore.errors import ErrorKind, FormatError
from actstore.run import Run
from actstore.vector_index import IndexShard, VectorIndex

from .answer import RowOptions, find_rows
from .code_scan import CompressedRows, Matches
from .offer_rows import RowOffers
from .row_bits import Bits, add_counts, read_row_bits
from .scan import ScanReport, plan_block_rows
from .scores import Float32s, Float64s, ProjectionScorer

Int64s: TypeAlias = npt.NDArray[np.int64]

FIRST_ROWS: Final = 512
"""More than the error leaves open, mostly; looking at these costs nothing beside reading the bytes."""

_GROWTH: Final = 8
"""How many times more rows are looked at in each further round."""

_VERIFIED_SHARE: Final = 1 / 32
"""Of the rows that count: a scan of all takes no longer than reading more than these one by one."""

VERIFIED_ROWS: Final = 8192
"""These take about 0.1 s."""

_TOGETHER: Final = 256
"""Directions looked at at a time, at most."""

_LOOKED_AT_BYTES: Final = 100
"""Of a direction and row: what was found, and what is sorted of it."""


@dataclass(slots=True)
class DirectionAnswer:
    """The rows found, and how."""

    report: ScanReport
    index: dict[str, Any]
    """For `Meta.index`."""

    warnings: list[str] = field(default_factory=list)


def find_along(
    run: Run,
    acts: Activations,
    scorer: ProjectionScorer,
    options: RowOptions,
    *,
    k: int,
    indexes: Sequence[VectorIndex],
    first: int = FIRST_ROWS,
    enough: int = VERIFIED_ROWS,
) -> DirectionAnswer:
    """Return the best `k` rows of every direction among those that count: exactly those of `answer.find_rows`.

    Memory besides `options.memory_bytes`: as much again for the rows looked at, the masks' bits, and 8 bytes for each direction
    and row verified. Directions whose rows do not fit together are looked at one group after the other.

    Args:
        run: The run asked.
        acts: Its rows at a hook point.
        scorer: The directions.
        options: Which rows count.
        k: Answers of each direction.
        indexes: Of kind `scan_sq8` and of this hook point; no two have the same rows.
        first: Rows of a shard looked at in the first round, besides 8 for each answer.
        enough: Rows that may always be verified before all are scanned instead, more where many answers are asked for.

    Raises:
        FormatError: an index, or a stored row, is missing or damaged.
        MissingDependencyError: FAISS is not installed.
    """
    covered = {unit for index in indexes for unit in index.covered().tolist()}
    others = [unit for unit in run.collection.units if unit not in covered]
    report = find_rows(run, acts, scorer, options, k=k, units=others)
    n_scanned = report.removed.n_seen
    search = _Search(run, acts, scorer, options, report, k=k)
    for index in indexes:
        search.add(index)
    is_proved = search.find(first, enough)
    told = {"n_scanned": n_scanned, "certified": is_proved, **search.tell()}
    if not is_proved:
        bytes_read, n_scored = report.bytes_read, report.n_scored
        report = find_rows(run, acts, scorer, options, k=k)
        report.bytes_read += bytes_read
        report.n_scored += n_scored
        told["n_scanned"] = report.removed.n_seen
    warnings = []
    if n_scanned:
        warnings.append(
            f"{n_scanned} rows are in no index and were compared one by one: actstore index build brings it up to date"
        )
    return DirectionAnswer(report, told, warnings)


@dataclass(frozen=True, slots=True)
class Exceptions:
    """The rows of a shard that were not compressed."""

    ordinals: Int64s
    """Ascending, shape (m,)."""

    rows_md: Float32s
    """As they are stored; mapped."""


def open_exceptions(shard: IndexShard) -> Exceptions:
    """Return the exceptions of a shard.

    Raises:
        FormatError: the file is missing, damaged or of something else.
    """
    path = shard.exceptions_file()
    found = None if path is None else _map_exceptions(Path(path))
    if found is None or not _fits(found, n=shard.n, d=shard.index.d):
        raise FormatError(
            ErrorKind.INVARIANT_BROKEN,
            f"shard {shard.number} of index {shard.index.id!r} lacks the file of rows that were not compressed, or it holds "
            "something else: build the index again (actstore index build --rebuild)",
        )
    return found


def _map_exceptions(path: Path) -> Exceptions | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            if set(file.keys()) != {"ordinals", "rows"} or file.get_slice("rows").get_dtype() != "F32":
                return None
            ordinals, shape = file.get_tensor("ordinals"), tuple(file.get_slice("rows").get_shape())
    except SafetensorError:
        return None
    if not len(ordinals) or 0 in shape:
        return Exceptions(ordinals, np.empty(shape, np.float32))
    # The rows are the last bytes of the file.
    start = path.stat().st_size - 4 * int(np.prod(shape))
    return Exceptions(ordinals, np.memmap(path, np.float32, "r", offset=start, shape=shape))


def _fits(found: Exceptions, *, n: int, d: int) -> bool:
    ordinals = found.ordinals
    is_fit = ordinals.dtype == np.int64 and found.rows_md.shape == (len(ordinals), d)
    return bool(is_fit and (np.diff(ordinals, prepend=-1, append=n) > 0).all())


@dataclass(frozen=True, slots=True)
class _Shard:
    """One shard, and which of its rows count."""

    shard: IndexShard
    rows: CompressedRows
    bits: Bits
    """Of the compressed rows that count."""


@dataclass(frozen=True, slots=True)
class _Candidates:
    """The rows that may be among the best of one direction."""

    query: int
    rows: Int64s
    """Most promising first, shape (m,)."""

    upper: Float64s
    """Above every score that they may have, shape (m,)."""

    beyond: float
    """Above the score of every other row; `-inf` if there is none."""


class _Search:
    """One question about directions, and what has been found out."""

    def __init__(
        self,
        run: Run,
        acts: Activations,
        scorer: ProjectionScorer,
        options: RowOptions,
        report: ScanReport,
        *,
        k: int,
    ) -> None:
        self._run, self._acts, self._scorer, self._options = run, acts, scorer, options
        self._report, self._k = report, k
        self._block_rows = plan_block_rows(acts.shape[1], scorer.n_queries, options.memory_bytes)
        self._offers = RowOffers(run, acts, scorer, options, report)
        self._shards: list[_Shard] = []
        self._told: list[dict[str, Any]] = []
        self._n_eligible = self._n_exceptions = self._n_rounds = 0
        self._verified = [np.empty(0, np.int64) for _ in range(scorer.n_queries)]

    def add(self, index: VectorIndex) -> None:
        """Take the rows of an index that count, and offer its exceptions."""
        hook_point, report = self._acts.hook_point, self._report
        found = read_row_bits(self._run, hook_point, self._options, index.shards, drop_zero_rows=False)
        add_counts(report.removed, found.removed)
        units = self._run.tokenization.collection.units
        report.bytes_read += sum(units[unit].objects[0].nbytes for unit in index.covered().tolist())
        for shard in index.shards:
            if shard.number in found.bits:
                bits = self._offer_exceptions(shard, found.bits[shard.number])
                self._shards.append(_Shard(shard, CompressedRows(shard.open()), bits))
        self._n_eligible += found.n_eligible
        told = {"id": index.id, "kind": index.kind, "generation": index.generation}
        self._told.append({**told, "n_indexed": index.n_indexed, "n_eligible": found.n_eligible})

    def find(self, first: int, enough: int) -> bool:
        """Offer the rows that may be among the best; return whether these are proved."""
        most = int(max(enough, 4 * self._k, self._n_eligible * _VERIFIED_SHARE))
        queries, wanted = list(range(self._scorer.n_queries)), first + 8 * self._k
        while self._shards and queries:
            self._n_rounds += 1
            left: list[int] = []
            together = self._together(wanted)
            if not together:
                return False
            for start in range(0, len(queries), together):
                some = queries[start : start + together]
                candidates = self._look(some, wanted)
                if not self._verify(candidates, most):
                    return False
                left += [c.query for c in candidates if not self._threshold(c) > c.beyond]
            # All rows that a round looks at are verified if it proves nothing, so the next one has no fewer to verify.
            if left and wanted >= most:
                return False
            queries, wanted = left, min(wanted * _GROWTH, most)
        return True

    def tell(self) -> dict[str, Any]:
        """Return what was done."""
        return {
            "generations": self._told,
            "n_verified": sum(map(len, self._verified)),
            "n_exceptions": self._n_exceptions,
            "n_rounds": self._n_rounds,
        }

    def _offer_exceptions(self, shard: IndexShard, bits: Bits) -> Bits:
        """Offer the exceptions that count, and return the bitmap without any."""
        found = open_exceptions(shard)
        byte, bit = found.ordinals >> 3, np.uint8(1) << (found.ordinals & 7).astype(np.uint8)
        places = np.flatnonzero(bits[byte] & bit)
        for start in range(0, len(places), self._block_rows):
            some = places[start : start + self._block_rows]
            rows, acts_td = shard.rows_of(found.ordinals[some]), np.asarray(found.rows_md[some])
            every = range(self._scorer.n_queries)
            self._offers.at_hand(every, rows, acts_td, np.ones(len(some), np.bool_))
        self._n_exceptions += len(places)
        self._report.bytes_read += found.rows_md.itemsize * found.rows_md.shape[1] * len(places)
        left = bits.copy()
        np.bitwise_and.at(left, byte, ~bit)
        return left

    def _together(self, wanted: int) -> int:
        """Return at how many directions to look at a time, so that what is found of them fits into the memory."""
        n_sides = 2 if self._scorer.sign == "abs" else 1
        found = sum(one.rows.n_found(wanted, threads=_threads()) for one in self._shards)
        return min(_TOGETHER, self._options.memory_bytes // (_LOOKED_AT_BYTES * n_sides * max(1, found)))

    def _look(self, queries: Sequence[int], wanted: int) -> list[_Candidates]:
        """Return the rows of largest value of some directions, at least `wanted` of every shard."""
        vectors_qd, sign = self._scorer.directions()[queries], self._scorer.sign
        sides = {"pos": [1.0], "neg": [-1.0], "abs": [1.0, -1.0]}[sign]
        together = np.concatenate([side * vectors_qd for side in sides])
        found: list[tuple[IndexShard, Matches]] = []
        for one in self._shards:
            found.append((one.shard, one.rows.best(together, wanted, bits=one.bits, threads=_threads())))
            self._report.bytes_read += one.rows.nbytes
        places = [[i + at * len(queries) for at in range(len(sides))] for i in range(len(queries))]
        return [self._gather(found, query, at) for query, at in zip(queries, places, strict=True)]

    def _gather(
        self, found: Sequence[tuple[IndexShard, Matches]], query: int, places: Sequence[int]
    ) -> _Candidates:
        """Return what the shards found of one direction, which is in some places of their answers: itself, its opposite."""
        all_rows, all_upper, beyond = [np.empty(0, np.int64)], [np.empty(0)], -np.inf
        for shard, matches in found:
            for at in places:
                there = matches.ordinals[at] >= 0
                values = matches.values[at][there]
                # The value of one side is the score already; of both, it is how far from 0 the row is.
                scores = np.abs(values) if len(places) > 1 else values
                all_rows.append(shard.rows_of(matches.ordinals[at][there]))
                all_upper.append(scores + matches.slack_q[at])
                beyond = max(beyond, float(matches.beyond_q[at]))
        rows, first = np.unique(np.concatenate(all_rows), return_index=True)
        upper = np.concatenate(all_upper)[first]
        is_new = ~np.isin(rows, self._verified[query], assume_unique=True)
        rows, upper = rows[is_new], upper[is_new]
        order = np.argsort(-upper, kind="stable")
        return _Candidates(query, rows[order], upper[order], beyond)

    def _verify(self, candidates: Sequence[_Candidates], most: int) -> bool:
        """Score candidates exactly as far as they may be among the best; return False if they are more than `most`."""
        left, size = list(candidates), 2 * self._k
        while left:
            self._offer([(c.query, c.rows[:size]) for c in left])
            left = [self._after(c, size) for c in left]
            if max(len(c.rows) for c in left) > most:
                return False
            left, size = [c for c in left if len(c.rows)], 4 * size
        return True

    def _after(self, candidates: _Candidates, size: int) -> _Candidates:
        """Return the candidates behind the first few that may still be among the best."""
        upper = candidates.upper[size:]
        stop = int(np.searchsorted(-upper, -self._threshold(candidates), side="right"))
        rows = candidates.rows[size:]
        return _Candidates(candidates.query, rows[:stop], upper[:stop], candidates.beyond)

    def _offer(self, chosen: Sequence[tuple[int, Int64s]]) -> None:
        """Offer each direction its rows, read once for all of them."""
        width = max(len(rows) for _, rows in chosen)
        if not width:
            return
        rows_qm = np.full((len(chosen), width), -1, np.int64)
        for own, (query, rows) in zip(rows_qm, chosen, strict=True):
            own[: len(rows)] = rows
            self._verified[query] = np.concatenate([self._verified[query], rows])
        self._offers.candidates([query for query, _ in chosen], rows_qm)

    def _threshold(self, candidates: _Candidates) -> float:
        return self._report.best[candidates.query].threshold


def _threads() -> int:
    return max(1, os.cpu_count() or 1)
