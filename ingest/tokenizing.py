"""How does a corpus become a tokenization: numbered token rows that every run of the same tokenizer shares?

Everything about the rows is decided here, before any model runs (FORMAT.md, section 7). The work is deterministic: the same
corpus, tokenizer and settings give the same rows, whatever the number of workers and however often it was interrupted.
Units are stored first and committed in batches; running again goes on behind the last committed unit, and a finished
tokenization is returned as it is.
"""

import multiprocessing
import os
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import pyarrow as pa

from actstore.corpus import Corpus
from actstore.errors import ConflictError, ErrorKind, InvalidInputError, StorageError
from actstore.log import fingerprint
from actstore.log.values import Action, Add, Collection, Create, Seal, StoredObject
from actstore.storage import Storage, write_new
from actstore.store import Store, open_store

from .ahead import map_ahead
from .corpus_texts import read_texts
from .progress import Progress, ProgressCallback
from .token_encoding import (
    EncodedBatch,
    TextBatch,
    check_worker_count,
    encode_in_worker,
    start_worker,
)
from .token_units import Cut, Start, TokenUnit, UnitPacker, unit_bytes, vocabulary_bytes
from .tokenization_plan import TokenizationPlan, plan_tokenization
from .tokenizers import FastTokenizer, tokenizers_version, vocabulary_table

UNITS_PER_COMMIT = 512
"""A crash costs the units since the last commit: at most half an hour of one core's work, for few manifests."""

_WRITERS = 2


@dataclass(frozen=True, slots=True)
class TokenizeReport:
    """What a tokenization holds, and what this call added to it."""

    id: str
    n_rows: int
    n_units: int
    n_windows: int
    n_documents: int
    """Documents of the corpus."""
    n_empty: int
    """Documents without any token; they have no row."""
    n_new_units: int
    """Units that this call made live; 0 if all was there."""
    window: int
    overlap: int
    rows_per_unit: int
    tokenizer_sha256: str
    version: int
    """Store version that has the whole tokenization."""


def tokenize_corpus(
    store: Store | str | os.PathLike[str],
    corpus: str,
    tokenizer: Any,
    *,
    window: int | None = None,
    overlap: int = 0,
    add_special_tokens: bool = True,
    rows_per_unit: int | Literal["auto"] = "auto",
    workers: int | None = None,
    revision: str | None = None,
    progress: ProgressCallback | None = None,
    units_per_commit: int = UNITS_PER_COMMIT,
) -> TokenizeReport:
    """Cut a corpus into token rows and return what came of it.

    Idempotent and resumable. Writes one object per unit. Memory: one open unit, a few batches of text.

    Args:
        store: The store, or where it is.
        corpus: Name of a corpus in it.
        tokenizer: Folder, `tokenizer.json`, hub name, or a fast tokenizer object.
        window: Tokens that the model sees at once, special ones included; None for what the tokenizer says its model
            takes, else 1,024. Longer documents are cut.
        overlap: Text tokens that neighbouring windows of one document share.
        add_special_tokens: Whether each window gets the special tokens that the tokenizer puts around a text. A corpus of
            conversations never gets them: its chat template has written those that the model expects.
        rows_per_unit: Rows of one unit of work; "auto" gives a power of two that fits the corpus.
        workers: Processes that tokenize, each on one core; None for this process, with the tokenizer's own threads. With
            processes, a script needs the `if __name__ == "__main__":` guard of `multiprocessing`.
        revision: Branch, tag or commit of a hub name.
        progress: Called with `Progress` as units are stored.
        units_per_commit: Units that become visible together.

    Raises:
        NotFoundError: no such store or corpus.
        InvalidInputError: a tokenizer that cannot be used, or settings that cannot work.
        ConflictError: the store has another tokenization under the id that this one would have.
        StorageError: the store cannot be written, or a worker process died; run again to go on.
    """
    store = open_store(store) if isinstance(store, str | os.PathLike) else store
    n_workers = check_worker_count(workers)
    if not 1 <= units_per_commit <= UNITS_PER_COMMIT:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"units_per_commit must be in [1, {UNITS_PER_COMMIT}], got {units_per_commit}",
        )
    plan = plan_tokenization(
        store,
        corpus,
        tokenizer,
        window=window,
        overlap=overlap,
        add_special_tokens=add_special_tokens,
        rows_per_unit=rows_per_unit,
        revision=revision,
    )
    existing = store.state.collections.get(("tokenization", plan.id))
    if existing is not None and existing.fingerprint != fingerprint(plan.config):
        raise ConflictError(
            ErrorKind.CONFIG_DIFFERS,
            f"tokenization {plan.id!r} exists with the configuration {dict(existing.config)}, and {plan.config} was asked for: "
            "their hashes begin alike; change the window, the overlap or the rows per unit",
        )
    n_before = 0 if existing is None else len(existing.units)
    if existing is None or not existing.is_sealed:
        _Job(store, plan, n_workers, units_per_commit, progress).run(existing)
    return _report(store, plan, n_before)


