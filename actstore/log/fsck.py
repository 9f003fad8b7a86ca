"""Is every byte of the store what the history promises? (FORMAT.md, section 12)

`fsck` trusts nothing that is derived: it reads every manifest from version 0 on, folds them without any checkpoint, and
then looks at every promised object: its length, and with `deep` its SHA-256. It changes nothing, needs memory for one state
and a few ranges of bytes, and may run while others write; what they add meanwhile may show as orphans.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

from actstore.errors import ErrorKind, FormatError
from actstore.log.actions import RESERVED
from actstore.log.checkpoint import CHECKPOINTS, CheckpointKey, decode_checkpoint, parse_checkpoint_key
from actstore.log.fold import apply
from actstore.log.hint import HINT_KEY, Hint, decode_hint
from actstore.log.index_invariants import broken_indexes
from actstore.log.manifest import MANIFESTS, decode, manifest_key, parse_manifest_key, sha256_hex
from actstore.log.state import State
from actstore.log.tail import read_tail
from actstore.log.values import StoredObject
from actstore.storage.base import Storage

MAX_LISTED = 1000
"""Problems and orphans beyond that many are counted and not named."""

_RANGE_BYTES = 8 << 20
_THREADS = 16
_BATCH = 1024
_FEW = 16
"""So many objects are looked at before threads are started."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as FORMAT.md says."""

    kind: ErrorKind
    key: str
    """The object it was found at."""

    message: str
    """What was found, and what to do."""


@dataclass(frozen=True, slots=True)
class FsckReport:
    """What `fsck` found."""

    url: str
    version: int
    """The newest version that is whole, with all before it; -1 if there is none."""

    n_units: int
    n_objects: int
    nbytes: int
    """Of all live objects."""

    nbytes_hashed: int
    """How many of them were read and compared with their SHA-256."""

    problems: tuple[Problem, ...]
    """Damage: answers from this store may fail, or its history is not whole."""

    n_problems: int
    warnings: tuple[Problem, ...]
    """Derived objects that are damaged or foreign: they cost time, and may be removed."""

    orphans: tuple[str, ...]
    """Keys that nothing refers to: left by attempts that were not committed, or by ones still running. Information."""

    n_orphans: int
    n_tombstoned: int
    """Objects whose deletion was announced and is still to come."""

    @property
    def is_clean(self) -> bool:
        """Whether there is no damage."""
        return self.n_problems == 0


def fsck(storage: Storage, *, deep: bool) -> FsckReport:
    """Return what is wrong with a store, having changed nothing.

    Reads every manifest and looks at every live object's length; with `deep` it reads all of them.

    Args:
        storage: Where the store is.
        deep: Whether to compare the SHA-256 of every live object, and to open every checkpoint.

    Raises:
        StorageError: the storage failed: nothing is known then, and in particular not that something is missing.
    """
    found = _Findings()
    chain = _check_chain(storage, found)
    _check_derived(storage, chain, deep=deep, found=found)
    n_objects = nbytes = 0
    if chain.state is not None:
        live = _live_objects(chain.state, found)
        n_objects, nbytes = len(live), sum(obj.nbytes for obj in live.values())
        for folder, problem in broken_indexes(chain.state):
            found.problem(ErrorKind.INVARIANT_BROKEN, folder, f"{folder}: {problem}: build the index again")
        _check_objects(storage, live.values(), deep=deep, found=found)
        _count_others(storage, live.keys(), chain.state.tombs.keys(), found)
    return FsckReport(
        url=storage.url,
        version=-1 if chain.state is None else chain.state.version,
        n_units=0 if chain.state is None else chain.state.n_units,
        n_objects=n_objects,
        nbytes=nbytes,
        nbytes_hashed=found.nbytes_hashed,
        problems=tuple(found.problems),
        n_problems=found.n_problems,
        warnings=tuple(found.warnings),
        orphans=tuple(found.orphans),
        n_orphans=found.n_orphans,
        n_tombstoned=found.n_tombstoned,
    )


@dataclass(slots=True)
class _Findings:
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    n_problems: int = 0
    n_orphans: int = 0
    n_tombstoned: int = 0
    nbytes_hashed: int = 0

    def problem(self, kind: ErrorKind, key: str, message: str) -> None:
        self.n_problems += 1
        if len(self.problems) < MAX_LISTED:
            self.problems.append(Problem(kind, key, message))

    def warn(self, kind: ErrorKind, key: str, message: str) -> None:
        if len(self.warnings) < MAX_LISTED:
            self.warnings.append(Problem(kind, key, message))

    def orphan(self, key: str) -> None:
        self.n_orphans += 1
        if len(self.orphans) < MAX_LISTED:
            self.orphans.append(key)


