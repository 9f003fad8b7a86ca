"""How do all codes of a run become the postings and statistics of one latent that fires too often for memory?

The same object and the same statistics (FORMAT.md, sections 8.3 and 8.5) as `postings_gather`, `segment_grouped` and
`latent_stats` give, but postings wait on local disk, and everything is computed of a stretch of them at a time. Only the encoded
object is in memory.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.errors import ErrorKind, FormatError
from actstore.latent_stats import HIST_SHIFT, LATENT_STATS_SCHEMA, QUANTILES, histogram_bins
from actstore.sparse.rows import SparseRows
from actstore.sparse.segment_format import BLOCK_POSTINGS
from actstore.sparse.segment_grouped import check_postings, encode_blocks

from .latent_stats import TokenRuns, lists_of, quantile_places, statistics_table, token_columns
from .sorted_runs import SortedRuns

if TYPE_CHECKING:
    from .postings_gather import UnitTokens

Int64s = npt.NDArray[np.int64]
Float64s = npt.NDArray[np.float64]
Bits = npt.NDArray[np.unsignedinteger[Any]]

_ALONE = np.zeros(1, np.int64)
"""The one latent among the one that fires."""


class LargeLatent:
    """Takes the codes of all rows, in order, and keeps those of one latent. A context manager: its files end with it.

    Memory: some tens of MiB, and 24 bytes for each token of the vocabulary; `finish` returns the object beside.
    """

    def __init__(self, latent: int, count: int, dtype: np.dtype[Any], *, folder: str | None = None) -> None:
        """Begin.

        Args:
            latent: Whose codes.
            count: How often it fires in all rows together, exactly; at least once.
            dtype: Of the values.
            folder: Where temporary files go: 16 bytes for each posting; None for the system's choice.
        """
        self._latent, self._count, self._dtype = latent, count, dtype
        self._runs = SortedRuns(dtype, folder=folder)
        self._n_docs = 0
        self._last_doc = self._last_row = -1

    def __enter__(self) -> "LargeLatent":
        return self

    def __exit__(self, *exc: object) -> None:
        self._runs.__exit__(*exc)

    def add(self, page: SparseRows, first: int, tokens: "UnitTokens") -> None:
        """Take the codes of some rows that follow all rows before; as `PostingsGatherer.add`.

        Raises:
            FormatError: rows that do not ascend.
            InvalidInputError: values that are no codes.
            StorageError: the temporary folder is full.
        """
        places = np.flatnonzero(page.latents == self._latent)
        if not len(places):
            return
        offsets = first + np.searchsorted(page.indptr, places, side="right") - 1
        rows, values, doc_ids = tokens.rows[offsets], page.values[places], tokens.doc_ids[offsets]
        check_postings(np.array([0, len(rows)]), rows, values)
        if int(rows[0]) <= self._last_row:
            raise FormatError(
                ErrorKind.INVARIANT_BROKEN,
                f"row {int(rows[0])} of codes follows row {self._last_row}: a faulty program wrote them; see fsck",
            )
        self._last_row = int(rows[-1])
        self._n_docs += int(np.count_nonzero(np.diff(doc_ids, prepend=self._last_doc)))
        self._last_doc = int(doc_ids[-1])
        self._runs.append(rows, values, tokens.token_ids[offsets])

    def finish(
        self, *, n_rows: int, n_documents: int, decoder_norms: npt.NDArray[np.floating[Any]]
    ) -> tuple[list[bytes], dict[str, Any], pa.Table]:
        """Return the pieces of the segment's object, what `meta` must say of it, and the latent's statistics.

        Args:
            n_rows: Rows of the run that were encoded.
            n_documents: Documents that have such rows.
            decoder_norms: L2 norm of the latent's row of the decoder, shape (1,).

        Raises:
            FormatError: the latent fires more or less often than was said.
        """
        if len(self._runs) != self._count:
            raise FormatError(
                ErrorKind.INVARIANT_BROKEN,
                f"latent {self._latent} has {len(self._runs)} codes, the directories of their units say {self._count}: a faulty "
                "program wrote them; encode the run again under another dictionary name",
            )
        summary = _ValueSummary(self._count, self._dtype)
        counts = np.array([self._count])
        parts, meta = encode_blocks(self._latent, counts, self._blocks(summary), self._dtype)
        columns = {**summary.columns(), **token_columns(self._token_runs(summary.median), _ALONE, 1)}
        table = statistics_table(
            columns, first_latent=self._latent, n_tokens=counts, n_docs=np.array([self._n_docs]), n_rows=n_rows,
            n_documents=n_documents, decoder_norms=decoder_norms,
        )  # fmt: skip
        return parts, meta, table

    def _blocks(self, summary: "_ValueSummary") -> Iterator[tuple[Int64s, Bits]]:
        """Yield whole blocks, by descending value, and in each by row; the last one may be short."""
        rows, bits = np.empty(0, np.int64), np.empty(0, f"<u{self._dtype.itemsize}")
        for more_rows, more_bits in self._runs.merged():
            summary.add(more_rows, more_bits)
            rows, bits = np.append(rows, more_rows), np.append(bits, more_bits)
            n = len(rows) - len(rows) % BLOCK_POSTINGS
            yield _by_row(rows[:n], bits[:n])
            rows, bits = rows[n:], bits[n:]
        yield _by_row(rows, bits)

    def _token_runs(self, median: float) -> TokenRuns:
        """Return the postings by token."""
        counts, strong, sums = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
        for tokens, bits in self._runs.tokens():
            values = _wide(bits)
            n = max(len(counts), int(tokens.max()) + 1)
            counts = _added(counts, np.bincount(tokens, minlength=n))
            sums = _added(sums, np.bincount(tokens, values, minlength=n))
            strong = _added(strong, np.bincount(tokens[values >= median], minlength=n))
        seen = np.flatnonzero(counts)
        return TokenRuns(
            owners=np.zeros(len(seen), np.int64),
            tokens=seen.astype(np.int32),
            counts=counts[seen],
            means=sums[seen] / counts[seen],
            strong=strong[seen],
        )


class _ValueSummary:
    """What the statistics say of values, from all of them in descending order, a stretch at a time."""

    def __init__(self, count: int, dtype: np.dtype[Any]) -> None:
        self._count, self._seen, self._max_row = count, 0, -1
        self._dtype = dtype
        self._sums: list[float] = []
        self._bins = np.zeros(1 << (16 - HIST_SHIFT), np.int64)
        length = np.array([count])
        self._quantiles = [tuple(x[0] for x in quantile_places(q, length)) for q in QUANTILES]
        wanted = {int(place) for low, high, _ in self._quantiles for place in (low, high)}
        self._wanted = np.array(sorted({0, count // 2, count - 1, *wanted}), np.int64)
        self._found: dict[int, float] = {}

    @property
    def median(self) -> float:
        """The upper median."""
        return self._found[self._count // 2]

    def add(self, rows: Int64s, bits: Bits) -> None:
        """Take the next postings."""
        if not self._seen:
            self._max_row = int(rows[0])
        values = _wide(bits)
        self._sums.append(float(values.sum()))
        bins = bits >> HIST_SHIFT if bits.itemsize == 2 else histogram_bins(bits.view(np.float32))
        self._bins += np.bincount(bins, minlength=len(self._bins))
        # Places count from the smallest value on.
        here = self._count - 1 - self._wanted - self._seen
        for place, at in zip(self._wanted.tolist(), here.tolist(), strict=True):
            if 0 <= at < len(values):
                self._found[place] = float(values[at])
        self._seen += len(values)

    def columns(self) -> dict[str, Any]:
        """Return the columns that are made of values."""
        total = math.fsum(self._sums)
        quantiles = [
            self._found[int(low)] + part * (self._found[int(high)] - self._found[int(low)])
            for low, high, part in self._quantiles
        ]
        bins = np.flatnonzero(self._bins)
        n_bins = np.array([len(bins)])
        return {
            "mean": pa.array([total / self._count]),
            "max": pa.array([self._found[self._count - 1]]),
            "sum": np.array([total]),
            "max_row": pa.array([self._max_row]),
            "quantiles": pa.array(
                [np.array(quantiles, np.float32)], LATENT_STATS_SCHEMA.field("quantiles").type
            ),
            "hist_bins": lists_of(pa.array(bins.astype(np.int32)), n_bins, _ALONE, 1),
            "hist_counts": lists_of(pa.array(self._bins[bins]), n_bins, _ALONE, 1),
        }


def _by_row(rows: Int64s, bits: Bits) -> tuple[Int64s, Bits]:
    """Return postings with each block's by ascending row."""
    order = np.lexsort((rows, np.arange(len(rows)) // BLOCK_POSTINGS))
    return rows[order], bits[order]


def _wide(bits: Bits) -> Float64s:
    return bits.view(f"<f{bits.itemsize}").astype(np.float64)


def _added(total: npt.NDArray[Any], more: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the sum; `total` may be shorter."""
    more = more.astype(total.dtype)
    more[: len(total)] += total
    return more