@dataclass(frozen=True, slots=True)
class _Job:
    """Stores and commits the units that are missing, then seals."""

    store: Store
    plan: TokenizationPlan
    workers: int
    units_per_commit: int
    progress: ProgressCallback | None

    def run(self, existing: Collection | None) -> None:
        """Finish the tokenization, from wherever an earlier call left it."""
        attempt = uuid.uuid4().hex
        start = find_start(existing)
        pending: list[Add] = []
        done = start.unit
        with ExitStack() as stack:
            encode = self._encoders(stack)
            units = self._units(encode(read_texts(self.plan.corpus, start.doc)), start)
            writers = stack.enter_context(ThreadPoolExecutor(_WRITERS))
            write = partial(
                _write_unit, self.store.storage, self.plan.id, self._fingerprint, self._epoch, attempt
            )
            for add in map_ahead(write, units, pool=writers, ahead=_WRITERS + 1):
                pending.append(add)
                done += 1
                self._tell(int(add.meta["last_doc"]))
                if len(pending) == self.units_per_commit:
                    self._commit(pending)
                    pending = []
        if not done:
            raise InvalidInputError(
                ErrorKind.BAD_DOCUMENT,
                f"no document of corpus {self.plan.corpus.id!r} has a token under tokenizer {self.plan.tokenizer.name!r}: there "
                "is nothing to run a model on",
            )
        self._seal(pending, attempt)

    @property
    def _fingerprint(self) -> str:
        return fingerprint(self.plan.config)

    @property
    def _epoch(self) -> int:
        collection = self.store.state.collections.get(("tokenization", self.plan.id))
        return 0 if collection is None else collection.epoch

    def _encoders(self, stack: ExitStack) -> Callable[[Iterator[TextBatch]], Iterator[EncodedBatch]]:
        if not self.workers:
            return partial(map, self.plan.encoder())
        special = bool(self.plan.config["add_special_tokens"])
        allow = self.plan.corpus.allows_special_tokens
        pool = stack.enter_context(
            ProcessPoolExecutor(
                self.workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=start_worker,
                initargs=(self.plan.tokenizer, special, allow),
            )
        )
        return partial(_encode_in_pool, pool, self.workers)

    def _units(self, encoded: Iterator[EncodedBatch], start: Start) -> Iterator[TokenUnit]:
        config = self.plan.config
        cut = Cut(
            template=self.plan.template,
            window=config["window"],
            overlap=config["overlap"],
            rows_per_unit=config["rows_per_unit"],
            special_ids=self.plan.tokenizer.special_ids,
        )
        packer = UnitPacker(cut, start)
        for batch in encoded:
            yield from packer.add(batch)
        yield from packer.finish()

    def _tell(self, last_doc: int) -> None:
        if self.progress is not None:
            self.progress(Progress("tokenize", last_doc + 1, self.plan.corpus.n_documents, "documents"))

    def _commit(self, actions: list[Any]) -> None:
        """Commit actions; the first commit of a tokenization also creates it."""
        key = ("tokenization", self.plan.id)
        info = {"tokenizer": self.plan.tokenizer.name, "tokenizers_version": tokenizers_version()}
        create = Create(*key, self.plan.config, info)
        try:
            new: list[Action] = [] if key in self.store.state.collections else [create]
            self.store.log.commit([*new, *actions], txn=uuid.uuid4().hex)
        except ConflictError as error:
            self.store.refresh()
            if error.kind is not ErrorKind.ALREADY_EXISTS or not new:
                raise
            self.store.log.commit(actions, txn=uuid.uuid4().hex)  # another process created it meanwhile
        self.store.refresh()

    def _seal(self, pending: list[Add], attempt: str) -> None:
        tokenizer = self.plan.tokenizer
        objects = write_tokenizer(
            self.store.storage, self.plan.id, tokenizer, vocabulary_table(tokenizer), attempt
        )
        if pending:
            self._commit(pending)
        collection = self.store.state.collection("tokenization", self.plan.id)
        if collection.is_sealed:
            return
        commit_seal(self.store, collection, self.plan.corpus, self.plan.tokenizer, objects)
        self.store.refresh()


