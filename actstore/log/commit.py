"""How does a version come to be, exactly once, whatever fails? (FORMAT.md, section 5)

The one step that publishes is the creation, if absent, of the next manifest. Before it, the actions are checked against the
newest state and every object they promise is looked at; after it, nothing that fails can take the version back. An answer
that was lost is found out by reading the key again: keys are never overwritten, so what is absent can only become ours
or another writer's, and ours never disappears. Safe for any number of writers; a retry with the same `txn` is idempotent.
"""

import datetime as dt
import logging
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from actstore.errors import (
    ConflictError,
    ErrorKind,
    FormatError,
    InvalidInputError,
    NotFoundError,
    StorageError,
)
from actstore.log import history
from actstore.log.actions import parse_txn
from actstore.log.checkpoint import MIN_VERSIONS
from actstore.log.fold import Fold
from actstore.log.history import Position
from actstore.log.manifest import (
    FORMAT_VERSION,
    Manifest,
    Writer,
    check_writable,
    decode,
    encode,
    manifest_key,
    normalise,
    sha256_hex,
)
from actstore.log.state import State
from actstore.log.traces import leave_checkpoint, leave_hint
from actstore.log.values import Action, Add, Format, Seal, StoredObject
from actstore.storage.base import PutOutcome, Storage

logger = logging.getLogger(__name__)

MAX_REBASES = 20
"""So many times a commit starts again because another writer took the next version."""

MAX_PUTS = 5
"""So many times one manifest is put whose fate stays unknown."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 2.0
"""Full jitter: a pause is uniform between 0 and a bound that doubles from the first to the longest."""

_HEAD_THREADS, _FEW = 32, 4


@dataclass(frozen=True, slots=True)
class Committed:
    """What became of a commit."""

    version: int
    """The version that holds the actions; the newest one if all of them were dropped."""

    state: State
    """A state at `version` or, when an earlier try had succeeded, later."""

    dropped: tuple[Add, ...]
    """Units that were live already: another attempt was committed first, and this one's objects are orphans."""


