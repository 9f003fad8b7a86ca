"""How is the state at a version, or at the newest, found in a store? (FORMAT.md, section 4.8)

Start from a checkpoint, check it against the manifest of its version, then apply every later manifest. What is served is
the newest version or an error: where the hint, or without it a listing, shows that versions are missing, no older state is
handed out in their place.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from actstore.errors import ErrorKind, FormatError, NotFoundError
from actstore.log.checkpoint import CHECKPOINTS, CheckpointKey, decode_checkpoint, parse_checkpoint_key
from actstore.log.fold import apply
from actstore.log.hint import Hint, read_hint
from actstore.log.manifest import MANIFESTS, decode, manifest_key, parse_manifest_key, sha256_hex
from actstore.log.state import State
from actstore.log.tail import check_listing, read_tail, truncated
from actstore.storage.base import Storage


@dataclass(frozen=True, slots=True)
class Position:
    """A state, and what there is to know for the next checkpoint and hint."""

    state: State
    checkpoint: str | None = None
    """Key of the newest checkpoint that is known, at or before the state."""

    checkpoint_version: int = 0
    checkpoint_bytes: int = 0
    tail_bytes: int = 0
    """Of the manifests since that checkpoint, or since version 0."""


def load(storage: Storage) -> Position:
    """Return the newest state of a store.

    Costs one read of the hint, of version 0, of a checkpoint and of its version, and one for each version since; plus a
    listing of all versions when the hint is absent or damaged.

    Raises:
        NotFoundError: (STORE_NOT_FOUND) there is no store.
        FormatError: HISTORY_TRUNCATED, MANIFEST_DAMAGED, INVARIANT_BROKEN or FORMAT_TOO_NEW.
    """
    hint = read_hint(storage)
    first = storage.get(manifest_key(0))
    if first is None:
        first = _first_after_all(storage, hint)
    origin = Position(apply(None, decode(first, version=0), sha256=sha256_hex(first)), tail_bytes=len(first))
    start = _from_checkpoint(storage, hint) or origin
    if hint is not None:
        return _load_to(storage, start, hint)
    position = advance(storage, start)
    listed = check_listing(storage)
    if listed > position.state.version:
        position = advance(storage, position, known=listed)
    return position


def advance(storage: Storage, position: Position, *, known: int = -1) -> Position:
    """Return the newest position from `position` on; one read when nothing is new.

    Args:
        storage: Where the store is.
        position: Where to start.
        known: A version that certainly was committed.

    Raises:
        FormatError: as `load`.
    """
    return _fold_tail(position, read_tail(storage, position.state.version + 1, known=known))


def at(storage: Storage, version: int, newest: State) -> State:
    """Return the state at a version that is not newer than `newest`, from the nearest checkpoint at or before it.

    Raises:
        NotFoundError: (VERSION_NOT_FOUND) `version` is not in `[0, newest.version]`.
        FormatError: as `load`.
    """
    if not 0 <= version <= newest.version:
        raise NotFoundError(
            ErrorKind.VERSION_NOT_FOUND,
            f"no version {version}: the store has the versions 0 to {newest.version}",
        )
    if version == newest.version:
        return newest
    start = next(_usable(storage, _listed(storage, version)), None)
    if start is None:
        first = _get(storage, 0)
        start = Position(apply(None, decode(first, version=0), sha256=sha256_hex(first)))
    state = start.state
    tail = read_tail(storage, state.version + 1, known=version) if state.version < version else iter(())
    for v, data in tail:
        state = apply(state, decode(data, version=v), sha256=sha256_hex(data))
        if v == version:
            break
    return state


def read_checkpoint(storage: Storage, name: CheckpointKey) -> Position:
    """Return the state in a checkpoint, checked against the manifest of its version.

    Raises:
        FormatError: the checkpoint or that manifest is missing or damaged, or they disagree.
    """
    data = storage.get(name.key)
    if data is None:
        raise FormatError(ErrorKind.OBJECT_MISSING, f"{name.key} is missing: another one will be used")
    state = decode_checkpoint(data, name)
    manifest_bytes = _get(storage, name.version)
    manifest = decode(manifest_bytes, version=name.version)
    if sha256_hex(manifest_bytes) != state.manifest_sha256 or state.after != manifest.after:
        raise FormatError(
            ErrorKind.OBJECT_DAMAGED,
            f"{name.key} holds {state.after}, and its version {manifest.after}: remove it",
        )
    return Position(
        state, checkpoint=name.key, checkpoint_version=name.version, checkpoint_bytes=len(data), tail_bytes=0
    )


def _load_to(storage: Storage, start: Position, hint: Hint) -> Position:
    if hint.version <= start.state.version:
        _check_hint(hint, sha256_hex(_get(storage, hint.version)))
        return advance(storage, start)
    versions = _noting(read_tail(storage, start.state.version + 1, known=hint.version), hint)
    return _fold_tail(start, versions)


def _noting(versions: Iterable[tuple[int, bytes]], hint: Hint) -> Iterator[tuple[int, bytes]]:
    for version, data in versions:
        if version == hint.version:
            _check_hint(hint, sha256_hex(data))
        yield version, data


def _check_hint(hint: Hint, sha256: str) -> None:
    if sha256 != hint.sha256:
        raise FormatError(
            ErrorKind.HISTORY_TRUNCATED,
            f"{manifest_key(hint.version)} has the SHA-256 {sha256}, and the hint says that {hint.sha256} was "
            "committed: the history was replaced; restore it from a backup (if this history is the right one, remove "
            "the object _hint)",
        )


def _fold_tail(position: Position, versions: Iterable[tuple[int, bytes]]) -> Position:
    state, tail_bytes = position.state, position.tail_bytes
    for version, data in versions:
        state = apply(state, decode(data, version=version), sha256=sha256_hex(data))
        tail_bytes += len(data)
    if state is position.state:
        return position
    return Position(
        state, position.checkpoint, position.checkpoint_version, position.checkpoint_bytes, tail_bytes
    )


def _from_checkpoint(storage: Storage, hint: Hint | None) -> Position | None:
    if hint is not None and hint.checkpoint is None:
        return None
    named = parse_checkpoint_key(hint.checkpoint) if hint is not None and hint.checkpoint else None
    names = [named] if named is not None else _listed(storage, None)
    position = next(_usable(storage, names), None)
    if position is None and named is not None:
        position = next(_usable(storage, _listed(storage, None)), None)
    return position


def _listed(storage: Storage, version: int | None) -> list[CheckpointKey]:
    """Return the checkpoints at or before `version` (None for all), newest first."""
    names = [name for key in storage.list(CHECKPOINTS) if (name := parse_checkpoint_key(key)) is not None]
    return [name for name in reversed(names) if version is None or name.version <= version]


def _usable(storage: Storage, names: Iterable[CheckpointKey]) -> Iterator[Position]:
    for name in names:
        try:
            position = read_checkpoint(storage, name)
        except FormatError:
            # Derived data: an older one, or the manifests themselves, lead to the same state. fsck reports it.
            continue
        yield position


def _get(storage: Storage, version: int) -> bytes:
    data = storage.get(manifest_key(version))
    if data is None:
        raise truncated(version, "a later version, a checkpoint or the hint refers to it")
    return data


def _first_after_all(storage: Storage, hint: Hint | None) -> bytes:
    if hint is not None:
        raise truncated(0, f"the hint says that version {hint.version} was committed")
    seen = next((key for key in storage.list(MANIFESTS) if parse_manifest_key(key) is not None), None)
    if seen is None:
        raise NotFoundError(
            ErrorKind.STORE_NOT_FOUND,
            f"there is no store at {storage.url!r}: check the address, or create one",
        )
    # The listing came later than the read: someone may have made the store in between.
    first = storage.get(manifest_key(0))
    if first is None:
        raise truncated(0, f"{seen} is there")
    return first


def newest_checkpoint(storage: Storage, version: int) -> CheckpointKey | None:
    """Return the newest checkpoint at or before `version` that a listing shows, not opened."""
    return next(iter(_listed(storage, version)), None)
