"""What state does a list of actions make of another, and which actions are not allowed on it? (FORMAT.md, section 4.5)

`Fold` checks one action after the other against the state as the earlier ones left it, and gathers the changes; `finish`
makes the new state at the cost of the changes. A writer meets a broken rule as `ConflictError`, `NotFoundError` or
`InvalidInputError`; in a stored manifest the same thing is a `FormatError` (INVARIANT_BROKEN), because no writer may
publish it.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from actstore.errors import ConflictError, ErrorKind, FormatError, InvalidInputError, NotFoundError
from actstore.log.canonical import fingerprint
from actstore.log.entries import (
    MODULUS,
    collection_entry,
    entry_hash,
    epoch_entry,
    format_entry,
    seal_entry,
    tomb_entry,
    txn_entry,
    unit_entry,
)
from actstore.log.manifest import Manifest, manifest_key
from actstore.log.state import State
from actstore.log.txns import RecentTxns
from actstore.log.units import UnitMap
from actstore.log.values import Action, Add, Collection, Create, Fence, Format, Seal, StoredObject, Tomb, Unit


def apply(state: State | None, manifest: Manifest, *, sha256: str) -> State:
    """Return the state that a stored manifest makes of the state before it (None before version 0).

    Args:
        state: The state at `manifest.version - 1`.
        manifest: Decoded, thus well-formed.
        sha256: Of the manifest's bytes.

    Raises:
        FormatError: (INVARIANT_BROKEN) it does not follow on `state`, breaks a rule, or its `after` is not what comes out.
    """
    key = manifest_key(manifest.version)
    version, parent = (0, None) if state is None else (state.version + 1, state.manifest_sha256)
    if (manifest.version, manifest.parent) != (version, parent):
        raise broken(key, f"its parent is {manifest.parent}, and version {version - 1} has the hash {parent}")
    fold = Fold(state)
    try:
        for action in manifest.actions:
            if not fold.do(action):
                raise broken(key, f"it adds a unit that is live already: {_named(action)}")
        new = fold.finish(manifest.txn, sha256=sha256)
    except (ConflictError, NotFoundError, InvalidInputError) as error:
        raise broken(key, error.message) from error
    if new.after != manifest.after:
        raise broken(key, f"it announces {manifest.after}, and its actions lead to {new.after}")
    return new


def broken(key: str, problem: str) -> FormatError:
    """Return the error for a stored manifest that breaks a rule."""
    return FormatError(
        ErrorKind.INVARIANT_BROKEN,
        f"{key}: {problem}: the history was altered or written by a faulty writer; restore it from a backup",
    )


@dataclass(slots=True)
class _Change:
    """What the actions so far did to one collection."""

    base: Collection
    """As the state before has it, or as created now."""

    epoch: int
    units: dict[int, bytes] = field(default_factory=dict)
    """New units as entries: a third of a unit's memory, which a long job would otherwise hold for every unit it commits."""
    keys: list[str] = field(default_factory=list)
    """Keys of the new units' objects."""
    seal: Seal | None = None
    rows: int = 0
    nbytes: int = 0
    nonfinite: int = 0

    def has(self, unit: int) -> bool:
        return unit in self.units or unit in self.base.units


