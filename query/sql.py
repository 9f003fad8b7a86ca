"""What does a store answer to a SELECT?

    sql(store, "SELECT run, n_rows FROM runs WHERE is_complete")

The text passes `actstore.query.sql_gate`, the views it mentions are prepared by `actstore.query.views`, and
`actstore.query.duck` runs it on a connection of its own that can reach nothing else.
"""

import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from actstore.checks import MAX_BYTES, check_whole
from actstore.errors import ErrorKind, InvalidInputError
from actstore.result import Meta, Result
from actstore.store import Store

from .duck import Limits, open_locked, run_query
from .sql_gate import bad_sql, check_statement
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
    values = _plain_params(params)
    checked = check_statement(query, VIEWS)
    prepared = Prepared()
    if checked.lists_tables:
        table = list_views()
    else:
        prepared = prepare_views(store, checked.tables, empty=checked.describes)
        relations = {**prepared.tables, **prepared.sources}
        with open_locked(prepared.files, relations, prepared.views, limits) as con:
            try:
                table = run_query(con, query, values, limits, hide=_hider(prepared.files))
            except InvalidInputError:
                # DuckDB passes on only the text of what went wrong in a relation that is decoded for it.
                if prepared.reads.error is not None:
                    raise prepared.reads.error from None
                raise
    table = _plain_table(table)
    budget = {"memory_bytes": memory_bytes, "max_result_bytes": max_result_bytes, "timeout_s": timeout_s}
    meta = Meta(
        version=store.version,
        recall=None,
        n_returned=table.num_rows,
        bytes_read=prepared.nbytes + prepared.reads.nbytes,
        request={"verb": "sql", "query": query, "n_params": len(values or ())},
        budget=budget,
        elapsed_s=time.perf_counter() - start,
    )
    return Result(table, meta)


def _limits(memory_bytes: int, max_result_bytes: int, timeout_s: float | None, threads: int | None) -> Limits:
    number = isinstance(timeout_s, (int, float, np.integer, np.floating)) and not isinstance(timeout_s, bool)
    if timeout_s is not None and not (number and 0 < timeout_s <= threading.TIMEOUT_MAX):
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT, f"timeout_s must be a positive number of seconds, got {timeout_s!r:.80}"
        )
    if threads is not None:
        threads = check_whole(threads, what="threads", least=1, most=1024)
    return Limits(
        memory_bytes=check_whole(memory_bytes, what="memory_bytes", least=1 << 20, most=MAX_BYTES),
        max_result_bytes=check_whole(
            max_result_bytes, what="max_result_bytes", least=1 << 20, most=MAX_BYTES
        ),
        timeout_s=timeout_s,
        threads=threads or os.cpu_count() or 1,
    )


def _plain_params(params: Sequence[Any] | Mapping[str, Any] | None) -> list[Any] | dict[str, Any] | None:
    """Return parameters as DuckDB takes them: numpy's scalars become Python's."""
    if params is None:
        return None
    if isinstance(params, Mapping):
        return {name: _plain_param(value) for name, value in params.items()}
    if isinstance(params, str | bytes) or not isinstance(params, Iterable):
        raise bad_sql(
            f"params= is a list of values for the ? of the query, or a mapping for $name, got {params!r:.80}"
        )
    return [_plain_param(value) for value in params]


def _plain_param(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


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
