"""Is this text one harmless SELECT, and which views does it read?

DuckDB itself parses the text (`json_serialize_sql`), and the tree is walked with allow-lists: whatever is not known to be
harmless is refused, so a new kind of node in a new DuckDB is refused too. The gate is one of three walls; the connection
that runs the query can open only the files it needs, and its settings are locked (`actstore.query.duck`).
"""

import difflib
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from actstore.errors import ErrorKind, InvalidInputError

MAX_SQL_CHARS = 200_000
"""Longest text accepted; DuckDB's tree of it can be 100 times larger."""

_QUERY_NODES = frozenset({"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"})
_TABLE_REFS = frozenset(
    {"BASE_TABLE", "SUBQUERY", "JOIN", "TABLE_FUNCTION", "EXPRESSION_LIST", "EMPTY", "PIVOT", "SHOW_REF"}
)
_MODIFIERS = frozenset({"ORDER_MODIFIER", "LIMIT_MODIFIER", "LIMIT_PERCENT_MODIFIER", "DISTINCT_MODIFIER"})
_ORDERS = frozenset({"ASCENDING", "DESCENDING", "ORDER_DEFAULT"})
_EXPRESSIONS = frozenset(
    {
        "BETWEEN", "CASE", "CAST", "COLLATE", "COLUMN_REF", "COMPARISON", "CONJUNCTION", "CONSTANT", "FUNCTION", "LAMBDA",
        "OPERATOR", "PARAMETER", "POSITIONAL_REFERENCE", "STAR", "SUBQUERY", "TYPE", "WINDOW",
    }
)  # fmt: skip
_TABLE_FUNCTIONS = frozenset({"range", "generate_series", "unnest"})
_DENIED_FUNCTIONS = frozenset(
    {
        "current_setting", "getvariable", "getenv", "current_query", "write_log", "sleep_ms", "pg_sleep", "nextval",
        "currval", "setval", "pg_get_viewdef", "pg_get_constraintdef", "pg_get_expr", "json_serialize_plan",
        "json_execute_serialized_sql", "stats", "vector_type",
    }
)  # fmt: skip
"""Functions that show settings, file names or plans, write, or only wait."""

CHANCE_FUNCTIONS = frozenset({"random", "setseed", "uuid", "uuidv4", "uuidv7", "gen_random_uuid"})
"""Functions whose value changes from one evaluation to the next."""

_PLAIN_NAME = re.compile(r"\w{1,128}")
_TABLE_LISTS = frozenset({"tables", "__show_tables_expanded"})


@dataclass(slots=True)
class Checked:
    """What is known about a statement that passed the gate."""

    tree: dict[str, Any]
    """DuckDB's tree of the statement."""

    tables: set[str] = field(default_factory=set)
    """Names in FROM, in lower case, that are not common table expressions."""

    columns: set[str] = field(default_factory=set)
    """Last parts of all column names mentioned, in lower case; `*` when a star is."""

    functions: set[str] = field(default_factory=set)
    """Names of all functions called, in lower case."""

    lists_tables: bool = False
    """Whether it is SHOW TABLES."""

    describes: bool = False
    """Whether it is DESCRIBE or SHOW of a view or query: needs the columns' types, no rows."""


def check_statement(text: str, views: Collection[str]) -> Checked:
    """Return what `text` reads, if it is one SELECT (or DESCRIBE, SUMMARIZE, SHOW TABLES) over `views`.

    Raises:
        InvalidInputError: it does not parse, is more than one statement or not a SELECT, or names a table, function or
            construct that is not allowed. The message says which, and what is.
    """
    node = parse_statement(text)
    checked = Checked(node)
    ctes = {name.lower() for name in _cte_names(node)}
    for item in _walk(node):
        _check_item(item, checked)
    checked.tables -= ctes
    source = node.get("from_table") or {}
    if source.get("type") == "SHOW_REF":
        checked.lists_tables = source.get("table_name", "").strip('"') in _TABLE_LISTS
        checked.describes = not checked.lists_tables and source.get("show_type") in ("DESCRIBE", "SHOW")
    _check_tables(checked, views, ctes)
    return checked


def parse_statement(text: str) -> dict[str, Any]:
    """Return DuckDB's tree of the one SELECT in `text`.

    Raises:
        InvalidInputError: too long, does not parse, not one statement, or not a SELECT.
    """
    if not isinstance(text, str) or not text.strip():
        raise bad_sql(f"a query must be SQL text, got {text!r}")
    if len(text) > MAX_SQL_CHARS:
        raise bad_sql(f"the query has {len(text)} characters, at most {MAX_SQL_CHARS} are accepted")
    import duckdb

    with duckdb.connect(":memory:", config={"python_enable_replacements": "false", "threads": "1"}) as con:
        try:
            row = con.execute("SELECT json_serialize_sql(?::VARCHAR)", [text]).fetchall()[0]
        except (duckdb.Error, UnicodeError) as error:
            raise bad_sql(f"DuckDB cannot parse the query: {first_line(error)}") from error
    try:
        answer = json.loads(row[0])
    except (RecursionError, ValueError) as error:
        raise bad_sql("the query is nested too deeply: simplify it") from error
    if answer["error"] and answer.get("error_type") == "not implemented":
        raise bad_sql(
            "only SELECT is accepted (and DESCRIBE, SUMMARIZE, SHOW TABLES); a store is never changed by SQL"
        )
    if answer["error"]:
        where = f" at character {answer['position']}" if "position" in answer else ""
        raise bad_sql(f"DuckDB cannot parse the query: {answer['error_message'].splitlines()[0]}{where}")
    statements = answer["statements"]
    if len(statements) != 1:
        raise bad_sql(f"one statement is accepted, got {len(statements)}: send them one by one")
    node: dict[str, Any] = statements[0]["node"]
    return node


