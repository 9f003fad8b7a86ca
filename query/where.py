"""Which tokens, or which documents, does a user's WHERE keep? A predicate over one of them, evaluated a unit at a time.

That of a token sees one flat row per token: all columns of `tokens`, then all columns of the token's document; a document's
column whose name a token has too is `document_<name>`. It runs in DuckDB over one unit's tokens and only the documents and
columns that it mentions, so memory is bounded by a unit. That of a document sees the document's columns under their own names.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from actstore.arrow_arrays import to_array
from actstore.corpus import DOC_ID, Corpus
from actstore.errors import InvalidInputError
from actstore.tokenization import Tokenization

from .duck import Limits, open_locked, quote_name, run_query
from .sql_gate import CHANCE_FUNCTIONS, Checked, bad_sql, check_statement, count_tables

_INPUT = "tokens"
_MORE_COLUMNS = ("token", "tokenization", "corpus")

_BATCH_DOCUMENTS = 4096
"""Documents of which a predicate sees the columns at a time; with their text, a few megabytes."""


def check_condition(where: str) -> None:
    """Check that a condition is a text at all, which costs nothing.

    Raises:
        InvalidInputError: something else, or blank.
    """
    if not isinstance(where, str) or not where.strip():
        raise bad_sql(
            f"where= must be an SQL condition like \"source = 'web' AND position > 3\", got {where!r:.80}"
        )


def check_predicate(where: str) -> Checked:
    """Return what a predicate mentions, if it is one expression over one token and its document.

    Raises:
        InvalidInputError: not an expression, holds a subquery over tables, depends on chance, or smuggles in clauses.
    """
    check_condition(where)
    try:
        checked = check_statement(_statement(where), {_INPUT})
    except InvalidInputError as error:
        raise _about(where, error) from error
    tree = checked.tree
    extras = ("modifiers", "group_expressions", "group_sets", "having", "qualify", "sample")
    plain = (
        tree["type"] == "SELECT_NODE"
        and tree["from_table"]["type"] == "BASE_TABLE"
        and not any(tree.get(key) for key in extras)
        and not tree["cte_map"]["map"]
    )
    if not plain:
        raise bad_sql(
            "where= must be one condition, without ORDER BY, LIMIT, GROUP BY, UNION or a second statement"
        )
    if count_tables(tree) != 1:
        raise bad_sql("where= may not hold a SELECT: find rows with store.sql(...) and pass them as rows=")
    chance = sorted(checked.functions & CHANCE_FUNCTIONS)
    if chance:
        raise bad_sql(f"where= may not use {chance[0]}(): take a repeatable sample with hash(row) % 100 = 0")
    return checked


class Predicate:
    """A checked predicate, ready to be asked about the units of a tokenization. Close it after use."""

    def __init__(self, where: str, tokenization: Tokenization, *, memory_bytes: int) -> None:
        """Check `where` against the columns there are; reads the vocabulary if it mentions `token`.

        Raises:
            InvalidInputError: BAD_SQL: not a condition, or an unknown column (the message lists near ones).
        """
        self.where = where
        mentioned = check_predicate(where).columns
        self._everything = "*" in mentioned
        self._tokenization = tokenization
        self._token_columns = (*tokenization.schema.names, *_MORE_COLUMNS)
        self._limits = Limits(memory_bytes=memory_bytes, max_result_bytes=1 << 30, timeout_s=None, threads=1)
        self._document_columns = self._choose_document_columns(tokenization.corpus, mentioned)
        self._vocabulary = tokenization.vocabulary() if self._everything or "token" in mentioned else None
        self._stack = ExitStack()
        tables = {} if self._vocabulary is None else {"vocabulary": self._vocabulary}
        self._con = self._stack.enter_context(open_locked([], tables, [], self._limits))
        self._check_columns()

    def __enter__(self) -> "Predicate":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def mask(self, unit_table: pa.Table) -> npt.NDArray[np.bool_]:
        """Return which rows of one unit's token table the predicate keeps; an unknown (NULL) is not kept."""
        documents = None
        if self._document_columns:
            doc_ids = np.unique(unit_table[DOC_ID].to_numpy())
            stored = [name for name, _ in self._document_columns]
            documents = self._tokenization.corpus.documents(doc_ids.tolist(), stored)
        kept = self._run(unit_table, documents)
        return np.isin(unit_table["row"].to_numpy(), kept)

    def _choose_document_columns(self, corpus: Corpus, mentioned: set[str]) -> list[tuple[str, str]]:
        chosen = []
        for name in corpus.columns:
            if name == DOC_ID:
                continue
            shown = f"document_{name}" if name.lower() in self._token_columns else name
            if self._everything or shown.lower() in mentioned:
                chosen.append((name, shown))
        return chosen

    def _check_columns(self) -> None:
        # Against no rows: an unknown column is told before anything large is read, and also when nothing matches.
        corpus = self._tokenization.corpus
        documents = None
        if self._document_columns:
            documents = corpus.documents([0], [name for name, _ in self._document_columns]).slice(0, 0)
        try:
            self._run(self._tokenization.schema.empty_table(), documents)
        except InvalidInputError as error:
            if "not found in FROM" not in str(error):
                raise
            shown = [
                f"document_{n}" if n.lower() in self._token_columns else n
                for n in corpus.columns
                if n != DOC_ID
            ]
            raise bad_sql(
                f"where={self.where!r} names a column that neither tokens nor documents have; there are: "
                f"{', '.join([*self._token_columns, *shown])}"
            ) from error

    def _run(self, unit_table: pa.Table, documents: pa.Table | None) -> npt.NDArray[np.int64]:
        con, tokenization = self._con, self._tokenization
        con.register("unit_tokens", unit_table)
        columns = [f"t.{name}" for name in tokenization.schema.names]
        columns.append("NULL::VARCHAR AS token" if self._vocabulary is None else "v.token")
        joins = "" if self._vocabulary is None else " LEFT JOIN vocabulary v ON v.token_id = t.token_id"
        if documents is not None:
            con.register("unit_documents", documents)
            columns += [f"d.{quote_name(n)} AS {quote_name(shown)}" for n, shown in self._document_columns]
            joins += " LEFT JOIN unit_documents d ON d.doc_id = t.doc_id"
        names = f"'{tokenization.id}' AS tokenization, '{tokenization.corpus.id}' AS corpus"
        con.execute(
            f"CREATE OR REPLACE TEMP VIEW {_INPUT} AS SELECT {', '.join(columns)}, {names} FROM unit_tokens t{joins}"
        )
        try:
            table = run_query(con, _statement(self.where), None, self._limits, hide=lambda message: message)
        except InvalidInputError as error:
            raise _about(self.where, error) from error
        rows: npt.NDArray[np.int64] = table["row"].to_numpy()
        return rows


