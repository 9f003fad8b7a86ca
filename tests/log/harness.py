"""What must hold of a store whatever happens to its clients, as checks that any client can be put to.

A `Client` is a way of working on a store: the real one, or one with a planted bug. Every check drives clients through a small
ingest and yields a line for every violation it finds: none for the real client, at least one for every bug.

The data encode where they belong: object j of unit u written by attempt a holds the text `u/j/a/<salt>`.
"""

import itertools
import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from actstore.errors import ActstoreError, ConflictError, ErrorKind, FormatError, NotFoundError, StorageError
from actstore.log import CommitLog, Committed, State, fingerprint, fsck
from actstore.log.values import Action, Add, Create, Fence, Seal, StoredObject, Tomb
from actstore.storage import MemoryStorage, RetryPolicy, Storage, read_verified, write_new
from actstore.testing.faults import Fault, FaultStorage, Killed

KIND, ID = "run", "r"
CONFIG = {"model": {"layers": 2}, "rows_per_unit": 4}
FINGERPRINT = fingerprint(CONFIG)
N_UNITS = 3
N_OBJECTS = 2
NO_PAUSE = RetryPolicy(attempts=4, sleep=lambda seconds: None)

_names = itertools.count()


def fresh_memory() -> Storage:
    """Return an empty storage."""
    return MemoryStorage(f"t{next(_names)}-{uuid.uuid4().hex[:8]}")


def new_log(storage: Storage) -> CommitLog:
    """Return the real log, without pauses, with a checkpoint every other version."""
    return CommitLog(storage, sleep=lambda seconds: None, rng=random.Random(0), checkpoint_every=2)


def new_attempt() -> str:
    return uuid.uuid4().hex


@dataclass(frozen=True)
class Client:
    """A way of working on a store."""

    name: str = "real"
    log: Callable[[Storage], CommitLog] = new_log
    wrap: Callable[[Storage], Storage] = lambda storage: storage
    """What stands between the client and the storage."""

    attempt: Callable[[], str] = new_attempt
    publish_first: bool = False
    drop_on_unknown: bool = False
    """Whether the client removes its objects when it cannot tell whether they were committed."""


@dataclass
class Acks:
    """What a client was told is done: nothing of it may ever be lost."""

    units: dict[int, tuple[str, int]] = field(default_factory=dict)
    """Unit to attempt and version."""

    created: bool = False
    sealed: bool = False
    refused: list[str] = field(default_factory=list)
    """Transactions of commits that failed with certainty."""


def key_of(unit: int, attempt: str, j: int) -> str:
    return f"runs/{ID}/part{j}/{unit:04}-{attempt}"


def rows_of(unit: int) -> int:
    return 10 + unit


