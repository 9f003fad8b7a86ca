"""How is a statement run so that it can read the prepared relations and nothing else, within limits?

A connection is in memory, lives for one question, may open exactly the files it was made for, cannot install or load
anything, cannot see Python variables, and its settings are locked and read back before the first statement runs.
DuckDB has no privilege boundary inside a process: its memory limit does not cover single huge values
(`repeat('x', 3000000000)`), so a service for strangers runs this in a process of its own with limits of its own.
"""

import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from actstore.errors import ErrorKind, InvalidInputError, StorageError

from .sql_gate import bad_sql, first_line

if TYPE_CHECKING:
    import duckdb

_BATCH_ROWS = 16_384


@dataclass(frozen=True, slots=True)
class Limits:
    """What one statement may use."""

    memory_bytes: int
    """DuckDB's own memory; beyond it, it spills to `spill_bytes` of private temporary files."""

    max_result_bytes: int
    """Size of the answer as Arrow."""

    timeout_s: float | None
    """Wall-clock seconds; None: no limit."""

    threads: int
    spill_bytes: int = 4 << 30


def quote_text(text: str) -> str:
    """Return an SQL string literal.

    >>> quote_text("it's")
    "'it''s'"
    """
    return "'" + text.replace("'", "''") + "'"


def quote_name(name: str) -> str:
    """Return an SQL identifier.

    >>> print(quote_name('a "b" c'))
    "a ""b"" c"
    """
    return '"' + name.replace('"', '""') + '"'


@contextmanager
def open_locked(
    files: Sequence[str],
    tables: Mapping[str, Any],
    views: Sequence[str],
    limits: Limits,
) -> Iterator["duckdb.DuckDBPyConnection"]:
    """Yield a connection that can read `files` and `tables` and nothing else; closes it and removes its temporary files.

    Args:
        files: Checked local files that `views` read.
        tables: Arrow tables, or datasets, to register by name.
        views: CREATE VIEW statements, run before the connection is locked.
        limits: Memory, threads and spill space.

    Raises:
        StorageError: a setting does not read back as it was set.
    """
    import duckdb  # here and below: questions that need no SQL start sooner without it

    spill = tempfile.mkdtemp(prefix="actstore-sql-")
    config = {
        "python_enable_replacements": "false",
        "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false",
        "allow_community_extensions": "false",
        "threads": str(limits.threads),
    }
    con = duckdb.connect(":memory:", config=config)
    try:
        settings = {
            "memory_limit": f"{max(1, limits.memory_bytes >> 20)}MiB",
            "temp_directory": spill,
            "max_temp_directory_size": f"{max(1, limits.spill_bytes >> 20)}MiB",
            "preserve_insertion_order": "true",
            "enable_progress_bar": "false",
            "TimeZone": "UTC",
        }
        for name, value in settings.items():
            con.execute(f"SET {name} = {quote_text(value)}")
        con.execute(f"SET allowed_paths = [{', '.join(map(quote_text, files))}]")
        for name, table in tables.items():
            con.register(name, table)
        for view in views:
            con.execute(view)
        con.execute("SET enable_external_access = false")
        con.execute("SET lock_configuration = true")
        _check_locked(con)
        yield con
    finally:
        con.close()
        shutil.rmtree(spill, ignore_errors=True)


def _check_locked(con: "duckdb.DuckDBPyConnection") -> None:
    wanted = {
        "enable_external_access": False,
        "lock_configuration": True,
        "python_enable_replacements": False,
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
    }
    row = con.execute("SELECT " + ", ".join(f"current_setting('{name}')" for name in wanted)).fetchall()[0]
    found = dict(zip(wanted, row, strict=True))
    if found != wanted:
        raise StorageError(
            ErrorKind.UNSAFE_STORE,
            f"DuckDB settings read back as {found}, not {wanted}: this DuckDB cannot be locked, use duckdb 2.x",
        )


def run_query(
    con: "duckdb.DuckDBPyConnection",
    text: str,
    params: Sequence[Any] | Mapping[str, Any] | None,
    limits: Limits,
    *,
    hide: Callable[[str], str],
) -> pa.Table:
    """Return the whole answer to a statement that passed the gate.

    Args:
        con: From `open_locked`.
        text: One SELECT.
        params: Values for `?`, `$1` (a sequence) or `$name` (a mapping); bound, never pasted.
        limits: Time and size of the answer.
        hide: Takes file names out of a message.

    Raises:
        InvalidInputError: DuckDB refuses the statement (BAD_SQL), the answer or its memory is too large (TOO_LARGE), or time
            is up (TIMED_OUT).
    """
    import duckdb

    late = threading.Event()

    def work() -> pa.Table:
        bound = None if params is None else dict(params) if isinstance(params, Mapping) else list(params)
        relation = con.sql(text, params=bound) if bound else con.sql(text)
        if relation is None:
            raise bad_sql("the statement gives no rows: only SELECT is accepted")
        return _drain(relation.to_arrow_reader(_BATCH_ROWS), limits, late)

    # On a thread of its own: inside DuckDB this thread would see no signal until the query ends.
    with ThreadPoolExecutor(1, thread_name_prefix="actstore-sql") as pool:
        answer = pool.submit(work)
        try:
            wait([answer], timeout=limits.timeout_s)
        finally:
            if not answer.done():
                late.set()
                _interrupt(con, answer)
        try:
            return answer.result()
        except (duckdb.Error, RuntimeError, OSError, pa.ArrowException) as error:
            raise _explain(error, limits, timed_out=late.is_set(), hide=hide) from None


def _interrupt(con: "duckdb.DuckDBPyConnection", answer: "Future[pa.Table]") -> None:
    """Stop what runs; again and again, as an interrupt between two steps of DuckDB is lost."""
    while not answer.done():
        con.interrupt()
        wait([answer], timeout=0.05)


def _drain(reader: pa.RecordBatchReader, limits: Limits, late: threading.Event) -> pa.Table:
    import duckdb

    batches, nbytes = [], 0
    for batch in reader:
        nbytes += batch.nbytes
        if nbytes > limits.max_result_bytes:
            raise InvalidInputError(
                ErrorKind.TOO_LARGE,
                f"the answer is larger than max_result_bytes={limits.max_result_bytes}: select fewer columns, add LIMIT, "
                "aggregate in SQL, or raise max_result_bytes",
            )
        if late.is_set():
            raise duckdb.InterruptException("time is up")
        batches.append(batch)
    return pa.Table.from_batches(batches, schema=reader.schema)


def _explain(
    error: Exception, limits: Limits, *, timed_out: bool, hide: Callable[[str], str]
) -> InvalidInputError:
    import duckdb

    text = hide(str(error))
    if (timed_out and "INTERRUPT" in text.upper()) or isinstance(error, duckdb.InterruptException):
        return InvalidInputError(
            ErrorKind.TIMED_OUT,
            f"the query was stopped after timeout_s={limits.timeout_s}: narrow it with WHERE, or raise timeout_s",
        )
    if isinstance(error, duckdb.OutOfMemoryException) or "Out of Memory" in text:
        return InvalidInputError(
            ErrorKind.TOO_LARGE,
            f"the query needs more than memory_bytes={limits.memory_bytes}: narrow it with WHERE, or raise memory_bytes",
        )
    lines = [line for line in text.splitlines() if line.strip()]
    lines[:1] = [first_line(RuntimeError(lines[0]))] if lines else [type(error).__name__]
    return bad_sql("DuckDB: " + "\n".join(lines[:8]))
