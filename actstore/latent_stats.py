"""What is stored of every latent on a run, and how is it read? One table row per latent (FORMAT.md, section 8.5).

The tables are written with the postings, one for each range of latents, and are exact: they are computed of all codes, not
of a sample or a sketch.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from actstore.errors import ErrorKind, FormatError, InvalidInputError, NotFoundError
from actstore.log.values import Collection, StoredObject, Unit
from actstore.objects import ObjectReader
from actstore.row_requests import as_numbers

if TYPE_CHECKING:
    from actstore.codes import Codes

QUANTILES: Final = (0.5, 0.9, 0.95, 0.99, 0.999)
"""Of the firing values; what the column `quantiles` holds, in this order."""

TOP_TOKENS: Final = 10
"""Tokens in each list of top tokens, at most."""

TOP_PROMOTED: Final = 10
"""Tokens in each list of promoted and suppressed vocabulary, at most."""

MIN_TOKEN_COUNT: Final = 5
"""Firing rows that a token needs to be ranked by its mean, or as many as the latent's commonest token has, if those are fewer:
a single strong row is no pattern."""

ULTRA_DENSE: Final = 0.1
"""Density above which a latent is ultra-dense. Source: Sun et al. (2025), "Dense SAE Latents Are Features, Not Bugs", which
studies latents that fire on 10 % of the tokens and more."""

HIST_SHIFT: Final = 6
"""A histogram's bin is the float16 bits of the value without their lowest 6: 16 bins for each power of two."""

LATENTS_PER_GROUP: Final = 512
"""Table rows of a Parquet row group, at least: what reading the statistics of one latent decodes."""

_MAX_GROUPS: Final = 64
"""Row groups of a file: its footer describes each column of each."""

_TOKEN: Final = pa.struct(
    [
        pa.field("token_id", pa.int32(), nullable=False),
        pa.field("count", pa.int64(), nullable=False),
        pa.field("mean", pa.float64(), nullable=False),
    ]
)
_LOGIT: Final = pa.struct(
    [
        pa.field("token_id", pa.int32(), nullable=False),
        pa.field("token", pa.string(), nullable=False),
        pa.field("logit", pa.float32(), nullable=False),
    ]
)

LATENT_STATS_SCHEMA: Final = pa.schema(
    [
        pa.field("latent", pa.int32(), nullable=False),
        pa.field("n_tokens", pa.int64(), nullable=False),
        pa.field("n_docs", pa.int64(), nullable=False),
        pa.field("density", pa.float64(), nullable=False),
        pa.field("doc_density", pa.float64(), nullable=False),
        pa.field("mean", pa.float64()),
        pa.field("max", pa.float64()),
        pa.field("sum", pa.float64(), nullable=False),
        pa.field("max_row", pa.int64()),
        pa.field("quantiles", pa.list_(pa.float32())),
        pa.field("hist_bins", pa.list_(pa.int32()), nullable=False),
        pa.field("hist_counts", pa.list_(pa.int64()), nullable=False),
        pa.field("top_tokens_by_count", pa.list_(_TOKEN), nullable=False),
        pa.field("top_tokens_by_mean", pa.list_(_TOKEN), nullable=False),
        pa.field("single_token_score", pa.float64()),
        pa.field("decoder_norm", pa.float64(), nullable=False),
        pa.field("is_dead", pa.bool_(), nullable=False),
        pa.field("is_ultra_dense", pa.bool_(), nullable=False),
        pa.field("promoted", pa.list_(_LOGIT)),
        pa.field("suppressed", pa.list_(_LOGIT)),
    ]
)
"""Columns of the statistics. Of a latent that never fires mean, max, max_row, quantiles and single_token_score are null, its
sum is 0 and its lists of bins and tokens are empty."""


