"""What do the SQL views over dictionaries and codes consist of? One branch per encoded run, and tables from the state.

The names of dictionary and run are constants of a branch, so DuckDB leaves out whole branches that a query's conditions on them
exclude.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import pyarrow as pa

from actstore.codes import Codes
from actstore.errors import ActstoreError
from actstore.latent_stats import LATENT_STATS_SCHEMA, stats_object
from actstore.store import Store

from .duck import quote_name, quote_text
from .latent_filter import has_statistics

CODE_VIEWS: Final = ("latents", "codes", "postings", "pooled_codes")
"""Views with a branch per encoded run."""

CODES_SCHEMA: Final = pa.schema([("row", pa.int64()), ("latent", pa.int32()), ("value", pa.float32())])
POOLED_SCHEMA: Final = pa.schema(
    [
        ("doc_id", pa.int64()),
        ("latent", pa.int32()),
        ("max", pa.float32()),
        ("mean", pa.float64()),
        ("sum", pa.float64()),
        ("count", pa.int64()),
    ]
)


@dataclass(slots=True)
class Reads:
    """What the sources of one query read, and what went wrong there: DuckDB would only pass on an error's text."""

    objects: dict[str, int] = field(default_factory=dict)
    """Stored bytes of every object that was opened."""

    error: ActstoreError | None = None

    def note(self, key: str, nbytes: int) -> None:
        """Count an object once, however often it is read."""
        self.objects[key] = nbytes

    @property
    def nbytes(self) -> int:
        """Stored bytes of all of them."""
        return sum(self.objects.values())


@dataclass(slots=True)
class Branches:
    """The parts of a view, and what they read."""

    selects: list[str] = field(default_factory=list)
    """SELECT statements with the view's columns in order."""

    sources: dict[str, Any] = field(default_factory=dict)
    """Relations to register, by the name that the statements call them."""

    files: list[str] = field(default_factory=list)
    nbytes: int = 0
    """Stored bytes of `files`."""


def code_branches(store: Store, view: str, reads: Reads) -> Branches:
    """Return the branches of one of `CODE_VIEWS`; of codes nothing is read before the query asks.

    Args:
        store: The store, at its version.
        view: Name of the view.
        reads: Where the sources report to.

    Raises:
        FormatError: the manifest's entry of some codes is damaged.
    """
    # Here, as pyarrow's datasets bring pandas along where it is installed.
    from .code_views import CodeRows, PooledCodeRows

    branches = Branches()
    for codes in all_codes(store):
        if view == "latents":
            _add_latents(branches, store, codes)
        elif view == "pooled_codes":
            if any("pooled" in unit.meta for unit in codes.collection.units.values()):
                n_documents = codes.run.tokenization.corpus.n_documents
                _add_source(
                    branches, view, codes, PooledCodeRows(codes, n_documents, reads), POOLED_SCHEMA.names
                )
        elif view == "codes" or has_statistics(codes):
            _add_source(branches, view, codes, CodeRows(codes, reads), CODES_SCHEMA.names)
    return branches


def all_codes(store: Store) -> list[Codes]:
    """Return the codes of every encoded run, in the order of their ids."""
    found = []
    for (kind, _), collection in sorted(store.state.collections.items()):
        if kind == "codes":
            found.append(Codes(store.run(str(collection.config["run"])), collection))
    return found


def _add_source(branches: Branches, view: str, codes: Codes, source: Any, columns: Iterable[str]) -> None:
    # Users' names have no blank in them: what is registered cannot hide a view or be named by a query.
    name = f"{view} {codes.id}"
    branches.sources[name] = source
    # Row numbers are a tokenization's: without its name, a join with `tokens` would match those of others.
    of_rows = f", {quote_text(codes.run.tokenization.id)} AS tokenization" if view != "pooled_codes" else ""
    branches.selects.append(f"{_select(codes, columns)}{of_rows} FROM {quote_name(name)}")


def _add_latents(branches: Branches, store: Store, codes: Codes) -> None:
    postings = store.state.collections.get(("postings", codes.id))
    if postings is None or not postings.units:
        return
    objects = [stats_object(postings, postings.units[u]) for u in sorted(postings.units)]
    files = store.objects.files(objects)
    branches.files += files
    branches.nbytes += sum(obj.nbytes for obj in objects)
    listed = ", ".join(map(quote_text, files))
    branches.selects.append(
        f"{_select(codes, LATENT_STATS_SCHEMA.names)} FROM read_parquet([{listed}], hive_partitioning = false)"
    )


def _select(codes: Codes, columns: Iterable[str]) -> str:
    named = ", ".join(map(quote_name, columns))
    return f"SELECT {quote_text(codes.dictionary)} AS dictionary, {quote_text(codes.run.id)} AS run, {named}"


def _dictionaries(store: Store) -> Iterable[dict[str, Any]]:
    for dictionary in store.dictionaries():
        collection, config = dictionary.collection, dictionary.config
        source = config.get("source") or {}
        yield {
            "dictionary": dictionary.id,
            "kind": dictionary.kind,
            "activation": dictionary.activation,
            "n_latents": dictionary.n_latents,
            "d_in": dictionary.d_in,
            "d_out": dictionary.d_out,
            "k": None if dictionary.k is None else float(dictionary.k),
            "hook_point": dictionary.hook_point,
            "hook_point_out": dictionary.hook_point_out,
            "source": source.get("format") if isinstance(source, dict) else str(source),
            "is_complete": collection.is_sealed,
            "nbytes": collection.nbytes,
            "created_version": collection.version,
            "fingerprint": collection.fingerprint,
            "config": json.dumps(config, sort_keys=True, default=dict),
        }


def _encodings(store: Store) -> Iterable[dict[str, Any]]:
    for codes in all_codes(store):
        postings = store.state.collections.get(("postings", codes.id))
        yield {
            "dictionary": codes.dictionary,
            "run": codes.run.id,
            "hook_point": codes.hook_point,
            "tokenization": codes.run.tokenization.id,
            "value_dtype": codes.value_dtype,
            "n_latents": codes.n_latents,
            "n_rows": codes.n_rows,
            "n_codes": codes.n_codes,
            "is_complete": codes.is_complete,
            "has_postings": has_statistics(codes),
            "nbytes": codes.collection.nbytes + (0 if postings is None else postings.nbytes),
            "created_version": codes.collection.version,
        }


CODE_STATE_VIEWS: dict[str, Callable[[Store], Iterable[dict[str, Any]]]] = {
    "dictionaries": _dictionaries,
    "encodings": _encodings,
}
