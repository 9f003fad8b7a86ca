"""What does a committer leave behind for the readers to come? (FORMAT.md, sections 4.6 and 4.7)

A checkpoint now and then, and a hint after every commit. Both are derived and best effort: the version they follow is
durable before, whatever becomes of them.
"""

from dataclasses import replace

from actstore.log import history
from actstore.log.checkpoint import encode_checkpoint, is_due
from actstore.log.hint import HINT_KEY, Hint, encode_hint, read_hint
from actstore.log.history import Position
from actstore.storage.base import PutOutcome, Storage


def leave_checkpoint(storage: Storage, position: Position, *, every: int) -> Position:
    """Write a checkpoint of the position if one is due, and return the position with its newest checkpoint.

    Cost: nothing when none is due; else a listing of the checkpoints, and one object of about 70 bytes per unit.

    Args:
        storage: Where the store is.
        position: As of the newest version.
        every: Versions between two checkpoints at least.

    Raises:
        StorageError: the storage failed; nothing depends on it.
    """
    due = is_due(
        versions=position.state.version - position.checkpoint_version,
        every=every,
        manifest_bytes=position.tail_bytes,
        checkpoint_bytes=position.checkpoint_bytes,
    )
    if not due:
        return position
    newest = history.newest_checkpoint(storage, position.state.version)
    if newest is not None and newest.version > position.checkpoint_version:
        # Another writer was first: count from its checkpoint on.
        nbytes = storage.head(newest.key) or 0
        return _after(position, newest.key, newest.version, nbytes)
    key, data = encode_checkpoint(position.state)
    if storage.put_new(key, [data]) is PutOutcome.UNKNOWN:
        return position
    return _after(position, key, position.state.version, len(data))


def leave_hint(storage: Storage, position: Position) -> None:
    """Let the hint name the position, unless it names a later one.

    Raises:
        StorageError: the storage failed; nothing depends on it.
    """
    known = read_hint(storage)
    state = position.state
    if known is None or known.version < state.version:
        # Two writers may still overtake each other here; the next commit puts it right.
        hint = Hint(state.version, state.manifest_sha256, position.checkpoint)
        storage.put_hint(HINT_KEY, encode_hint(hint))


def _after(position: Position, key: str, version: int, nbytes: int) -> Position:
    return replace(
        position, checkpoint=key, checkpoint_version=version, checkpoint_bytes=nbytes, tail_bytes=0
    )
