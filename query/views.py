"""Where do the rows of each view come from? (What the views are, and their columns: `actstore.query.view_docs`.)

Views over manifests (runs, hook points, units, ...) are small Arrow tables made from the state. Views over stored Parquet
(`documents`, `tokens`, `pooled`, `latents`) are read by DuckDB from checked local files, so that filters and projections reach
the files. Views over codes are decoded as DuckDB asks for them (`actstore.query.code_views`).
Only what a query mentions is prepared.
"""

import itertools
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from actstore.corpus import FIXED_COLUMNS
from actstore.hook_points import parse_hook_point
from actstore.index_list import list_indexes
from actstore.log.values import Collection as StoredCollection
from actstore.names import hook_point_folder
from actstore.pooled_tables import pooled_column, pooled_objects
from actstore.store import Store

from .code_relations import CODE_STATE_VIEWS, CODE_VIEWS, Branches, Reads, code_branches
from .duck import quote_name, quote_text
from .view_docs import VIEWS


@dataclass(slots=True)
class Prepared:
    """What a connection needs for the views that one query mentions."""

    tables: dict[str, pa.Table] = field(default_factory=dict)
    views: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    nbytes: int = 0
    """Stored bytes of `files`."""

    sources: dict[str, Any] = field(default_factory=dict)
    """Relations that are decoded when they are read, see `actstore.query.code_views`."""

    reads: Reads = field(default_factory=Reads)
    """What reading them comes to."""


def prepare_views(store: Store, names: Collection[str], *, empty: bool) -> Prepared:
    """Return the named views of a store.

    Args:
        store: The store, at its version.
        names: Names out of `VIEWS`.
        empty: Only the columns and their types: nothing is read.
    """
    prepared = Prepared()
    for name in sorted(names):
        if name == "documents":
            _prepare_documents(store, prepared, empty=empty)
        elif name == "tokens":
            _prepare_tokens(store, prepared, empty=empty)
        elif name == "pooled":
            _prepare_pooled(store, prepared, empty=empty)
        elif name in CODE_VIEWS:
            _prepare_codes(store, prepared, name, empty=empty)
        else:
            rows = list(_STATE_VIEWS[name](store))
            prepared.tables[name] = pa.Table.from_pylist(rows, schema=VIEWS[name].schema)
    return prepared


def list_views() -> pa.Table:
    """Return the name and meaning of every view, as SHOW TABLES answers."""
    return pa.table(
        {"name": list(VIEWS), "meaning": [view.meaning for view in VIEWS.values()]},
        schema=pa.schema([("name", pa.string()), ("meaning", pa.string())]),
    )


def document_columns(store: Store) -> dict[str, set[str]]:
    """Return every metadata column of any corpus with the Arrow types it has."""
    found: dict[str, set[str]] = {}
    for corpus in store.corpora():
        for name, type_ in corpus.columns.items():
            if name not in FIXED_COLUMNS:
                found.setdefault(name, set()).add(type_)
    return found


def _prepare_documents(store: Store, prepared: Prepared, *, empty: bool) -> None:
    mixed = {
        name for name, types in document_columns(store).items() if len(types) > 1 and not _numeric(types)
    }
    branches = [_empty_branch("documents")]
    for corpus in store.corpora():
        objects = [unit.objects[0] for unit in corpus.parts]
        if not objects:
            continue
        files = store.objects.files(objects[:1] if empty else objects)
        prepared.files += files
        prepared.nbytes += 0 if empty else sum(obj.nbytes for obj in objects)
        stored = [name for name in corpus.columns if name not in FIXED_COLUMNS]
        metadata = [
            f"CAST({quote_name(c)} AS VARCHAR) AS {quote_name(c)}" if c in mixed else quote_name(c)
            for c in stored
        ]
        columns = ", ".join(["doc_id", "text", "source_key", *metadata])
        limit = " LIMIT 0" if empty else ""
        branches.append(
            f"(SELECT {quote_text(corpus.id)} AS corpus, {columns} FROM {_read_parquet(files)}{limit})"
        )
    prepared.views.append("CREATE VIEW documents AS " + " UNION ALL BY NAME ".join(branches))


