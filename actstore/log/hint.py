"""Where does a reader start, and how does it notice that the newest versions are gone? (FORMAT.md, section 4.7)

`_hint` is the only object that is ever overwritten. It says how far the history went when it was written and where a
checkpoint lies. Nothing is believed because of it: the versions it leads to are checked as any other, and a history that
ends before it is refused.
"""

from dataclasses import dataclass

from actstore.errors import FormatError
from actstore.log.actions import check_fields, damaged, parse_hex, parse_int
from actstore.log.canonical import check_exact, frame, unframe
from actstore.log.checkpoint import parse_checkpoint_key
from actstore.storage.base import Storage

HINT_KEY = "_hint"
_FIELDS = frozenset({"v", "sha256", "checkpoint"})
_MAX_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Hint:
    """What a committer left behind."""

    version: int
    """A version that was committed."""

    sha256: str
    """Of its manifest."""

    checkpoint: str | None
    """Key of the newest checkpoint at or before that version, if any was known."""


def encode_hint(hint: Hint) -> bytes:
    """Return the bytes of a hint.

    >>> decode_hint(encode_hint(Hint(3, "0" * 64, None))).version
    3
    """
    return frame({"v": hint.version, "sha256": hint.sha256, "checkpoint": hint.checkpoint})


def decode_hint(data: bytes) -> Hint:
    """Return the hint in `data`.

    Raises:
        FormatError: it is damaged.
    """
    if len(data) > _MAX_BYTES:
        raise damaged(f"{HINT_KEY} has {len(data)} bytes")
    plain = unframe(data)
    check_exact(plain, data[:-10])
    check_fields(plain, _FIELDS, "a hint")
    checkpoint = plain["checkpoint"]
    if checkpoint is not None and (
        not isinstance(checkpoint, str) or parse_checkpoint_key(checkpoint) is None
    ):
        raise damaged(f"{HINT_KEY} names the checkpoint {checkpoint!r}")
    return Hint(parse_int(plain["v"], "v"), parse_hex(plain["sha256"], 64, "sha256"), checkpoint)


def read_hint(storage: Storage) -> Hint | None:
    """Return the store's hint, or None when it is absent or damaged."""
    data = storage.get(HINT_KEY)
    if data is None:
        return None
    try:
        return decode_hint(data)
    except FormatError:
        return None
