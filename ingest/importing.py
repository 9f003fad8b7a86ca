"""How does a source of documents become a corpus of the store? (FORMAT.md, section 7)

The source is read once, to its end, into a local spool; only then is anything written to the store, and one commit makes
the corpus visible. So an error or a crash at any moment leaves no corpus and no half of one; running again works. Importing
the same documents under the same name again changes nothing and says so.
"""

import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.corpus import DOC_ID
from actstore.errors import ConflictError, ErrorKind, InvalidInputError, NotFoundError
from actstore.log import fingerprint
from actstore.log.values import Add, Collection, Create, Seal
from actstore.names import check_name
from actstore.store import Store, open_store

from .ahead import map_ahead
from .columns import ColumnNames
from .content_hash import TableHasher
from .corpus_parts import WrittenPart, describe_part, make_add, number_documents, split_parts, write_part
from .documents import Layout, check_columns, check_text_type, make_documents, missing_column
from .progress import Progress, ProgressCallback
from .records import BadDocumentPolicy, BadDocuments, ReadOptions, Source
from .sources import open_source
from .spool import Spool

MAX_DOCUMENT_BYTES = 64 << 20
PART_BYTES = 64 << 20
_WRITERS = 3
_ID_SUFFIX = 11
"""Characters that a tokenization's id adds to its corpus's name."""

_MAX_NAME = 64 - _ID_SUFFIX


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What an import did."""

    name: str
    n_documents: int
    n_bytes: int
    """UTF-8 bytes of all texts."""
    n_empty: int
    """Documents without a character that is not white space; they are kept."""
    n_duplicates: int
    """Documents whose text an earlier document has; dropped if so asked, else kept."""
    n_skipped: int
    """Records that could not be documents, under on_bad_document="skip"."""
    n_parts: int
    renamed: Mapping[str, str]
    """Stored name of each source column that could not keep its own."""
    warnings: tuple[str, ...]
    version: int
    """Store version that has the corpus."""
    is_new: bool
    """False if the store already had exactly these documents under this name."""


@dataclass(frozen=True, slots=True)
class _Content:
    """The corpus's identity, and where its documents were written."""

    config: dict[str, Any]
    adds: list[Add] = field(default_factory=list)


def import_corpus(
    store: Store | str | os.PathLike[str],
    name: str,
    source: Any,
    *,
    text_column: str = "text",
    source_format: str | None = None,
    split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
    id_column: str | None = None,
    columns: Sequence[str] | None = None,
    rename: Mapping[str, str] | None = None,
    stringify: Sequence[str] = (),
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
    on_bad_document: BadDocumentPolicy = "error",
    duplicates: Literal["report", "drop"] = "report",
    part_bytes: int = PART_BYTES,
    spool_dir: str | os.PathLike[str] | None = None,
    progress: ProgressCallback | None = None,
) -> ImportReport:
    """Make a corpus of the store out of documents, and return what was found.

    Streams: memory is a few batches and parts, plus 16 bytes per document (24 more while duplicates are looked for at the
    end). Needs local disk for the compressed text meanwhile. Idempotent: one commit, and the same documents again are no
    change. Writes one object per `part_bytes` of text.

    Args:
        store: The store, or where it is (made if absent).
        name: The corpus's name, at most 53 characters.
        source: What `actstore.ingest.sources.open_source` takes: path, glob, URL, hub name, dataset, table or iterable.
        text_column: The source's column that holds the text.
        source_format: `jsonl`, `parquet`, `text` or `hub`; None finds out.
        split: Split of a Hugging Face dataset.
        subset: Subset (configuration) of a hub dataset.
        revision: Branch, tag or commit of a hub dataset.
        id_column: Column that becomes `source_key`; None for file and line.
        columns: Metadata columns to keep, None for all. JSONL and Python records get the narrowest types that hold all.
        rename: New names of metadata columns.
        stringify: Columns to store as text: strings as they are, all else as JSON.
        max_document_bytes: A larger document is a bad one.
        on_bad_document: "error" stops at a record that cannot be a document, "skip" leaves it out and counts it.
        duplicates: "report" counts documents whose text came before, "drop" also leaves them out.
        part_bytes: Text per stored Parquet part.
        spool_dir: Folder for temporary files, default the system's.
        progress: Called with `Progress` as documents are read and written.

    Raises:
        NotFoundError: there is nothing at the source.
        InvalidInputError: no such column, a bad document, columns of mixed types, or no document at all.
        ConflictError: the store has other documents under this name.
        StorageError: the store cannot be written, or the temporary folder is full.

    >>> import_corpus("memory://doctest-import", "hello", ["Hello, world.", "Hello again."]).n_documents
    2
    """
    check_corpus_name(name)
    _check_arguments(on_bad_document, duplicates, max_document_bytes, part_bytes)
    kept, texts = None if columns is None else tuple(columns), frozenset(stringify)
    layout = Layout(text_column, id_column, kept, texts, max_document_bytes, ColumnNames(rename))
    options = ReadOptions(text_column, _wanted(layout), max_document_bytes)
    opened = open_source(
        source, options=options, source_format=source_format, split=split, subset=subset, revision=revision
    )
    _check_schema(opened, layout)
    store = open_store(store, create=True) if isinstance(store, str | os.PathLike) else store
    with Spool(spool_dir) as spool:
        job = _Import(opened, layout, BadDocuments(on_bad_document), spool, duplicates, progress)
        return job.run(store, name, rename or {}, part_bytes)


