"""How do a source's token ids become a tokenization, exactly as they are?

Nothing is tokenized: the rows are the source's tokens in its order, one window per document, packed into units as every
tokenization's are (FORMAT.md, section 7.2). Deterministic and resumable like `tokenize_corpus`: units are stored first and
committed in batches, and a second call goes on behind the last committed unit.
"""

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from actstore.corpus import DOC_ID, TEXT, Corpus
from actstore.errors import ConflictError, ErrorKind
from actstore.ingest.progress import Progress, ProgressCallback
from actstore.ingest.token_encoding import EncodedBatch, Template
from actstore.ingest.token_units import Cut, Start, TokenUnit, UnitPacker, unit_bytes
from actstore.ingest.tokenization_plan import FORMAT
from actstore.ingest.tokenizers import FastTokenizer
from actstore.ingest.tokenizing import commit_seal, find_start, write_tokenizer
from actstore.log import fingerprint
from actstore.log.values import Action, Add, Collection, Create
from actstore.storage import write_new
from actstore.store import Store
from actstore.tokenization import Tokenization

from .arrays import from_document
from .source import ActivationSource, TokenBatch, refuse
from .spelling import SPANS_VERSION, Speller

KIND = "tokenization"
UNITS_PER_COMMIT = 64


@dataclass(frozen=True, slots=True)
class TokensPlan:
    """What a tokenization of imported tokens will be."""

    corpus: Corpus
    tokenizer: FastTokenizer
    vocabulary: pa.Table
    config: dict[str, Any]

    @property
    def id(self) -> str:
        """Its id: the corpus's name and the start of the fingerprint."""
        return f"{self.corpus.id}.{self.fingerprint[:10]}"

    @property
    def fingerprint(self) -> str:
        """Of its configuration."""
        return fingerprint(self.config)


def tokens_config(
    corpus: Corpus,
    tokenizer: FastTokenizer,
    *,
    source_format: str,
    tokens_sha256: str,
    window: int,
    rows_per_unit: int,
) -> dict[str, Any]:
    """Return the configuration of a tokenization of imported tokens; `imported` sets it apart from every other."""
    return {
        "corpus": corpus.id,
        "corpus_fingerprint": corpus.collection.fingerprint,
        "tokenizer_sha256": tokenizer.sha256,
        "window": window,
        "overlap": 0,
        "add_special_tokens": False,
        "rows_per_unit": rows_per_unit,
        "format": FORMAT,
        "imported": {"format": source_format, "tokens_sha256": tokens_sha256, "spans": SPANS_VERSION},
    }


def write_tokens(
    store: Store,
    plan: TokensPlan,
    source: ActivationSource,
    speller: Speller | None,
    *,
    progress: ProgressCallback | None = None,
) -> Tokenization:
    """Store the tokenization, or what of it is missing, and return it; idempotent.

    Args:
        store: Where to; moved to the new version.
        plan: What it will be.
        source: The tokens.
        speller: Finds the characters of each token; None if the source has them.
        progress: Called as units are stored.

    Raises:
        InvalidInputError: the source is damaged, or its characters are not in the corpus's documents.
        ConflictError: the store has another tokenization under its id.
    """
    existing = store.refresh().state.collections.get((KIND, plan.id))
    if existing is not None and existing.fingerprint != plan.fingerprint:
        raise ConflictError(
            ErrorKind.CONFIG_DIFFERS,
            f"tokenization {plan.id!r} exists with the configuration {dict(existing.config)}, and {plan.config} was asked for: "
            "their hashes begin alike; import under another corpus name",
        )
    if existing is None or not existing.is_sealed:
        _Writer(store, plan, source, speller, uuid.uuid4().hex, progress).run(existing)
    return store.refresh().tokenization(plan.id)