def keep_documents(where: str, corpus: Corpus, *, memory_bytes: int) -> npt.NDArray[np.bool_]:
    """Return which documents of a corpus a predicate over their columns keeps, shape (n_documents,); an unknown is not kept.

    Reads the columns that it mentions of every document, some row groups at a time.

    Raises:
        InvalidInputError: BAD_SQL: not a condition, or an unknown column (the message lists those there are).
        FormatError: a part is missing or damaged.
    """
    mentioned = check_predicate(where).columns
    stored = [n for n in corpus.columns if n == DOC_ID or "*" in mentioned or n.lower() in mentioned]
    limits = Limits(memory_bytes=memory_bytes, max_result_bytes=1 << 30, timeout_s=None, threads=1)
    keep = np.zeros(corpus.n_documents, np.bool_)
    with open_locked([], {}, [], limits) as con:
        for table in _document_tables(corpus, stored):
            # To register a table under a name again replaces it.
            con.register(_INPUT, table)
            try:
                found = run_query(con, _statement(where, DOC_ID), None, limits, hide=lambda message: message)
            except InvalidInputError as error:
                if "not found in FROM" not in str(error):
                    raise _about(where, error, DOC_ID) from error
                raise bad_sql(
                    f"where={where!r} names a column that documents lack; there are: {', '.join(corpus.columns)}"
                ) from error
            keep[to_array(found[DOC_ID])] = True
    return keep


def _document_tables(corpus: Corpus, columns: list[str]) -> Iterator[pa.Table]:
    """Yield columns of all documents, after a table of none: what is wrong with a predicate is told before much is read."""
    for number, path in enumerate(corpus.part_paths()):
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if number == 0:
                yield file.schema_arrow.empty_table().select(columns)
            for batch in file.iter_batches(_BATCH_DOCUMENTS, columns=columns, use_threads=False):
                yield pa.Table.from_batches([batch])


def _about(where: str, error: InvalidInputError, wanted: str = "row") -> InvalidInputError:
    """Return the error of the statement that `where` was put into, told as one of `where` alone."""
    text, place, at = error.message.partition(" at character ")
    offset = int(at) - _statement("", wanted).index("\n") - 1 if at.isdigit() else 0
    if place and offset >= len(where):
        text = "it ends in the middle of an expression"
    elif place:
        text = f"{text} at its character {offset}"
    return InvalidInputError(error.kind, f"where={where!r:.200} cannot be evaluated: {text}")


def _statement(where: str, wanted: str = "row") -> str:
    # The line breaks keep a comment at the end of the predicate from swallowing the bracket.
    return f'SELECT "{wanted}" FROM {_INPUT} WHERE (\n{where}\n)'