class Session:
    """One life of a client's process: what it knows dies with it."""

    def __init__(self, client: Client, storage: Storage, acks: Acks) -> None:
        self.client = client
        self.storage = client.wrap(storage)
        self.log = client.log(self.storage)
        self.acks = acks
        self.salt = uuid.uuid4().hex

    def commit(self, actions: Sequence[Action]) -> Committed:
        """Commit, and once more when nobody could tell what became of it."""
        txn = uuid.uuid4().hex
        try:
            return self.log.commit(actions, txn=txn)
        except StorageError as error:
            if error.kind is not ErrorKind.OUTCOME_UNKNOWN:
                self.acks.refused.append(txn)
                raise
            if self.client.drop_on_unknown:
                for action in actions:
                    for obj in getattr(action, "objects", ()):
                        self.storage.delete(obj.key)
            return self.log.commit(actions, txn=txn)

    def create(self) -> None:
        try:
            self.commit([Create(KIND, ID, CONFIG, {"who": "harness"})])
        except ConflictError as error:
            if error.kind is not ErrorKind.ALREADY_EXISTS or self.acks.created:
                raise
            # Another client, or an earlier life of this one, was first. A retry of this very commit never comes here.
            if self.log.latest().collection(KIND, ID).info != {"who": "another"}:
                raise AssertionError("a commit's own retry was told that another was first") from error
        self.acks.created = True

    def write(self, unit: int, attempt: str) -> tuple[StoredObject, ...]:
        return tuple(
            write_new(self.storage, key_of(unit, attempt, j), [self.body(unit, j, attempt)], retry=NO_PAUSE)
            for j in range(N_OBJECTS)
        )

    def body(self, unit: int, j: int, attempt: str) -> bytes:
        return f"{unit}/{j}/{attempt}/{self.salt}".encode()

    def add(self, unit: int, *, epoch: int = 0, attempt: str | None = None) -> Committed:
        attempt = attempt or self.client.attempt()
        if self.client.publish_first:
            objects = tuple(
                describe(key_of(unit, attempt, j), self.body(unit, j, attempt)) for j in range(N_OBJECTS)
            )
        else:
            objects = self.write(unit, attempt)
        action = Add(KIND, ID, epoch, FINGERPRINT, unit, rows_of(unit), 0, attempt, objects, {"u": unit})
        done = self.commit([action])
        if self.client.publish_first:
            self.write(unit, attempt)
        if not done.dropped:
            self.acks.units[unit] = (attempt, done.version)
        return done

    def run(self) -> None:
        """Do everything that is not done yet: idempotent, whatever became of earlier lives."""
        state = self.log.create()
        if (KIND, ID) not in state.collections:
            self.create()
        for unit in range(N_UNITS):
            if unit not in self.log.latest().collection(KIND, ID).units:
                self.add(unit)
        collection = self.log.latest().collection(KIND, ID)
        if not collection.is_sealed:
            key = f"runs/{ID}/whole-{self.client.attempt()}"
            whole = write_new(self.storage, key, [b"whole/" + self.salt.encode()], retry=NO_PAUSE)
            self.commit(
                [Seal(KIND, ID, collection.epoch, N_UNITS, collection.rows, (whole,), {"n": N_UNITS})]
            )
        self.acks.sealed = True
        for obj in self.log.latest().objects():
            read_verified(self.storage, obj)


def describe(key: str, body: bytes) -> StoredObject:
    import hashlib

    return StoredObject(key, len(body), hashlib.sha256(body).hexdigest())


def check_store(storage: Storage, acks: Acks, *, what: str) -> Iterator[str]:
    """Yield what a fresh, real reader finds wrong: a store opens, is whole, and holds all that was acknowledged."""
    try:
        state = CommitLog(storage).latest()
    except NotFoundError:
        if acks.created or acks.units:
            yield f"{what}: acknowledged work, and no store"
        return
    except ActstoreError as error:
        yield f"{what}: does not open: {error}"
        return
    report = fsck(storage, deep=True)
    yield from (f"{what}: fsck: {problem.message}" for problem in report.problems)
    yield from check_acks(storage, state, acks, what=what)


def check_acks(storage: Storage, state: State, acks: Acks, *, what: str) -> Iterator[str]:
    for txn in acks.refused:
        if state.txns.version_of(txn) is not None:
            yield f"{what}: a commit that failed is version {state.txns.version_of(txn)}"
    collection = state.collections.get((KIND, ID))
    if collection is None:
        if acks.created:
            yield f"{what}: acknowledged collection is gone"
        return
    for unit, (attempt, version) in acks.units.items():
        live = collection.units.get(unit)
        if live is None:
            yield f"{what}: acknowledged unit {unit} is gone"
        elif (live.attempt, live.version) != (attempt, version):
            yield f"{what}: unit {unit} was acknowledged as {attempt}@{version} and is {live.attempt}@{live.version}"
    if acks.sealed and not collection.is_sealed:
        yield f"{what}: acknowledged seal is gone"
    for live in collection.units.values():
        for j, obj in enumerate(live.objects):
            body = storage.get(obj.key)
            prefix = f"{live.unit}/{j}/{live.attempt}/".encode()
            if body is None or not body.startswith(prefix):
                yield f"{what}: object {j} of unit {live.unit} holds {body!r}"


def view(state: State) -> object:
    """Return what two stores must agree on: everything but attempts, versions and what names them."""
    return {
        name: (
            c.config,
            c.is_sealed,
            c.rows,
            {u.unit: (u.rows, u.nonfinite, len(u.objects), u.meta) for u in c.units.values()},
        )
        for name, c in state.collections.items()
    }