def _numeric(types: Iterable[str]) -> bool:
    return all(t.rstrip("0123456789") in ("int", "uint", "float", "double") for t in types)


def _prepare_tokens(store: Store, prepared: Prepared, *, empty: bool) -> None:
    branches = [_empty_branch("tokens")]
    for tokenization in [] if empty else store.tokenizations():
        objects = [unit.objects[0] for unit in tokenization.units]
        if not objects:
            continue
        files = store.objects.files(objects)
        prepared.files += files
        prepared.nbytes += sum(obj.nbytes for obj in objects)
        token, join = "NULL::VARCHAR", ""
        if tokenization.collection.is_sealed:
            words = f"vocabulary {tokenization.id}"
            prepared.tables[words] = tokenization.vocabulary()
            token, join = "v.token", f" LEFT JOIN {quote_name(words)} v ON v.token_id = t.token_id"
        special = {"token": f"{token} AS token"}
        if not tokenization.has_roles:
            special["role"] = "NULL::VARCHAR AS role"
        columns = ", ".join(
            special.get(name, f"t.{name}")
            for name, *_ in VIEWS["tokens"].columns
            if name not in ("tokenization", "corpus")
        )
        branches.append(
            f"SELECT {quote_text(tokenization.id)} AS tokenization, {quote_text(tokenization.corpus.id)} AS corpus, "
            f"{columns} FROM {_read_parquet(files)} t{join}"
        )
    prepared.views.append("CREATE VIEW tokens AS " + " UNION ALL ".join(branches))


def _prepare_pooled(store: Store, prepared: Prepared, *, empty: bool) -> None:
    branches = [_empty_branch("pooled")]
    for run in [] if empty else store.runs():
        holders = [run.collection.units[u] for u in sorted(run.collection.units)]
        stored = [holder.objects for holder in (*holders, run.collection.seal) if holder is not None]
        objects = [o for of_holder in stored for o in pooled_objects(run.collection, of_holder)]
        if not objects or not run.poolings:
            continue
        files = store.objects.files(objects)
        prepared.files += files
        prepared.nbytes += sum(obj.nbytes for obj in objects)
        # Of the files, DuckDB opens those of the branches that a query's conditions leave, and reads only their columns.
        for hook_point, pooling in itertools.product(run.hook_points, run.poolings):
            columns = (quote_name(pooled_column(hook_point, part)) for part in ("n_tokens", pooling))
            named = (f"{quote_text(text)} AS {column}" for text, column in
                     ((run.id, "run"), (hook_point, "hook_point"), (pooling, "pooling")))  # fmt: skip
            n_tokens, vector = columns
            branches.append(
                f"SELECT {', '.join(named)}, doc_id, {n_tokens} AS n_tokens, {vector} AS vector FROM {_read_parquet(files)}"
            )
    prepared.views.append("CREATE VIEW pooled AS " + " UNION ALL ".join(branches))


def _prepare_codes(store: Store, prepared: Prepared, name: str, *, empty: bool) -> None:
    branches = Branches() if empty else code_branches(store, name, prepared.reads)
    prepared.sources |= branches.sources
    prepared.files += branches.files
    prepared.nbytes += branches.nbytes
    selects = " UNION ALL ".join([_empty_branch(name), *branches.selects])
    prepared.views.append(f"CREATE VIEW {name} AS {selects}")


def _read_parquet(files: Iterable[str]) -> str:
    return f"read_parquet([{', '.join(map(quote_text, files))}], hive_partitioning = false)"


def _empty_branch(name: str) -> str:
    columns = ", ".join(f"NULL::{type_} AS {quote_name(c)}" for c, type_, *_ in VIEWS[name].columns)
    return f"(SELECT {columns} WHERE false)"


def _nbytes(collection: StoredCollection, prefix: str) -> int:
    objects = [o for unit in collection.units.values() for o in unit.objects]
    return sum(o.nbytes for o in objects if o.key.startswith(prefix))


def _model_name(model: Mapping[str, Any]) -> str | None:
    for key in ("name", "architecture", "model_type", "class"):
        if model.get(key):
            return str(model[key])
    return None