class CommitLog:
    """The version log of one store. Safe for many threads; pickles; holds no lock and no lease in the store."""

    def __init__(
        self,
        storage: Storage,
        *,
        sleep: Callable[[float], object] = time.sleep,
        rng: random.Random | None = None,
        checkpoint_every: int = MIN_VERSIONS,
    ) -> None:
        """Make a log; touches nothing yet.

        Args:
            storage: Where the store is.
            sleep: Called with seconds before another try.
            rng: Draws the pauses; the default is seeded by the system.
            checkpoint_every: Versions between two checkpoints at least.
        """
        self.storage = storage
        self._sleep = sleep
        self._rng = rng or random.Random()
        self._checkpoint_every = checkpoint_every
        self._lock = threading.Lock()
        self._position: Position | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return (CommitLog, (self.storage,))

    def create(self) -> State:
        """Return the newest state of the store, which is made first where there is none. Idempotent.

        Raises:
            StorageError: the storage failed or may not be written.
            FormatError: there is a store, and it is damaged or too new.
        """
        try:
            return self.latest()
        except NotFoundError:
            self._check_writable()
        fmt = Format(reader_min=FORMAT_VERSION, writer_min=FORMAT_VERSION)
        fold = Fold(None)
        fold.do(fmt)
        body, state = self._manifest(fold, (fmt,), txn=uuid.uuid4().hex)
        if self._publish(0, body):
            self._after_commit(Position(state, tail_bytes=len(body)))
        return self.latest()

    def latest(self) -> State:
        """Return the newest state: one read when this object has seen it before, see `history.load` otherwise.

        Raises:
            NotFoundError: (STORE_NOT_FOUND) there is no store.
            FormatError: the history is damaged, cut short or too new.
        """
        return self._latest().state

    def refresh(self, state: State) -> State:
        """Return the newest state, at or after `state`; one read when nothing is new.

        Raises:
            FormatError: a newer version is damaged or too new.
        """
        known = self._position
        if known is not None and known.state.version >= state.version:
            return self._latest().state
        return history.advance(self.storage, Position(state)).state

    def at(self, version: int) -> State:
        """Return the state at a version.

        Raises:
            NotFoundError: (VERSION_NOT_FOUND) there is no such version.
            FormatError: the history is damaged, cut short or too new.
        """
        return history.at(self.storage, version, self.latest())

    def commit(self, actions: Sequence[Action], *, txn: str) -> Committed:
        """Make the actions one version, all or none, and return it once it is durable.

        Units that are live already are dropped; when nothing else is left, no version is made and `txn` is not kept.
        Objects that the actions promise must be stored before. Idempotent: after any error, the same call again does
        what is missing.

        Args:
            actions: Applied in order. `Format` is not among them.
            txn: Names this set of actions, for instance a UUID: 1 to 200 printable ASCII characters without spaces.

        Raises:
            ConflictError: FENCED, SEALED, TOMBSTONED, ALREADY_EXISTS, CONFIG_DIFFERS or COUNT_DIFFERS: another
                writer was first; COMMIT_CONTENTION: other writers were first 20 times in a row, try again later.
            NotFoundError: a collection that does not exist.
            InvalidInputError: actions that no state allows, or a `txn` that stands for other actions.
            FormatError: OBJECT_MISSING or OBJECT_DAMAGED for a promised object; or the history is damaged or too new.
            StorageError: OUTCOME_UNKNOWN when nobody can tell whether the version was made; any other kind when it was not.
        """
        self._check_writable()
        plain = _checked(actions, txn)
        verified: set[StoredObject] = set()
        for attempt in range(MAX_REBASES):
            if attempt:
                self._pause(attempt)
            position = self._latest()
            state = position.state
            check_writable(state.format)
            done = state.txns.version_of(txn)
            if done is not None:
                self._after_commit(position)
                return self._finished(done, state, actions, plain, txn)
            fold, kept, dropped = self._plan(state, actions, plain)
            if not kept:
                return Committed(state.version, state, dropped)
            self._verify(kept, verified)
            body, new = self._manifest(fold, kept, txn=txn, parent=state.manifest_sha256)
            if self._publish(new.version, body):
                self._after_commit(replace(position, state=new, tail_bytes=position.tail_bytes + len(body)))
                return Committed(new.version, new, dropped)
        raise ConflictError(
            ErrorKind.COMMIT_CONTENTION,
            f"commit {txn!r} to {self.storage.url!r}: other writers took the next version {MAX_REBASES} times in a row; "
            "nothing was committed: try again, with fewer writers or larger commits",
        )

    def _latest(self) -> Position:
        known = self._position
        found = history.load(self.storage) if known is None else history.advance(self.storage, known)
        return self._remember(found)

    def _remember(self, found: Position) -> Position:
        with self._lock:
            known = self._position
            if known is None or known.state.version <= found.state.version:
                self._position = found
            return self._position or found

    def _plan(
        self, state: State, actions: Sequence[Action], plain: Sequence[Action]
    ) -> tuple[Fold, tuple[Action, ...], tuple[Add, ...]]:
        fold = self._fold(state)
        kept: list[Action] = []
        dropped: list[Add] = []
        for given, action in zip(actions, plain, strict=True):
            if fold.do(action):
                kept.append(action)
            elif isinstance(given, Add):
                dropped.append(given)
        return fold, tuple(kept), tuple(dropped)

    def _fold(self, state: State) -> Fold:
        return Fold(state)

    def _manifest(
        self, fold: Fold, actions: tuple[Action, ...], *, txn: str, parent: str | None = None
    ) -> tuple[bytes, State]:
        state = fold.finish(txn, sha256="")
        body = encode(
            Manifest(
                version=state.version,
                parent=parent,
                txn=txn,
                writer=Writer(socket.gethostname()[:256], os.getpid(), _library_version()),
                time=dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                actions=actions,
                after=state.after,
            )
        )
        return body, replace(state, manifest_sha256=sha256_hex(body))

    def _verify(self, actions: Iterable[Action], verified: set[StoredObject]) -> None:
        """Look at the length of every promised object that was not looked at before."""
        promised = [
            obj for a in actions if isinstance(a, (Add, Seal)) for obj in a.objects if obj not in verified
        ]
        if len(promised) <= _FEW or self.storage.local_path(promised[0].key) is not None:
            # Threads cost more than a few requests, and on a local disk they only wait for the interpreter.
            sizes = [self.storage.head(obj.key) for obj in promised]
        else:
            with ThreadPoolExecutor(min(_HEAD_THREADS, len(promised))) as pool:
                sizes = list(pool.map(self.storage.head, [obj.key for obj in promised]))
        for obj, size in zip(promised, sizes, strict=True):
            if size != obj.nbytes:
                kind = ErrorKind.OBJECT_MISSING if size is None else ErrorKind.OBJECT_DAMAGED
                found = "absent" if size is None else f"{size} bytes long"
                raise FormatError(
                    kind,
                    f"cannot commit object {obj.key!r} of {obj.nbytes} bytes: it is {found}; write it before the commit",
                )
        verified.update(promised)

    def _publish(self, version: int, body: bytes) -> bool:
        """Create the manifest of a version; False when the version is another writer's.

        Raises:
            StorageError: OUTCOME_UNKNOWN, or what the storage said when it said that nothing was written.
        """
        key = manifest_key(version)
        failure: StorageError | None = None
        unsure = False
        for attempt in range(MAX_PUTS):
            if attempt:
                self._pause(attempt)
            failure = None
            try:
                outcome = self.storage.put_new(key, [body])
            except StorageError as error:
                outcome, failure = PutOutcome.UNKNOWN, error
            if outcome is PutOutcome.CREATED:
                return True
            stored = self._read_back(key)
            if stored is not None and stored != body:
                return False
            if stored == body and failure is None:
                return True
            # Absent: the same body for the same key again, never another one. There after an error: again too, as
            # EXISTS means that it is durable.
            unsure = (
                unsure or failure is None or failure.kind is ErrorKind.OUTCOME_UNKNOWN or stored is not None
            )
            if failure is not None and failure.kind in _FINAL:
                break
        if failure is not None and not unsure:
            raise failure
        raise StorageError(
            ErrorKind.OUTCOME_UNKNOWN,
            f"{key} of {self.storage.url!r}: put {MAX_PUTS} times, and nobody can tell whether it is there; run the same "
            "command again, it finds out",
        ) from failure

    def _read_back(self, key: str) -> bytes | None:
        try:
            return self.storage.get(key)
        except StorageError as error:
            raise StorageError(
                ErrorKind.OUTCOME_UNKNOWN,
                f"{key} of {self.storage.url!r} was put, the answer was lost and reading it back failed "
                f"({error.message}): it may or may not be committed; run the same command again, it finds out",
            ) from error

    def _finished(
        self, version: int, state: State, actions: Sequence[Action], plain: Sequence[Action], txn: str
    ) -> Committed:
        """Return the outcome of an earlier try of the same transaction."""
        data = self.storage.get(manifest_key(version))
        if data is None:
            raise FormatError(
                ErrorKind.HISTORY_TRUNCATED, f"{manifest_key(version)} is missing: restore it from a backup"
            )
        committed = decode(data, version=version).actions
        if not all(action in plain for action in committed):
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"transaction {txn!r} made version {version} out of other actions: give every commit its own txn",
            )
        dropped = tuple(
            given
            for given, action in zip(actions, plain, strict=True)
            if isinstance(given, Add) and action not in committed
        )
        return Committed(version, state, dropped)

    def _after_commit(self, position: Position) -> None:
        """Leave a checkpoint and a hint behind, as far as possible: the version is durable, whatever becomes of them."""
        self._remember(position)
        try:
            self._remember(leave_checkpoint(self.storage, position, every=self._checkpoint_every))
            leave_hint(self.storage, self._position or position)
        except StorageError as error:
            logger.warning("version %d is committed; %s", position.state.version, error)

    def _check_writable(self) -> None:
        if not self.storage.writable:
            raise StorageError(
                ErrorKind.READ_ONLY,
                f"cannot commit to {self.storage.url!r}: it can only be read from here; get the permission to write, or "
                "copy the store",
            )

    def _pause(self, attempt: int) -> None:
        self._sleep(self._rng.uniform(0.0, min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**attempt)))


@cache
def _library_version() -> str:
    from importlib import metadata  # here: readers do without it

    return metadata.version("actstore")


_FINAL = frozenset({ErrorKind.STORAGE_FULL, ErrorKind.READ_ONLY, ErrorKind.UNSAFE_STORE})
"""Failures that another try cannot help."""


def _checked(actions: Sequence[Action], txn: str) -> tuple[Action, ...]:
    try:
        parse_txn(txn)
    except FormatError as error:
        raise InvalidInputError(ErrorKind.BAD_ARGUMENT, f"cannot commit: {error.message}") from error
    if not actions or any(isinstance(action, Format) for action in actions):
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT, "a commit needs at least one action, and the format is fixed in version 0"
        )
    return normalise(actions)