def n_operations(client: Client = Client()) -> list[tuple[str, str]]:
    """Return the operations of an undisturbed run."""
    storage = FaultStorage(fresh_memory(), {})
    Session(client, storage, Acks()).run()
    return storage.operations


def check_undisturbed(client: Client) -> Iterator[str]:
    """Yield the violations of a run without any fault."""
    storage = fresh_memory()
    acks = Acks()
    try:
        Session(client, storage, acks).run()
    except (ActstoreError, AssertionError) as error:
        yield f"undisturbed: {error}"
    yield from check_store(storage, acks, what="undisturbed")


def check_plan(client: Client, storage: Storage, plan: dict[int, Fault]) -> Iterator[str]:
    """Yield the violations of a run in which operations fail as planned, and of the run that completes it."""
    what = " ".join(f"{k}:{mode}" for k, mode in sorted(plan.items()))
    acks = Acks()
    faulty = FaultStorage(storage, plan)
    try:
        Session(client, faulty, acks).run()
    except (StorageError, Killed):
        pass
    except (ActstoreError, AssertionError) as error:
        yield f"{what}: a storage fault came out as {type(error).__name__}: {error}"
    yield from check_store(storage, acks, what=what)
    try:
        Session(client, storage, acks).run()
    except (ActstoreError, AssertionError) as error:
        yield f"{what}: the second run failed: {error}"
        return
    yield from check_store(storage, acks, what=f"{what}, completed")
    if view(CommitLog(storage).latest()) != UNDISTURBED:
        yield f"{what}: the completed store differs from an undisturbed one"


def check_faults(client: Client, fresh: Callable[[], Storage], modes: Sequence[Fault]) -> Iterator[str]:
    """Yield the violations of one fault at every operation in every mode."""
    operations = n_operations(client)
    for mode in modes:
        for k in range(len(operations)):
            yield from check_plan(client, fresh(), {k: mode})


def check_unknown_commits(client: Client) -> Iterator[str]:
    """Yield the violations when a manifest's answer is lost and reading it back fails too."""
    for k, (name, key) in enumerate(n_operations(client)):
        if name == "put_new" and key.startswith("manifests/"):
            yield from check_plan(client, fresh_memory(), {k: Fault.LOST_ANSWER, k + 1: Fault.ERROR_BEFORE})
            yield from check_plan(client, fresh_memory(), {k: Fault.TIMEOUT, k + 1: Fault.ERROR_BEFORE})


class Interposed(FaultStorage):
    """A storage that lets another client act right before operation `at`: every interleaving of two, one at a time."""

    def __init__(self, inner: Storage, at: int, act: Callable[[], object]) -> None:
        super().__init__(inner, {})
        self._at = at
        self._act = act

    def _next(self, name: str, key: str) -> Fault | None:
        fault = super()._next(name, key)
        if self.n_operations - 1 == self._at:
            self._act()
        return fault


def prepared() -> Storage:
    """Return a store with an empty collection that "another" client made."""
    storage = fresh_memory()
    log = new_log(storage)
    log.create()
    log.commit([Create(KIND, ID, CONFIG, {"who": "another"})], txn=uuid.uuid4().hex)
    return storage


def check_races(client: Client) -> Iterator[str]:
    """Yield the violations when another client commits at any operation of this one's commit."""
    for name, other in (("same unit", 0), ("another unit", 1)):
        for k in itertools.count():
            storage = prepared()
            mine, theirs = Acks(), Acks()
            rival = Session(Client(), storage, theirs)
            interposed = Interposed(storage, k, lambda rival=rival, other=other: rival.add(other))
            try:
                Session(client, interposed, mine).add(0)
            except (ActstoreError, AssertionError) as error:
                yield f"race at {k}, {name}: {error}"
            if interposed.n_operations <= k:
                break
            yield from check_store(storage, mine, what=f"race at {k}, {name}, mine")
            yield from check_store(storage, theirs, what=f"race at {k}, {name}, theirs")
            if other == 0 and len(mine.units) + len(theirs.units) != 1:
                yield f"race at {k}: unit 0 was acknowledged to {len(mine.units) + len(theirs.units)} clients"