def _runs(store: Store) -> Iterable[dict[str, Any]]:
    for run in store.runs():
        config, collection = run.config, run.collection
        tokenization = run.tokenization
        yield {
            "run": run.id,
            "model": _model_name(config["model"]),
            "model_source": collection.info.get("model_source"),
            "revision": config["model"].get("revision"),
            "tokenization": tokenization.id,
            "corpus": tokenization.corpus.id,
            "keep": ",".join(run.keep),
            **{key: config.get(key) for key in ("dtype", "compute_dtype", "codec", "attn_implementation")},
            "n_hook_points": len(run.hook_points),
            "n_rows": run.n_rows,
            "n_units": run.n_units,
            "n_units_planned": len(tokenization.units),
            "is_complete": run.is_complete,
            "nonfinite": collection.nonfinite,
            "nbytes": collection.nbytes,
            "created_version": collection.version,
            "fingerprint": collection.fingerprint,
            "config": json.dumps(config, sort_keys=True, default=dict),
        }


def _hook_points(store: Store) -> Iterable[dict[str, Any]]:
    for run in store.runs():
        for entry in run.config["hook_points"]:
            name = entry["name"]
            counts = (u.meta.get("nonfinite", {}).get(name, 0) for u in run.collection.units.values())
            yield {
                "run": run.id,
                "hook_point": name,
                "layer": parse_hook_point(name).layer,
                "d_model": entry["d_model"],
                "n_rows": run.n_rows,
                "nbytes": _nbytes(run.collection, f"runs/{run.id}/{hook_point_folder(name)}/"),
                "nonfinite": sum(counts),
            }


def _corpora(store: Store) -> Iterable[dict[str, Any]]:
    for corpus in store.corpora():
        collection = corpus.collection
        yield {
            "corpus": corpus.id,
            "n_documents": corpus.n_documents,
            "text_bytes": collection.config.get("text_bytes"),
            "n_parts": len(collection.units),
            "nbytes": collection.nbytes,
            "created_version": collection.version,
            "content_sha256": collection.config.get("content_sha256"),
            "columns": json.dumps(corpus.columns),
        }


def _tokenizations(store: Store) -> Iterable[dict[str, Any]]:
    for tokenization in store.tokenizations():
        collection = tokenization.collection
        shaping = ("window", "overlap", "add_special_tokens", "rows_per_unit", "tokenizer_sha256")
        yield {
            "tokenization": tokenization.id,
            "corpus": tokenization.corpus.id,
            **{key: collection.config.get(key) for key in shaping},
            "n_rows": collection.rows,
            "n_units": len(collection.units),
            "n_documents": collection.seal.meta.get("n_documents") if collection.seal else None,
            "is_complete": collection.is_sealed,
            "nbytes": collection.nbytes,
            "created_version": collection.version,
        }


def _units(store: Store) -> Iterable[dict[str, Any]]:
    for (kind, id_), collection in sorted(store.state.collections.items()):
        for unit in sorted(collection.units.values(), key=lambda u: u.unit):
            yield {
                "kind": kind,
                "id": id_,
                "unit": unit.unit,
                "rows": unit.rows,
                "nonfinite": unit.nonfinite,
                "nbytes": sum(o.nbytes for o in unit.objects),
                "version": unit.version,
            }


def _view_columns(store: Store) -> Iterable[dict[str, Any]]:
    for name, view in VIEWS.items():
        for column, type_, _, meaning in view.columns:
            yield {"view": name, "column_name": column, "column_type": type_, "meaning": meaning}
    for column, types in document_columns(store).items():
        meaning = f"metadata of the corpora, stored as {' or '.join(sorted(types))}"
        yield {"view": "documents", "column_name": column, "column_type": None, "meaning": meaning}


_STATE_VIEWS: dict[str, Callable[[Store], Iterable[dict[str, Any]]]] = {
    "runs": _runs,
    "hook_points": _hook_points,
    "corpora": _corpora,
    "tokenizations": _tokenizations,
    "indexes": list_indexes,
    "units": _units,
    "view_columns": _view_columns,
    **CODE_STATE_VIEWS,
}
