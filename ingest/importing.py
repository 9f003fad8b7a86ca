"""How does a source of documents become a corpus of the store? (FORMAT.md, section 7)

The source is read once, to its end, into a local spool; only then is anything written to the store, and one commit makes
the corpus visible. So an error or a crash at any moment leaves no corpus and no half of one; running again works. Importing
the same documents under the same name again changes nothing and says so.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from actstore.corpus import ROLES, ROLES_TYPE
from actstore.errors import ErrorKind, InvalidInputError
from actstore.names import check_name
from actstore.store import Store, open_store

from .chat import Chat, ChatSource
from .chat_template import load_chat_template
from .columns import ColumnNames
from .corpus_publishing import Publication
from .documents import Layout, check_columns, check_text_type, make_documents, missing_column
from .progress import Progress, ProgressCallback
from .records import BadDocumentPolicy, BadDocuments, ReadOptions, Source
from .sources import ChainedSource, SourceChoice, open_source
from .spool import Spool

MAX_DOCUMENT_BYTES = 64 << 20
PART_BYTES = 64 << 20
MESSAGES = "messages"
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
    streaming: bool = True,
    storage_options: Mapping[str, Any] | None = None,
    chat_template: Any = None,
    messages_column: str | None = None,
    chat_tokenizer: Any = None,
    chat_variables: Mapping[str, Any] | None = None,
    allow_special_tokens: bool = False,
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
        source: What `actstore.ingest.sources.open_source` takes: path, glob, URL, hub name, dataset, table or iterable, or a
            `SourceList` of several.
        text_column: The source's column that holds the text.
        source_format: One of `actstore.ingest.sources.SOURCE_FORMATS`; None finds out.
        split: Split of a Hugging Face dataset.
        subset: Subset (configuration) of a hub dataset.
        revision: Branch, tag or commit of a hub dataset.
        streaming: Whether a hub dataset is read as it comes instead of downloaded first.
        storage_options: Options of the fsspec client behind a URL, such as `key`, `secret` and `endpoint_url` of s3fs.
        chat_template: Renders conversations: a `.jinja` file, or the folder, hub name (`name@revision`) or tokenizer object
            of transformers that has the template.
        messages_column: The source's column that holds conversations, `messages` if only a template is given.
        chat_tokenizer: Folder, hub name or tokenizer object whose special tokens a `.jinja` file writes.
        chat_variables: Values of the template's own switches, such as `{"enable_thinking": False}`.
        allow_special_tokens: Whether messages may hold special tokens, which then are read as such.
        id_column: Column that becomes `source_key`; None for the source's own name of it, else file and line.
        columns: Metadata columns to keep, None for all. JSON and Python records get the narrowest types that hold all.
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
    chat = _make_chat(
        chat_template, messages_column, chat_tokenizer, chat_variables, allow_special=allow_special_tokens
    )
    layout = Layout(
        text_column=text_column if chat is None else chat.column,
        id_column=id_column,
        columns=None if columns is None else (*columns, *([] if chat is None else [ROLES])),
        stringify=frozenset(stringify),
        max_document_bytes=max_document_bytes,
        names=ColumnNames(rename),
        typed={} if chat is None else {ROLES: ROLES_TYPE},
    )
    options = ReadOptions(layout.text_column, _wanted(layout), max_document_bytes)
    choice = SourceChoice(source_format, split, subset, revision, streaming, dict(storage_options or {}))
    opened = open_source(source, options=options, choice=choice)
    if chat is not None:
        _reserve_roles(layout)
        opened = ChatSource(opened, chat, keeps_roles=columns is None or ROLES in columns)
    _check_schema(opened, layout)
    store = open_store(store, create=True) if isinstance(store, str | os.PathLike) else store
    with Spool(spool_dir) as spool:
        job = _Import(opened, chat, layout, BadDocuments(on_bad_document), spool, duplicates, progress)
        return job.run(store, name, rename or {}, part_bytes)


def _make_chat(
    template: Any,
    column: str | None,
    tokenizer: Any,
    variables: Mapping[str, Any] | None,
    *,
    allow_special: bool,
) -> Chat | None:
    if template is not None:
        loaded = load_chat_template(template, tokenizer=tokenizer, variables=variables)
        return Chat(loaded, MESSAGES if column is None else column, allow_special)
    for argument, value in (
        ("messages_column", column),
        ("chat_tokenizer", tokenizer),
        ("chat_variables", variables),
    ):
        if value is not None:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"{argument}={value!r:.80} is for conversations: say with chat_template= how they become text",
            )
    return None


def _reserve_roles(layout: Layout) -> None:
    if layout.names.stored(ROLES) != ROLES:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"rename: a corpus of conversations keeps who wrote what in a column {ROLES!r}: choose another name",
        )


def _check_schema(source: Source, layout: Layout) -> None:
    for part in source.sources if isinstance(source, ChainedSource) else ():
        _check_schema(part, layout)
    if source.schema is not None:
        check_columns(source.schema.names, layout, where=source.description)
        check_text_type(source.schema, layout.text_column, where=source.description)


@dataclass(frozen=True, slots=True)
class _Import:
    """Reads a source into a spool, and makes a corpus of what is there."""

    source: Source
    chat: Chat | None
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
        chat = None if self.chat is None else self.chat.config
        publication = Publication(store, name, spool, keep, part_bytes, chat, self.progress)
        info = {
            "source": self.source.description,
            "text_column": self.layout.text_column,
            "duplicates": self.duplicates,
            **({} if self.chat is None else self.chat.info),
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