def histogram_bins(values: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """Return the histogram bin of each value: its float16 bits (values are rounded to float16) without the lowest six.

    >>> histogram_bins(np.array([1.0, 1.06, 2.0], np.float32)).tolist()
    [240, 240, 256]
    """
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    return (halves.view(np.uint16) >> HIST_SHIFT).astype(np.int32)


def histogram_edges(bins: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float32]:
    """Return the least float16 value of each bin, as float32; the bin ends where the next one begins.

    >>> histogram_edges(np.array([240, 241, 256])).tolist()
    [1.0, 1.0625, 2.0]
    """
    return (np.asarray(bins) << HIST_SHIFT).astype(np.uint16).view(np.float16).astype(np.float32)


def stats_key(postings: str, unit: int, attempt: str) -> str:
    """Return the key of a unit's statistics.

    >>> stats_key("sae@run", 0, "ab")
    'postings/sae@run/stats-000000-ab.parquet'
    """
    return f"postings/{postings}/stats-{unit:06}-{attempt}.parquet"


def stats_object(postings: Collection, unit: Unit) -> StoredObject:
    """Return the object of a unit of postings that holds its statistics.

    Raises:
        FormatError: it has none.
    """
    prefix = f"postings/{postings.id}/stats-"
    for obj in unit.objects:
        if obj.key.startswith(prefix):
            return obj
    raise FormatError(
        ErrorKind.INVARIANT_BROKEN,
        f"unit {unit.unit} of postings {postings.id!r} has no statistics among its objects: a faulty program wrote it",
    )


def stats_bytes(table: pa.Table) -> bytes:
    """Return a table of statistics as a Parquet file with page checksums."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        write_page_checksum=True,
        write_statistics=["latent"],
        use_dictionary=["promoted.list.element.token", "suppressed.list.element.token"],
        row_group_size=max(LATENTS_PER_GROUP, -(-table.num_rows // _MAX_GROUPS)),
    )
    data: bytes = sink.getvalue().to_pybytes()
    return data


def read_latent_stats(
    codes: "Codes", latents: Sequence[int] | None = None, columns: Sequence[str] | None = None
) -> pa.Table:
    """Return the statistics of a dictionary's latents on a run: one table row per latent, `LATENT_STATS_SCHEMA`.

    Reads one object per range of latents that is asked for, and of it the columns and row groups that are needed.

    Args:
        codes: The run's codes; their postings must be complete.
        latents: Those wanted, in the order wanted; None for all, ascending.
        columns: Names, `latent` need not be among them; None for all.

    Raises:
        NotFoundError: no postings, or a latent that the dictionary does not have.
        InvalidInputError: postings that are not complete, or an unknown column.
        FormatError: an object is missing or damaged.
    """
    names = _checked_columns(columns)
    store = codes.run.store
    postings = _complete_postings(store.state.collections.get(("postings", codes.id)), codes.id)
    bounds = np.asarray(postings.config["boundaries"], np.int64)
    if latents is None:
        tables = [store.objects.table(stats_object(postings, postings.units[u]), names)
                  for u in range(len(bounds) - 1)]  # fmt: skip
        return _checked_schema(pa.concat_tables(tables), names)
    wanted = as_numbers(latents, what="latents")
    bad = wanted[(wanted < 0) | (wanted >= bounds[-1])]
    if bad.size:
        raise NotFoundError(
            ErrorKind.ROW_NOT_FOUND,
            f"latent {int(bad[0])} was asked for, the dictionary of codes {codes.id!r} has latents [0, {int(bounds[-1])})",
        )
    return _read_some(store.objects, postings, bounds, wanted, names)


def _read_some(
    objects: ObjectReader,
    postings: Collection,
    bounds: npt.NDArray[np.int64],
    wanted: npt.NDArray[np.int64],
    names: list[str],
) -> pa.Table:
    unique, inverse = np.unique(wanted, return_inverse=True)
    tables = [pa.schema([LATENT_STATS_SCHEMA.field(name) for name in names]).empty_table()]
    units = np.searchsorted(bounds, unique, side="right") - 1
    for unit in np.unique(units):
        obj = stats_object(postings, postings.units[int(unit)])
        tables.append(_read_rows(objects.file(obj), unique[units == unit] - bounds[unit], names))
    return _checked_schema(pa.concat_tables(tables).take(pa.array(inverse)), names)


def _read_rows(path: str, rows: npt.NDArray[np.int64], names: list[str]) -> pa.Table:
    """Return some rows, ascending and each once, of a Parquet file; decodes their row groups only."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        lengths = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        groups = np.searchsorted(starts, rows, side="right") - 1
        parts = []
        for group in np.unique(groups):
            table = file.read_row_group(int(group), columns=names)
            parts.append(table.take(pa.array(rows[groups == group] - starts[group])))
    return pa.concat_tables(parts)


def _checked_columns(columns: Sequence[str] | None) -> list[str]:
    if columns is None:
        return list(LATENT_STATS_SCHEMA.names)
    if isinstance(columns, str):
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"columns= is a list of names, got the one name {columns!r}: write [{columns!r}]",
        )
    for name in columns:
        if name not in LATENT_STATS_SCHEMA.names:
            known = ", ".join(LATENT_STATS_SCHEMA.names)
            raise InvalidInputError(
                ErrorKind.MISSING_COLUMN, f"statistics of latents have no column {name!r}, only {known}"
            )
    return list(dict.fromkeys(columns))


def _complete_postings(postings: Collection | None, id: str) -> Collection:
    if postings is None:
        raise NotFoundError(
            ErrorKind.COLLECTION_NOT_FOUND,
            f"codes {id!r} have no postings, and statistics of latents come with them: build them with actstore sae encode",
        )
    if not postings.is_sealed:
        n_units = len(postings.config["boundaries"]) - 1
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"postings {id!r} have {len(postings.units)} of {n_units} units and their statistics are not complete: "
            "run actstore sae encode again to finish them",
        )
    return postings


def _checked_schema(table: pa.Table, names: list[str]) -> pa.Table:
    expected = pa.schema([LATENT_STATS_SCHEMA.field(name) for name in names])
    if not table.schema.equals(expected):
        raise FormatError(
            ErrorKind.OBJECT_DAMAGED,
            f"a table of latent statistics should have the columns {expected}, found {table.schema}: see fsck",
        )
    return table