def _check_schema(source: Source, layout: Layout) -> None:
    if source.schema is not None:
        check_columns(source.schema.names, layout, where=source.description)
        check_text_type(source.schema, layout.text_column, where=source.description)


@dataclass(frozen=True, slots=True)
class _Import:
    """Reads a source into a spool, and makes a corpus of what is there."""

    source: Source
    layout: Layout
    bad: BadDocuments
    spool: Spool
    duplicates: str
    progress: ProgressCallback | None

    def run(self, store: Store, name: str, rename: Mapping[str, str], part_bytes: int) -> ImportReport:
        spool = self.spool
        _read(self.source, self.layout, self.bad, spool, rename, self.progress)
        renamed = self.layout.names.renamed  # complete only now
        first = spool.first_occurrences()
        keep = first if self.duplicates == "drop" else np.ones(len(first), bool)
        publication = _Publication(store, name, spool, keep, part_bytes, self.progress)
        info = {
            "source": self.source.description,
            "text_column": self.layout.text_column,
            "duplicates": self.duplicates,
        }
        meta = {
            "n_empty": spool.n_empty,
            "n_duplicates": int((~first).sum()),
            "n_skipped": self.bad.n_skipped,
        }
        content, version = publication.run(info, {**meta, "renamed": renamed})
        warnings = _content_warnings(spool, meta, self.duplicates)
        return ImportReport(
            name=name,
            n_documents=int(content.config["n_documents"]),
            n_bytes=int(content.config["text_bytes"]),
            **meta,
            n_parts=len(store.state.collection("corpus", name).units),
            renamed=renamed,
            warnings=(*self.source.warnings, *self.bad.warnings(), *warnings),
            version=version,
            is_new=bool(content.adds),
        )


def check_corpus_name(name: str) -> str:
    """Return `name` if it may name a corpus.

    Raises:
        InvalidInputError: not a name, or too long for the ids derived from it.
    """
    check_name(name, what="corpus name")
    if len(name) > _MAX_NAME:
        raise InvalidInputError(
            ErrorKind.BAD_NAME,
            f"corpus name {name!r} has {len(name)} characters, more than {_MAX_NAME}: ids of its tokenizations add "
            f"{_ID_SUFFIX}; choose a shorter name",
        )
    return name


def _check_arguments(on_bad_document: str, duplicates: str, max_document_bytes: int, part_bytes: int) -> None:
    for argument, value, choices in (
        ("on_bad_document", on_bad_document, ("error", "skip")),
        ("duplicates", duplicates, ("report", "drop")),
    ):
        if value not in choices:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT, f"{argument} must be {' or '.join(map(repr, choices))}, got {value!r}"
            )
    if not 1 <= max_document_bytes < 1 << 31:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT, f"max_document_bytes must be in [1, 2**31), got {max_document_bytes!r}"
        )
    if part_bytes < 1:
        raise InvalidInputError(ErrorKind.BAD_ARGUMENT, f"part_bytes must be at least 1, got {part_bytes!r}")


def _wanted(layout: Layout) -> frozenset[str] | None:
    if layout.columns is None:
        return None
    return frozenset(
        {*layout.columns, layout.text_column} | ({layout.id_column} if layout.id_column else set())
    )