def check_fencing(client: Client) -> Iterator[str]:
    """Yield the violations when a writer is fenced off at any operation of its commit."""
    for k in itertools.count():
        storage = prepared()
        fenced_at: list[int] = []

        def fence(storage: Storage = storage, fenced_at: list[int] = fenced_at) -> None:
            done = new_log(storage).commit([Fence(KIND, ID, 1)], txn=uuid.uuid4().hex)
            fenced_at.append(done.version)

        interposed = Interposed(storage, k, fence)
        acks = Acks()
        try:
            Session(client, interposed, acks).add(0)
        except ConflictError as error:
            if error.kind is not ErrorKind.FENCED:
                yield f"fenced at {k}: {error}"
        except ActstoreError as error:
            yield f"fenced at {k}: {error}"
        if interposed.n_operations <= k:
            break
        yield from check_store(storage, acks, what=f"fenced at {k}")
        if acks.units and acks.units[0][1] > fenced_at[0]:
            yield f"fenced at {k}: a zombie committed version {acks.units[0][1]} after the fence"


def check_tombs(client: Client) -> Iterator[str]:
    """Yield the violations when a vacuum announces the deletion of a slow writer's objects, and then deletes them."""
    for k in itertools.count():
        storage = prepared()
        attempt = new_attempt()

        def vacuum(storage: Storage = storage, attempt: str = attempt) -> None:
            keys = tuple(key for key in storage.list(f"runs/{ID}/") if attempt in key)
            if keys:
                log = new_log(storage)
                try:
                    log.commit([Tomb(keys, "2000-01-01T00:00:00Z")], txn=uuid.uuid4().hex)
                except ConflictError as error:
                    if error.kind is not ErrorKind.TOMBSTONED:
                        raise
                    return
                for key in keys:
                    storage.delete(key)

        interposed = Interposed(storage, k, vacuum)
        acks = Acks()
        try:
            Session(client, interposed, acks).add(0, attempt=attempt)
        except (ConflictError, FormatError) as error:
            if error.kind not in (ErrorKind.TOMBSTONED, ErrorKind.OBJECT_MISSING):
                yield f"vacuum at {k}: {error}"
        if interposed.n_operations <= k:
            break
        yield from check_store(storage, acks, what=f"vacuum at {k}")


def check_cut_history(client: Client) -> Iterator[str]:
    """Yield the violations when any one manifest is deleted: a reader gets the newest state or an error."""
    storage = fresh_memory()
    Session(Client(), storage, Acks()).run()
    newest = CommitLog(storage).latest()
    keys = list(storage.list("manifests/"))
    for key in keys:
        body = storage.get(key)
        assert body is not None
        storage.delete(key)
        try:
            found = client.log(client.wrap(storage)).latest()
            if found != newest:
                yield f"without {key}: served version {found.version} instead of {newest.version}"
        except FormatError:
            pass
        storage.put_new(key, [body])


def check_damaged_newest(client: Client) -> Iterator[str]:
    """Yield the violations when the newest manifest is changed in any small way: no change goes unnoticed."""
    storage = fresh_memory()
    Session(Client(), storage, Acks()).run()
    storage.delete("_hint")
    key = list(storage.list("manifests/"))[-1]
    body = storage.get(key)
    assert body is not None
    changed = [body + extra for extra in (b"\n", b" ", b"\0", b"{}", body)]
    changed += [body[:-1], body[:-9], b" " + body]
    for data in changed:
        storage.delete(key)
        storage.put_new(key, [data])
        try:
            client.log(client.wrap(storage)).latest()
        except FormatError:
            continue
        yield f"{key} was accepted with {len(data)} bytes instead of {len(body)}"


ALL_CHECKS: tuple[Callable[[Client], Iterator[str]], ...] = (
    check_undisturbed,
    check_races,
    check_fencing,
    check_tombs,
    check_cut_history,
    check_damaged_newest,
    check_unknown_commits,
    lambda client: check_faults(client, fresh_memory, [Fault.TIMEOUT, Fault.LOST_ANSWER, Fault.KILL_AFTER]),
)


def _undisturbed() -> object:
    storage = fresh_memory()
    Session(Client(), storage, Acks()).run()
    return view(CommitLog(storage).latest())


UNDISTURBED = _undisturbed()