def find_start(existing: Collection | None) -> Start:
    """Return where the first missing unit begins.

    >>> find_start(None)
    Start(unit=0, doc=0, window=0)
    """
    if existing is None or 0 not in existing.units:
        return Start()
    unit = 0
    while unit + 1 in existing.units:
        unit += 1
    meta = existing.units[unit].meta
    return Start(unit + 1, int(meta["last_doc"]), int(meta["last_window"]) + 1)


def write_tokenizer(
    storage: Storage, tokenization: str, tokenizer: FastTokenizer, vocabulary: pa.Table, attempt: str
) -> tuple[StoredObject, ...]:
    """Store a tokenization's tokenizer and its vocabulary, which its seal lists."""
    folder = f"tokenizations/{tokenization}"
    return (
        write_new(storage, f"{folder}/tokenizer-{attempt}.json", [tokenizer.tokenizer_json]),
        write_new(storage, f"{folder}/vocabulary-{attempt}.parquet", [vocabulary_bytes(vocabulary)]),
    )


def commit_seal(
    store: Store,
    collection: Collection,
    corpus: Corpus,
    tokenizer: FastTokenizer,
    objects: tuple[StoredObject, ...],
) -> None:
    """Seal a tokenization whose units are all committed; one that another process sealed with the same rows is as good.

    Args:
        store: Where it is; not moved to the new version.
        collection: The tokenization.
        corpus: Its corpus.
        tokenizer: Its tokenizer.
        objects: From `write_tokenizer`.
    """
    n_documents, units = corpus.n_documents, collection.units.values()
    meta = {
        "n_documents": n_documents,
        "n_empty": n_documents - sum(int(u.meta["n_documents"]) for u in units),
        "n_windows": sum(int(u.meta["n_windows"]) for u in units),
        "tokenizer_config": {
            **tokenizer.config,
            "name": tokenizer.name,
            "max_length": tokenizer.max_length,
        },
    }
    seal = Seal("tokenization", collection.id, collection.epoch, len(units), collection.rows, objects, meta)
    try:
        store.log.commit([seal], txn=uuid.uuid4().hex)
    except ConflictError as error:
        if error.kind is not ErrorKind.SEALED:
            raise


def _encode_in_pool(
    pool: ProcessPoolExecutor, workers: int, batches: Iterator[TextBatch]
) -> Iterator[EncodedBatch]:
    try:
        yield from map_ahead(encode_in_worker, batches, pool=pool, ahead=2 * workers)
    except BrokenProcessPool as error:
        raise StorageError(
            ErrorKind.WORKER_FAILED,
            "a tokenizing process died (out of memory, or a script without the __main__ guard): run again to go on, with "
            "fewer workers or none",
        ) from error


def _write_unit(
    storage: Storage, tokenization: str, fingerprint: str, epoch: int, attempt: str, unit: TokenUnit
) -> Add:
    """Store one unit under a new key and return the action that makes it live."""
    key = f"tokenizations/{tokenization}/tokens/{unit.unit:08}-{attempt}.parquet"
    obj = write_new(storage, key, [unit_bytes(unit.table)])
    return Add(
        kind="tokenization",
        id=tokenization,
        epoch=epoch,
        fingerprint=fingerprint,
        unit=unit.unit,
        rows=unit.table.num_rows,
        nonfinite=0,
        attempt=attempt,
        objects=(obj,),
        meta=unit.meta,
    )


def _report(store: Store, plan: TokenizationPlan, n_before: int) -> TokenizeReport:
    collection = store.state.collection("tokenization", plan.id)
    meta = collection.seal.meta if collection.seal is not None else {}
    return TokenizeReport(
        id=plan.id,
        n_rows=collection.rows,
        n_units=len(collection.units),
        n_windows=int(meta["n_windows"]),
        n_documents=int(meta["n_documents"]),
        n_empty=int(meta["n_empty"]),
        n_new_units=len(collection.units) - n_before,
        window=plan.config["window"],
        overlap=plan.config["overlap"],
        rows_per_unit=plan.config["rows_per_unit"],
        tokenizer_sha256=plan.config["tokenizer_sha256"],
        version=store.version,
    )
