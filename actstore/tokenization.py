"""What does a tokenization hold: which token is row r, and where does it stand in its document? (FORMAT.md, section 7)"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from actstore.checks import is_whole
from actstore.corpus import Corpus
from actstore.errors import ErrorKind, NotFoundError
from actstore.log.values import Collection, StoredObject, Unit
from actstore.objects import ObjectReader

TOKEN_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("doc_id", pa.int64(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("token_id", pa.int32(), nullable=False),
        pa.field("char_start", pa.int32(), nullable=False),
        pa.field("char_end", pa.int32(), nullable=False),
        pa.field("is_special", pa.bool_(), nullable=False),
        pa.field("window", pa.int32(), nullable=False),
        pa.field("window_position", pa.int32(), nullable=False),
    ]
)
"""One table row per token row. `row` is global: unit * rows_per_unit + offset. `position` counts the document's whole token
sequence; `window` and `window_position` say where the model saw it. Characters are Unicode code points of the document's
text, half-open."""

ROLE = "role"
CHAT_TOKEN_SCHEMA = TOKEN_SCHEMA.append(pa.field(ROLE, pa.string()))
"""Of a corpus of conversations: also the role of the message that the token is part of, null outside of messages."""


@dataclass(frozen=True, slots=True)
class Tokenization:
    """A corpus cut by one tokenizer into rows; runs of different models share it, and with it their row numbers."""

    collection: Collection
    corpus: Corpus
    objects: ObjectReader

    @property
    def id(self) -> str:
        """Its id: the corpus's name and the start of the fingerprint."""
        return self.collection.id

    @property
    def config(self) -> dict[str, Any]:
        """What shaped it: tokenizer hash, window, overlap, rows per unit."""
        return dict(self.collection.config)

    @property
    def has_roles(self) -> bool:
        """Whether its tokens have a role: those computed of a corpus of conversations do."""
        return bool(self.collection.config.get("roles"))

    @property
    def schema(self) -> pa.Schema:
        """Columns of its tokens."""
        return CHAT_TOKEN_SCHEMA if self.has_roles else TOKEN_SCHEMA

    @property
    def rows_per_unit(self) -> int:
        """Row numbers that each unit spans; a unit may hold fewer rows."""
        return int(self.collection.config["rows_per_unit"])

    @property
    def n_rows(self) -> int:
        """Number of token rows."""
        return self.collection.rows

    @property
    def units(self) -> list[Unit]:
        """Its units in order."""
        return [self.collection.units[u] for u in sorted(self.collection.units)]

    def unit_table(self, unit: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the tokens of one unit (columns of `schema`), in row order. Reads one object.

        Raises:
            NotFoundError: no such unit.
            FormatError: the object is missing or damaged.
        """
        entry = self.collection.units.get(unit) if is_whole(unit) else None
        if entry is None:
            raise NotFoundError(
                ErrorKind.ROW_NOT_FOUND,
                f"unit {unit!r:.80} was asked for, tokenization {self.id!r} has {len(self.collection.units)} units",
            )
        return self.objects.table(entry.objects[0], columns)

    def vocabulary(self) -> pa.Table:
        """Return the columns token_id (int32) and token (readable text) of the whole vocabulary."""
        return self.objects.table(self._sealed_object("vocabulary"))

    def tokenizer_json(self) -> bytes:
        """Return the fast tokenizer's own file, as `tokenizers.Tokenizer.from_str` reads it."""
        return self.objects.read(self._sealed_object("tokenizer-"))

    def tokenizer_config(self) -> dict[str, Any]:
        """Return the settings that belong to the tokenizer and are not in its file: special ids, added tokens."""
        self._sealed_object("tokenizer-")
        return dict(self.collection.seal.meta["tokenizer_config"]) if self.collection.seal else {}

    def _sealed_object(self, part: str) -> StoredObject:
        if self.collection.seal is None:
            raise NotFoundError(
                ErrorKind.COLLECTION_NOT_FOUND,
                f"tokenization {self.id!r} is not complete yet: run tokenize or ingest again to finish it",
            )
        return next(o for o in self.collection.seal.objects if o.key.rsplit("/", 1)[1].startswith(part))