@dataclass(frozen=True, slots=True)
class _Chain:
    state: State | None
    """Of the newest version that follows whole from version 0."""

    marks: dict[int, tuple[str, str]]
    """Version to manifest hash and state hash, for the versions that checkpoints and the hint name."""

    checkpoints: tuple[CheckpointKey, ...]
    hint: Hint | None


def _check_chain(storage: Storage, found: _Findings) -> _Chain:
    """Fold every version from 0 on (I2, I3, I5 to I7, I9)."""
    hint = _read_hint(storage, found)
    checkpoints = tuple(_list_checkpoints(storage, found))
    newest = _check_versions_listed(storage, found)
    wanted = {name.version for name in checkpoints} | ({hint.version} if hint else set())
    marks: dict[int, tuple[str, str]] = {}
    state: State | None = None
    txns: dict[bytes, int] = {}
    version = 0
    try:
        for version, data in read_tail(storage, 0, known=newest):
            manifest = decode(data, version=version)
            state = apply(state, manifest, sha256=sha256_hex(data))
            if version in wanted:
                marks[version] = (state.manifest_sha256, manifest.after.state)
            txn = hashlib.sha256(manifest.txn.encode()).digest()[:16]
            first = txns.setdefault(txn, version)
            if first != version:
                found.problem(
                    ErrorKind.INVARIANT_BROKEN,
                    manifest_key(version),
                    f"transaction {manifest.txn!r} made version {first} already: two clients used the same name",
                )
    except FormatError as error:
        if error.kind is not ErrorKind.HISTORY_TRUNCATED:
            found.problem(error.kind, manifest_key(version), error.message)
    if state is None and newest < 0 and hint is None:
        found.problem(
            ErrorKind.STORE_NOT_FOUND,
            manifest_key(0),
            f"there is no store at {storage.url!r}: check the address",
        )
    return _Chain(state, marks, checkpoints, hint)


def _check_versions_listed(storage: Storage, found: _Findings) -> int:
    """Return the newest version in a listing (-1: none), reporting gaps and foreign keys (I2)."""
    expected = 0
    for key in storage.list(MANIFESTS):
        version = parse_manifest_key(key)
        if version is None:
            found.warn(
                ErrorKind.MANIFEST_DAMAGED, key, f"{key} is not an object of the version log: remove it"
            )
            continue
        for gap in range(expected, min(version, expected + MAX_LISTED)):
            if storage.head(manifest_key(gap)) is None:
                found.problem(
                    ErrorKind.HISTORY_TRUNCATED,
                    manifest_key(gap),
                    f"{manifest_key(gap)} is missing although version {version} is there: restore it from a backup",
                )
        expected = version + 1
    return expected - 1


def _read_hint(storage: Storage, found: _Findings) -> Hint | None:
    data = storage.get(HINT_KEY)
    if data is None:
        found.warn(
            ErrorKind.OBJECT_MISSING,
            HINT_KEY,
            f"{HINT_KEY} is absent: the next commit writes it; opening is slower",
        )
        return None
    try:
        return decode_hint(data)
    except FormatError as error:
        message = f"{HINT_KEY} is damaged ({error.message}): the next commit writes it anew; opening is slower until then"
        found.warn(ErrorKind.OBJECT_DAMAGED, HINT_KEY, message)
        return None


def _list_checkpoints(storage: Storage, found: _Findings) -> Iterator[CheckpointKey]:
    for key in storage.list(CHECKPOINTS):
        name = parse_checkpoint_key(key)
        if name is None:
            found.warn(ErrorKind.OBJECT_DAMAGED, key, f"{key} is not a checkpoint: remove it")
        else:
            yield name


def _check_derived(storage: Storage, chain: _Chain, *, deep: bool, found: _Findings) -> None:
    """Compare the hint and the checkpoints with the chain (I6)."""
    version = -1 if chain.state is None else chain.state.version
    hint = chain.hint
    if hint is not None and hint.version > version and found.n_problems == 0:
        found.problem(
            ErrorKind.HISTORY_TRUNCATED,
            manifest_key(version + 1),
            f"{manifest_key(version + 1)} is missing: the hint says that version {hint.version} was committed; restore the "
            f"missing manifests from a backup (if the hint is wrong, remove {HINT_KEY})",
        )
    if hint is not None and hint.version in chain.marks and chain.marks[hint.version][0] != hint.sha256:
        found.problem(
            ErrorKind.HISTORY_TRUNCATED,
            manifest_key(hint.version),
            f"the hint says that a manifest of SHA-256 {hint.sha256} was committed here, found "
            f"{chain.marks[hint.version][0]}: the history was replaced; restore it from a backup",
        )
    for name in chain.checkpoints if deep else chain.checkpoints[-1:]:
        problem = _checkpoint_problem(storage, name, chain.marks.get(name.version))
        if problem:
            found.warn(
                ErrorKind.OBJECT_DAMAGED,
                name.key,
                f"{problem}: readers pass over it; remove the object {name.key}",
            )