@dataclass(frozen=True, slots=True)
class _Writer:
    store: Store
    plan: TokensPlan
    source: ActivationSource
    speller: Speller | None
    attempt: str
    progress: ProgressCallback | None

    def run(self, existing: Collection | None) -> None:
        pending: list[Add] = []
        for unit in self._units(find_start(existing)):
            pending.append(self._write(unit))
            if self.progress is not None:
                done = int(unit.meta["last_doc"]) + 1
                self.progress(Progress("tokens", done, self.plan.corpus.n_documents, "documents"))
            if len(pending) == UNITS_PER_COMMIT:
                self._commit(pending)
                pending = []
        if pending:
            self._commit(pending)
        self._seal()

    def _units(self, start: Start) -> Iterator[TokenUnit]:
        """Yield the units from the first missing one on."""
        config = self.plan.config
        first_doc = start.doc + 1 if start.unit else 0
        cut = Cut(
            template=Template(0, 0),
            window=config["window"],
            overlap=0,
            rows_per_unit=config["rows_per_unit"],
            special_ids=self.plan.tokenizer.special_ids,
        )
        packer = UnitPacker(cut, Start(start.unit, first_doc, 0))
        positions: list[npt.NDArray[np.int32]] = []
        for batch in _from_doc(self.source, first_doc):
            if batch.positions is not None:
                positions.append(batch.positions)
            for unit in packer.add(self._encoded(batch)):
                yield _with_positions(unit, positions)
        for unit in packer.finish():
            yield _with_positions(unit, positions)

    def _encoded(self, batch: TokenBatch) -> EncodedBatch:
        if self.speller is not None:
            spelled = self.speller(batch)
            return EncodedBatch(batch.first_doc, batch.lengths, batch.ids, spelled.starts, spelled.ends)
        assert batch.spans is not None
        docs = document_numbers(batch)
        _check_spans(self.plan.corpus, docs, batch)
        # Documents of the corpus that the table leaves out have no token, and so no row.
        lengths = np.zeros(docs[-1] - docs[0] + 1, np.int64)
        lengths[np.array(docs) - docs[0]] = batch.lengths
        return EncodedBatch(docs[0], lengths, batch.ids, batch.spans[:, 0].copy(), batch.spans[:, 1].copy())

    def _write(self, unit: TokenUnit) -> Add:
        key = f"tokenizations/{self.plan.id}/tokens/{unit.unit:08}-{self.attempt}.parquet"
        obj = write_new(self.store.storage, key, [unit_bytes(unit.table)])
        collection = self.store.state.collections.get((KIND, self.plan.id))
        return Add(
            kind=KIND,
            id=self.plan.id,
            epoch=0 if collection is None else collection.epoch,
            fingerprint=self.plan.fingerprint,
            unit=unit.unit,
            rows=unit.table.num_rows,
            nonfinite=0,
            attempt=self.attempt,
            objects=(obj,),
            meta=unit.meta,
        )

    def _commit(self, adds: Sequence[Add]) -> None:
        """Commit units; the first commit also creates the tokenization."""
        key = (KIND, self.plan.id)
        create = Create(*key, self.plan.config, {"tokenizer": self.plan.tokenizer.name})
        new: list[Action] = [] if key in self.store.state.collections else [create]
        try:
            self.store.log.commit([*new, *adds], txn=uuid.uuid4().hex)
        except ConflictError as error:
            if error.kind is not ErrorKind.ALREADY_EXISTS or not new:
                raise
            self.store.log.commit(list(adds), txn=uuid.uuid4().hex)  # another process created it meanwhile
        self.store.refresh()

    def _seal(self) -> None:
        collection = self.store.state.collection(KIND, self.plan.id)
        if collection.is_sealed:
            return
        tokenizer = self.plan.tokenizer
        objects = write_tokenizer(
            self.store.storage, self.plan.id, tokenizer, self.plan.vocabulary, self.attempt
        )
        commit_seal(self.store, collection, self.plan.corpus, tokenizer, objects)


def document_numbers(batch: TokenBatch) -> list[int]:
    """Return the corpus's documents that a batch with `spans` speaks of.

    Raises:
        InvalidInputError: keys that are no ascending numbers.
    """
    try:
        docs = [int(key) for key in batch.keys]
    except ValueError:
        docs = []
    if not docs or docs[0] < 0 or docs != sorted(set(docs)):
        refuse(
            f"the documents {', '.join(batch.keys[:3])}, ... are not ascending numbers",
            "a table with char_start and char_end names documents of the corpus by their doc_id, in its order",
        )
    return docs


def _from_doc(source: ActivationSource, first_doc: int) -> Iterator[TokenBatch]:
    """Yield the documents from one of the corpus on."""
    if not source.has_spans:
        yield from source.tokens(first_doc)
        return
    # Numbers of the corpus's documents are not those of the source's, which may leave some out.
    last = -1
    for batch in source.tokens():
        docs = document_numbers(batch)
        if docs[0] <= last:
            refuse(f"document {docs[0]} comes after document {last}", "sort the table by doc_id")
        last = docs[-1]
        skip = int(np.searchsorted(docs, first_doc))
        rest = from_document(batch, batch.first_doc + skip)
        if rest is not None:
            yield rest


def _check_spans(corpus: Corpus, docs: list[int], batch: TokenBatch) -> None:
    """Check that every token's characters are in its document's text."""
    assert batch.spans is not None
    if docs[-1] >= corpus.n_documents:
        refuse(
            f"the table of tokens has document {docs[-1]}, corpus {corpus.id!r} has {corpus.n_documents} documents",
            "name the corpus that the tokens are from",
        )
    found = corpus.documents(docs, [TEXT])
    assert found[DOC_ID].to_pylist() == docs
    n_chars = pc.utf8_length(found[TEXT]).to_numpy().astype(np.int64)
    bad = batch.spans[:, 1] > np.repeat(n_chars, batch.lengths)
    if bad.any():
        row = int(bad.argmax())
        i = int(np.searchsorted(batch.offsets, row, side="right")) - 1
        refuse(
            f"a token of document {docs[i]} ends at character {int(batch.spans[row, 1])}, its text in corpus "
            f"{corpus.id!r} has {int(n_chars[i])} characters",
            "name the corpus that the tokens are from; characters are Unicode code points",
        )


def _with_positions(unit: TokenUnit, positions: list[npt.NDArray[np.int32]]) -> TokenUnit:
    """Return a unit with the next positions that the source gave, if it gave any; takes them off the list."""
    if not positions:
        return unit
    n_rows = unit.table.num_rows
    joined = np.concatenate(positions)
    positions[:] = [joined[n_rows:]] if len(joined) > n_rows else []
    index = unit.table.schema.get_field_index("position")
    field = unit.table.schema.field(index)
    table = unit.table.set_column(index, field, pa.array(joined[:n_rows], field.type))
    return TokenUnit(unit.unit, table, unit.meta)