def _read(
    source: Source,
    layout: Layout,
    bad: BadDocuments,
    spool: Spool,
    rename: Mapping[str, str],
    progress: ProgressCallback | None,
) -> None:
    """Read the whole source into the spool, and check what can only be checked at its end."""
    for records in source.read(bad):
        documents = make_documents(records, layout, bad)
        if documents is not None:
            spool.add(documents)
            if progress is not None:
                progress(Progress("read", spool.n_documents, None, "documents"))
    if not spool.n_documents:
        skipped = f" ({bad.n_skipped} bad records were skipped)" if bad.n_skipped else ""
        raise InvalidInputError(
            ErrorKind.BAD_DOCUMENT,
            f"{source.description} has no document{skipped}: a corpus needs at least one",
        )
    found = [*layout.names.sources, layout.text_column]
    for argument, asked in (
        ("columns", layout.columns or ()),
        ("rename", rename),
        ("stringify", layout.stringify),
    ):
        for column in asked:
            if column not in found:
                raise missing_column("column", argument, column, found, where=source.description)


def _content_warnings(spool: Spool, meta: Mapping[str, int], duplicates: str) -> list[str]:
    warnings = []
    if meta["n_duplicates"]:
        what = "were left out" if duplicates == "drop" else "are kept; duplicates='drop' leaves them out"
        warnings.append(f"{meta['n_duplicates']} documents repeat the text of an earlier one; they {what}")
    if meta["n_empty"]:
        warnings.append(f"{meta['n_empty']} documents are empty or white space")
    if spool.n_nul:
        warnings.append(f"{spool.n_nul} documents hold NUL characters, which are kept")
    return warnings


@dataclass(frozen=True, slots=True)
class _Publication:
    """Writes the spooled documents as parts and commits them, or finds that the store has them."""

    store: Store
    name: str
    spool: Spool
    keep: npt.NDArray[np.bool_]
    part_bytes: int
    progress: ProgressCallback | None

    def run(self, info: Mapping[str, Any], meta: Mapping[str, Any]) -> tuple[_Content, int]:
        """Return the content, with the parts written if it is new, and the version that has it."""
        existing = self._existing()
        if existing is not None:
            content = self._written(write=False)
            self._check_same(existing, content.config)
            return content, existing.version
        content = self._written(write=True)
        seal = Seal("corpus", self.name, 0, len(content.adds), int(content.config["n_documents"]), (), meta)
        create = Create("corpus", self.name, content.config, info)
        try:
            committed = self.store.log.commit([create, *content.adds, seal], txn=uuid.uuid4().hex)
        except ConflictError:
            existing = self._existing()  # someone imported the name meanwhile: perhaps the same documents
            if existing is None:
                raise
            self._check_same(existing, content.config)
            return _Content(content.config), existing.version
        self.store.refresh()
        return content, committed.version

    def _existing(self) -> Collection | None:
        try:
            return self.store.refresh().state.collection("corpus", self.name)
        except NotFoundError:
            return None

    def _check_same(self, existing: Collection, config: Mapping[str, Any]) -> None:
        if existing.fingerprint != fingerprint(config):
            old = existing.config
            raise ConflictError(
                ErrorKind.CONFIG_DIFFERS,
                f"corpus {self.name!r} exists with {old['n_documents']} documents and {old['text_bytes']} bytes, columns "
                f"{', '.join(old['columns'])}; this source has {config['n_documents']} documents and "
                f"{config['text_bytes']} bytes, columns {', '.join(config['columns'])}: import it under another name",
            )

    def _written(self, *, write: bool) -> _Content:
        """Hash all documents and, if asked, store them as parts."""
        schema = pa.schema([pa.field(DOC_ID, pa.int64(), nullable=False), *self.spool.schema])
        hasher = TableHasher(schema)
        storage, attempt = self.store.storage, uuid.uuid4().hex
        parts = split_parts(self._hashed(schema, hasher), self.part_bytes)
        written: list[WrittenPart] = []
        n_documents = text_bytes = 0
        store_part = partial(write_part, storage, corpus=self.name, attempt=attempt)
        with ThreadPoolExecutor(_WRITERS) as pool:
            for done in map_ahead(store_part if write else describe_part, parts, pool=pool, ahead=_WRITERS):
                written.append(done)
                n_documents += done.rows
                text_bytes += done.text_bytes
                if self.progress is not None:
                    self.progress(Progress("write", n_documents, int(self.keep.sum()), "documents"))
        config = {
            "content_sha256": hasher.hexdigest(),
            "n_documents": n_documents,
            "text_bytes": text_bytes,
            "columns": {f.name: str(f.type) for f in schema},
        }
        adds = [make_add(self.name, fingerprint(config), attempt, part) for part in written] if write else []
        return _Content(config, adds)

    def _hashed(self, schema: pa.Schema, hasher: TableHasher) -> Iterator[pa.RecordBatch]:
        for batch in number_documents(self.spool.batches(), self.keep, schema):
            hasher.update(batch)
            yield batch
