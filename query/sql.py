"""What does a store answer to a SELECT?

    sql(store, "SELECT run, n_rows FROM runs WHERE is_complete")

The text passes `actstore.query.sql_gate`, the views it mentions are prepared by `actstore.query.views`, and
`actstore.query.duck` runs it on a connection of its own that can reach nothing else.
"""

import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from actstore.errors import ErrorKind, InvalidInputError
from actstore.result import Meta, Result
from actstore.store import Store

from .duck import Limits, open_locked, run_query
from .sql_gate import check_statement
from .view_docs import VIEWS
from .views import Prepared, list_views, prepare_views

_HUGEINT = pa.decimal128(38, 0)
_ANY_PATH = re.compile(r"(?<![\w.])(?:/[\w.@~=+-]+){2,}")


def sql(
    store: Store,
    query: str,
    params: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    memory_bytes: int = 512 << 20,
    max_result_bytes: int = 256 << 20,
    timeout_s: float | None = None,
    threads: int | None = None,
) -> Result:
    """Return the answer to one SELECT over the store's views.

    `SHOW TABLES` lists the views, `DESCRIBE <view>` their columns, `SELECT * FROM view_columns` what the columns mean.
    Nothing in the store, on the disk or on the network can be changed or read by a query besides the views. Whole numbers
    too large for int64 come back as decimals; of columns with the same name all but the first get `_1`, `_2`, ...

    Args:
        store: The store; answers come from exactly its version.
        query: One SELECT (set operations, WITH, WITH RECURSIVE included), DESCRIBE, SUMMARIZE or SHOW TABLES, in DuckDB's
            dialect.
        params: Values for `?` or `$1` (a sequence) or `$name` (a mapping): never paste values into the text.
        memory_bytes: Memory of DuckDB for this query; more is spilled to temporary files. Single huge values
            (`repeat('x', 1000000000)`) are not counted by DuckDB.
        max_result_bytes: Largest answer, as Arrow.
        timeout_s: Wall-clock limit; None for none.
        threads: Threads of DuckDB; None lets it use every core.

    Raises:
        InvalidInputError: BAD_SQL: not one SELECT over the views, or DuckDB refuses it. TOO_LARGE: the answer or the memory
            it needs. TIMED_OUT.
        FormatError: a stored table that the query reads is missing or damaged.
    """
    start = time.perf_counter()
    limits = _limits(memory_bytes, max_result_bytes, timeout_s, threads)
    checked = check_statement(query, VIEWS)
    prepared = Prepared()
    if checked.lists_tables:
        table = list_views()
    else:
        prepared = prepare_views(store, checked.tables, empty=checked.describes)
        with open_locked(prepared.files, prepared.tables, prepared.views, limits) as con:
            table = run_query(con, query, params, limits, hide=_hider(prepared.files))
    table = _plain_table(table)
    budget = {"memory_bytes": memory_bytes, "max_result_bytes": max_result_bytes, "timeout_s": timeout_s}
    meta = Meta(
        version=store.version,
        recall=None,
        n_returned=table.num_rows,
        bytes_read=prepared.nbytes,
        request={"verb": "sql", "query": query, "n_params": len(params or ())},
        budget=budget,
        elapsed_s=time.perf_counter() - start,
    )
    return Result(table, meta)


def _limits(memory_bytes: int, max_result_bytes: int, timeout_s: float | None, threads: int | None) -> Limits:
    for name, value in (("memory_bytes", memory_bytes), ("max_result_bytes", max_result_bytes)):
        if value < 1 << 20:
            raise InvalidInputError(ErrorKind.BAD_ARGUMENT, f"{name} must be at least 1 MiB, got {value}")
    if timeout_s is not None and not 0 < timeout_s <= threading.TIMEOUT_MAX:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT, f"timeout_s must be a positive number, got {timeout_s!r}"
        )
    if threads is not None and not 1 <= threads <= 1024:
        raise InvalidInputError(ErrorKind.BAD_ARGUMENT, f"threads must be 1 to 1024, got {threads!r}")
    return Limits(
        memory_bytes=memory_bytes,
        max_result_bytes=max_result_bytes,
        timeout_s=timeout_s,
        threads=threads or os.cpu_count() or 1,
    )


def _hider(files: Sequence[str]) -> Callable[[str], str]:
    def hide(message: str) -> str:
        for path in sorted(files, key=len, reverse=True):
            message = message.replace(path, "(stored table)")
        return _ANY_PATH.sub("(path)", message)

    return hide


def _plain_table(table: pa.Table) -> pa.Table:
    """Return the table with unique column names, and hugeint columns (sums of bigints) as int64 where they fit."""
    for i, field in enumerate(table.schema):
        if field.type == _HUGEINT:
            try:
                whole = pc.cast(table.column(i), pa.int64())
            except pa.ArrowInvalid:
                continue
            table = table.set_column(i, field.with_type(pa.int64()), whole)
    names: list[str] = []
    taken = set(table.column_names)
    for name in table.column_names:
        unique, n = name, 0
        while unique in names or (n and unique in taken):
            n += 1
            unique = f"{name}_{n}"
        names.append(unique)
    return table.rename_columns(names)
