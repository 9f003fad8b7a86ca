"""How do spooled documents become a corpus of the store, all at once? (FORMAT.md, section 7.1)

Parts are written under new keys, and one commit creates, fills and seals the corpus: before it there is none. Documents that
the store has already under the name are only hashed.
"""

import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.corpus import DOC_ID
from actstore.errors import ConflictError, ErrorKind, NotFoundError
from actstore.log import fingerprint
from actstore.log.values import Add, Collection, Create, Seal
from actstore.store import Store

from .ahead import map_ahead
from .content_hash import TableHasher
from .corpus_parts import WrittenPart, describe_part, make_add, number_documents, split_parts, write_part
from .progress import Progress, ProgressCallback
from .spool import Spool

_WRITERS = 3


@dataclass(frozen=True, slots=True)
class Content:
    """The corpus's identity, and where its documents were written."""

    config: dict[str, Any]
    adds: list[Add] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Publication:
    """Writes the spooled documents as parts and commits them, or finds that the store has them."""

    store: Store
    name: str
    spool: Spool
    keep: npt.NDArray[np.bool_]
    part_bytes: int
    chat: Mapping[str, Any] | None
    """What the configuration says of rendered conversations; None for a corpus of plain text."""

    progress: ProgressCallback | None

    def run(self, info: Mapping[str, Any], meta: Mapping[str, Any]) -> tuple[Content, int]:
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
            return Content(content.config), existing.version
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
                f"{config['text_bytes']} bytes, columns {', '.join(config['columns'])}{_chat_difference(old, config)}: "
                "import it under another name",
            )

    def _written(self, *, write: bool) -> Content:
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
            **({} if self.chat is None else {"chat": dict(self.chat)}),
        }
        adds = [make_add(self.name, fingerprint(config), attempt, part) for part in written] if write else []
        return Content(config, adds)

    def _hashed(self, schema: pa.Schema, hasher: TableHasher) -> Iterator[pa.RecordBatch]:
        for batch in number_documents(self.spool.batches(), self.keep, schema):
            hasher.update(batch)
            yield batch


def _chat_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return what to say where two configurations differ in how conversations were read."""
    if old.get("chat") == new.get("chat"):
        return ""
    return f"; rendered conversations: {old.get('chat', 'none')} there, {new.get('chat', 'none')} here"