class Fold:
    """The state after some actions of the next version."""

    def __init__(self, state: State | None) -> None:
        self._state = state
        self.version = 0 if state is None else state.version + 1
        self._format = None if state is None else state.format
        self._changes: dict[tuple[str, str], _Change] = {}
        self._folded: dict[tuple[str, str], str] | None = None
        self._tombs: dict[str, str] = {}
        self._hash = 0 if state is None else state.hash_sum

    def do(self, action: Action) -> bool:
        """Apply one action; False when it is an `Add` of a unit that is live already, and nothing changed.

        Raises:
            ConflictError: another writer was first: ALREADY_EXISTS, CONFIG_DIFFERS, FENCED, SEALED, COUNT_DIFFERS,
            TOMBSTONED. NotFoundError: the collection does not exist.
            InvalidInputError: no state allows the action.
        """
        if isinstance(action, Format) != (self._format is None):
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT, "the format is the first action of version 0 and stands nowhere else"
            )
        match action:
            case Add():
                return self._add(action)
            case Format():
                self._format = action
                self._hash += entry_hash(format_entry(action))
            case Create():
                self._create(action)
            case Fence():
                self._fence(action)
            case Seal():
                self._seal(action)
            case Tomb():
                self._tomb(action)
        return True

    def finish(self, txn: str, *, sha256: str) -> State:
        """Return the new state, made by transaction `txn` and stored as the manifest of hash `sha256`.

        Raises:
            InvalidInputError: `txn` made a recent version already, or version 0 states no format.
        """
        if self._format is None:
            raise InvalidInputError(ErrorKind.BAD_ARGUMENT, "version 0 must state the store's format")
        old = self._state
        txns = RecentTxns() if old is None else old.txns
        earlier, gone = txns.version_of(txn), txns.oldest_to_go(self.version)
        if earlier is not None:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT, f"transaction {txn!r} made version {earlier} already"
            )
        total = self._hash + entry_hash(txn_entry(txn, self.version))
        if gone is not None:
            total -= entry_hash(txn_entry(gone[1], gone[0]))
        collections = dict(old.collections) if old is not None else {}
        for name, change in self._changes.items():
            collections[name] = _changed(change)
        return State(
            version=self.version,
            manifest_sha256=sha256,
            format=self._format,
            collections=collections,
            txns=txns.added(txn, self.version),
            tombs=({} if old is None else old.tombs) if not self._tombs else self._all_tombs(),
            hash_sum=total % MODULUS,
            n_units=(0 if old is None else old.n_units) + sum(len(c.units) for c in self._changes.values()),
            n_rows=(0 if old is None else old.n_rows) + sum(c.rows for c in self._changes.values()),
            nbytes=(0 if old is None else old.nbytes) + sum(c.nbytes for c in self._changes.values()),
        )

    def _create(self, action: Create) -> None:
        name = (action.kind, action.id)
        folded = self._folded_ids()
        known = folded.get((action.kind, action.id.lower()))
        if known is not None:
            raise _exists(action, self._change(action.kind, known).base)
        collection = Collection(
            kind=action.kind,
            id=action.id,
            config=action.config,
            fingerprint=fingerprint(action.config),
            info=action.info,
            version=self.version,
            units=UnitMap(),
        )
        folded[action.kind, action.id.lower()] = action.id
        self._changes[name] = _Change(base=collection, epoch=0)
        self._hash += entry_hash(collection_entry(collection))

    def _fence(self, action: Fence) -> None:
        change = self._change(action.kind, action.id)
        if action.epoch <= change.epoch:
            raise ConflictError(
                ErrorKind.FENCED,
                f"cannot fence {action.kind} {action.id!r} with epoch {action.epoch}: it is at epoch {change.epoch} "
                "already; read the store again and take a greater one",
            )
        if change.epoch:
            self._hash -= entry_hash(epoch_entry(action.kind, action.id, change.epoch))
        change.epoch = action.epoch
        self._hash += entry_hash(epoch_entry(action.kind, action.id, action.epoch))

    def _add(self, action: Add) -> bool:
        change = self._change(action.kind, action.id)
        self._check_epoch(action, change)
        if action.fingerprint != change.base.fingerprint:
            raise ConflictError(
                ErrorKind.CONFIG_DIFFERS,
                f"{_named(action)} was made for the configuration {action.fingerprint}, and the collection has "
                f"{change.base.fingerprint}: use the collection's configuration or another name",
            )
        if change.has(action.unit):
            return False
        if change.seal is not None:
            raise ConflictError(
                ErrorKind.SEALED, f"{_named(action)} cannot be added: the collection is complete and sealed"
            )
        self._check_not_tombstoned(action.objects, _named(action))
        unit = Unit(
            unit=action.unit,
            rows=action.rows,
            nonfinite=action.nonfinite,
            attempt=action.attempt,
            objects=action.objects,
            meta=action.meta,
            version=self.version,
        )
        entry = change.units[action.unit] = unit_entry(action.kind, action.id, unit)
        change.keys += [obj.key for obj in unit.objects]
        change.rows += unit.rows
        change.nonfinite += unit.nonfinite
        change.nbytes += sum(obj.nbytes for obj in unit.objects)
        self._hash += entry_hash(entry)
        return True

    def _seal(self, action: Seal) -> None:
        change = self._change(action.kind, action.id)
        self._check_epoch(action, change)
        if change.seal is not None:
            raise ConflictError(
                ErrorKind.SEALED,
                f"{_named(action)} is sealed already: read the store again, nothing is left to do",
            )
        found = (len(change.base.units) + len(change.units), change.base.rows + change.rows)
        if (action.units, action.rows) != found:
            raise ConflictError(
                ErrorKind.COUNT_DIFFERS,
                f"cannot seal {_named(action)} with {action.units} units and {action.rows} rows: it has {found[0]} "
                f"units and {found[1]} rows; read the store again and complete it",
            )
        self._check_not_tombstoned(action.objects, _named(action))
        change.seal = action
        change.nbytes += sum(obj.nbytes for obj in action.objects)
        self._hash += entry_hash(seal_entry(action))

    def _tomb(self, action: Tomb) -> None:
        keys = set(action.keys)
        live = keys & self._live_keys()
        if live:
            raise ConflictError(
                ErrorKind.TOMBSTONED,
                f"cannot announce the deletion of {sorted(live)[:5]}: live units or seals refer to {len(live)} of the "
                f"{len(keys)} keys; read the store again and plan anew",
            )
        known = self._all_tombs()
        again = sorted(keys & known.keys())
        if again:
            raise ConflictError(
                ErrorKind.TOMBSTONED,
                f"the deletion of {again[:5]} is announced already: read the store again and plan anew",
            )
        for key in action.keys:
            self._tombs[key] = action.not_before
            self._hash += entry_hash(tomb_entry(key, action.not_before))

    def _change(self, kind: str, id: str) -> _Change:
        change = self._changes.get((kind, id))
        if change is None:
            if self._state is None:
                raise NotFoundError(
                    ErrorKind.COLLECTION_NOT_FOUND, f"no {kind} {id!r} in a store without any"
                )
            base = self._state.collection(kind, id)
            change = self._changes[kind, id] = _Change(base=base, epoch=base.epoch, seal=base.seal)
        return change

    def _check_epoch(self, action: Add | Seal, change: _Change) -> None:
        if action.epoch < change.epoch:
            raise ConflictError(
                ErrorKind.FENCED,
                f"{_named(action)} comes from a writer of epoch {action.epoch}, and the collection was fenced at epoch "
                f"{change.epoch}: another writer took over; stop this one",
            )
        if action.epoch > change.epoch:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"{_named(action)} claims epoch {action.epoch}, and the collection is at epoch {change.epoch}: commit a "
                "Fence to that epoch first",
            )

    def _check_not_tombstoned(self, objects: Iterable[StoredObject], what: str) -> None:
        old = {} if self._state is None else self._state.tombs
        for obj in objects:
            if obj.key in self._tombs or obj.key in old:
                raise ConflictError(
                    ErrorKind.TOMBSTONED,
                    f"{what} refers to {obj.key!r}, whose deletion was announced: write the data again as a new attempt",
                )

    def _folded_ids(self) -> dict[tuple[str, str], str]:
        if self._folded is None:
            names = [] if self._state is None else self._state.collections
            self._folded = {(kind, id.lower()): id for kind, id in names}
        return self._folded

    def _all_tombs(self) -> dict[str, str]:
        return {**({} if self._state is None else self._state.tombs), **self._tombs}

    def _live_keys(self) -> set[str]:
        keys = set() if self._state is None else {obj.key for obj in self._state.objects()}
        for change in self._changes.values():
            keys.update(change.keys)
            keys.update(obj.key for obj in (change.seal.objects if change.seal else ()))
        return keys