def _checkpoint_problem(storage: Storage, name: CheckpointKey, mark: tuple[str, str] | None) -> str | None:
    data = storage.get(name.key)
    if data is None:
        return "the checkpoint vanished while it was checked"
    if mark is None:
        return f"the checkpoint is of version {name.version}, which the history does not have whole"
    try:
        state = decode_checkpoint(data, name)
    except FormatError as error:
        return f"the checkpoint is damaged ({error.message})"
    if (state.manifest_sha256, state.after.state) != mark:
        return (
            f"the checkpoint holds the state {state.after.state}, and version {name.version} says {mark[1]}"
        )
    return None


def _live_objects(state: State, found: _Findings) -> dict[str, StoredObject]:
    """Return every live object by key, reporting keys that are promised twice (I1)."""
    live: dict[str, StoredObject] = {}
    for obj in state.objects():
        if live.setdefault(obj.key, obj) is not obj:
            found.problem(
                ErrorKind.INVARIANT_BROKEN,
                obj.key,
                f"{obj.key} belongs to two units: one of them was written by a faulty writer",
            )
    return live


def _check_objects(
    storage: Storage, objects: Iterable[StoredObject], *, deep: bool, found: _Findings
) -> None:
    """Look at every promised object (I4)."""

    def check(obj: StoredObject) -> tuple[StoredObject, int | None, str | None]:
        size = storage.head(obj.key)
        sha256 = _hash(storage, obj) if deep and size == obj.nbytes else None
        return obj, size, sha256

    for obj, size, sha256 in _mapped(check, objects, threads=_THREADS if deep else 2 * _THREADS):
        advice = "restore it from a backup, or write the unit again into a new collection"
        if size is None:
            found.problem(
                ErrorKind.OBJECT_MISSING, obj.key, f"{obj.key} ({obj.nbytes} bytes) is missing: {advice}"
            )
        elif size != obj.nbytes:
            found.problem(
                ErrorKind.OBJECT_DAMAGED,
                obj.key,
                f"{obj.key} has {size} bytes instead of {obj.nbytes}: {advice}",
            )
        elif deep:
            found.nbytes_hashed += obj.nbytes
            if sha256 != obj.sha256:
                message = f"{obj.key} has the SHA-256 {sha256} instead of {obj.sha256}: {advice}"
                found.problem(ErrorKind.OBJECT_DAMAGED, obj.key, message)


def _hash(storage: Storage, obj: StoredObject) -> str | None:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(_RANGE_BYTES, obj.nbytes)))
    for start in range(0, obj.nbytes, _RANGE_BYTES):
        n = storage.read_into(obj.key, start, buffer[: min(_RANGE_BYTES, obj.nbytes - start)])
        if n is None:
            return None
        digest.update(buffer[:n])
    return digest.hexdigest()


def _count_others(storage: Storage, live: Iterable[str], tombstoned: Iterable[str], found: _Findings) -> None:
    known, tombs = set(live), set(tombstoned)
    for key in storage.list(""):
        if key.partition("/")[0] in RESERVED or key in known:
            continue
        if key in tombs:
            found.n_tombstoned += 1
        else:
            found.orphan(key)


def _mapped(function: Callable[[T], R], items: Iterable[T], *, threads: int) -> Iterator[R]:
    """Yield results in order, with at most a batch of items in flight."""
    remaining = iter(items)
    few = list(islice(remaining, _FEW))
    yield from map(function, few)
    if len(few) < _FEW:
        return
    with ThreadPoolExecutor(threads) as pool:
        while batch := list(islice(remaining, _BATCH)):
            yield from pool.map(function, batch)


def describe(report: FsckReport) -> Sequence[str]:
    """Return the lines that tell a person what was found."""
    lines = [
        f"{report.url}: version {report.version}, {report.n_units} units, {report.n_objects} objects, {report.nbytes} bytes",
        *(f"PROBLEM [{p.kind}] {p.message}" for p in report.problems),
        *(f"warning [{p.kind}] {p.message}" for p in report.warnings),
    ]
    if report.n_problems > len(report.problems):
        lines.append(f"... and {report.n_problems - len(report.problems)} more problems")
    if report.n_orphans:
        lines.append(
            f"{report.n_orphans} objects belong to no version: left by attempts that failed, or by ones still running"
        )
    lines.append("clean" if report.is_clean else f"{report.n_problems} problems")
    return lines