def bad_sql(message: str) -> InvalidInputError:
    """Return the error of a query that the caller can fix."""
    return InvalidInputError(ErrorKind.BAD_SQL, message)


def first_line(error: BaseException) -> str:
    """Return the first line of DuckDB's message, without its class name in front."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line.split("Error: ", 1)[-1]


def _walk(tree: Any) -> Iterator[dict[str, Any]]:
    # A loop, not recursion: the tree may be 1000 levels deep (DuckDB's max_expression_depth).
    stack = [tree]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            yield item
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


def _cte_names(tree: Any) -> Iterator[str]:
    for item in _walk(tree):
        for entry in (item.get("cte_map") or {}).get("map", ()):
            if not _PLAIN_NAME.fullmatch(entry["key"]):
                raise bad_sql(f"WITH name {entry['key']!r} may only hold letters, digits and _")
            yield entry["key"]


def _check_item(item: dict[str, Any], checked: Checked) -> None:
    if "info_type" in item:
        raise bad_sql(f"{item['info_type']} is not accepted: only SELECT is, also inside WITH")
    kind = item.get("type")
    if not isinstance(kind, str):
        return
    if "class" in item:
        _check_expression(item, checked)
    elif "cte_map" in item:
        if kind not in _QUERY_NODES:
            raise bad_sql(f"{kind.removesuffix('_NODE')} is not accepted: only SELECT is, also inside WITH")
    elif kind in _TABLE_REFS:
        _check_table_ref(kind, item, checked)
    elif kind not in _MODIFIERS and kind not in _ORDERS:
        raise bad_sql(f"{kind} is not accepted in a query")


def _check_expression(item: dict[str, Any], checked: Checked) -> None:
    if item["class"] not in _EXPRESSIONS:
        raise bad_sql(f"a {item['class']} expression is not accepted in a query")
    if item["class"] == "COLUMN_REF":
        checked.columns.add(str(item["column_names"][-1]).lower())
        # `t` alone may mean a whole table row, `t.x.y` a field of column x.
        checked.columns.update(str(name).lower() for name in item["column_names"])
    elif item["class"] == "STAR":
        checked.columns.add("*")
    elif item["class"] in ("FUNCTION", "WINDOW"):
        _check_function(item, checked)


def _check_function(item: dict[str, Any], checked: Checked) -> None:
    name = str(item.get("function_name", "")).lower()
    path = [part.lower() for part in (item.get("qualified_name") or {}).get("path", [])[:-1]]
    if set(path) - {"main", "system"} or item.get("schema") not in ("", "main", None):
        raise bad_sql(f"function {name!r} with a schema in front is not accepted: write the name alone")
    if name in _DENIED_FUNCTIONS or name.startswith("__internal"):
        raise bad_sql(f"function {name!r} is not accepted: it reaches outside the query")
    checked.functions.add(name)


def _check_table_ref(kind: str, item: dict[str, Any], checked: Checked) -> None:
    if kind == "BASE_TABLE":
        _check_base_table(item, checked)
    elif kind == "TABLE_FUNCTION":
        name = str(item["function"].get("function_name", "")).lower()
        if name not in _TABLE_FUNCTIONS:
            allowed = ", ".join(sorted(_TABLE_FUNCTIONS))
            raise bad_sql(
                f"table function {name!r} is not accepted, only {allowed} are: query the store's views"
            )
    elif kind == "SHOW_REF" and item.get("query") is None:
        name = item.get("table_name", "").strip('"')
        if item.get("show_type") == "SHOW":
            checked.tables.add(name.lower())
        elif name not in _TABLE_LISTS:
            raise bad_sql(f"SHOW {name} is not accepted: SHOW TABLES lists the views")


def _check_base_table(item: dict[str, Any], checked: Checked) -> None:
    name = str(item["table_name"])
    if item.get("at_clause") is not None:
        raise bad_sql("AT is not accepted: store.at(version).sql(...) asks an earlier version")
    if item.get("schema_name") or item.get("catalog_name"):
        raise bad_sql(f"table {name!r} with a schema in front is not accepted: write the view's name alone")
    checked.tables.add(name.lower())


def _check_tables(checked: Checked, views: Collection[str], ctes: Collection[str]) -> None:
    unknown = sorted(checked.tables - set(views))
    if unknown:
        near = difflib.get_close_matches(unknown[0], [*views, *ctes], n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise bad_sql(f"there is no view {unknown[0]!r}: {hint}The views are {', '.join(sorted(views))}")
    lists = any(i.get("type") == "SHOW_REF" and i.get("query") is None for i in _walk(checked.tree))
    if lists and not (checked.lists_tables or checked.describes):
        raise bad_sql("SHOW TABLES is accepted only as a whole statement")


def count_tables(tree: Any) -> int:
    """Return how many SELECTs a parsed statement consists of, those inside of others included."""
    stack, found = [tree], 0
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            found += "from_table" in item
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
    return found