def differing_keys(old: Any, new: Any, where: str = "") -> list[str]:
    """Return `key: old != new` for every place where two configurations differ.

    >>> differing_keys({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2})
    ['a.b: 1 in the store, 3 asked for']
    """
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted(old.keys() | new.keys()):
            at = f"{where}.{key}" if where else key
            if key not in old:
                lines.append(f"{at}: absent in the store, {new[key]!r} asked for")
            elif key not in new:
                lines.append(f"{at}: {old[key]!r} in the store, absent in what was asked for")
            else:
                lines += differing_keys(old[key], new[key], at)
        return lines
    return (
        [] if old == new and type(old) is type(new) else [f"{where}: {old!r} in the store, {new!r} asked for"]
    )


def _exists(action: Create, known: Collection) -> ConflictError:
    differences = differing_keys(known.config, action.config) if known.id == action.id else []
    if differences:
        return ConflictError(
            ErrorKind.CONFIG_DIFFERS,
            f"{action.kind} {action.id!r} exists with another configuration ({'; '.join(differences)}): use that "
            "configuration or another name",
        )
    return ConflictError(
        ErrorKind.ALREADY_EXISTS,
        f"cannot create {action.kind} {action.id!r}: {known.id!r} exists since version {known.version}; open it, or use "
        "another name (case does not tell names apart)",
    )


def _changed(change: _Change) -> Collection:
    base = change.base
    units = base.units
    assert isinstance(units, UnitMap)  # nothing else makes the collections of a State
    return dataclasses.replace(
        base,
        epoch=change.epoch,
        units=units.with_entries(change.units) if change.units else units,
        seal=change.seal,
        rows=base.rows + change.rows,
        nbytes=base.nbytes + change.nbytes,
        nonfinite=base.nonfinite + change.nonfinite,
    )


def _named(action: Action) -> str:
    if isinstance(action, Add):
        return f"unit {action.unit} of {action.kind} {action.id!r}"
    return f"{getattr(action, 'kind', 'store')} {getattr(action, 'id', '')!r}"
