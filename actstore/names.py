"""Which names may a store use, and which keys do they become?

Names of collections (corpora, tokenizations, runs, dictionaries) are chosen by users and become part of object keys, so
they are checked wherever they enter: CLI, Python, and again when a manifest is read (FORMAT.md, section 2).
"""

import re

from actstore.errors import ErrorKind, FormatError, InvalidInputError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}")
_KEY_PART = "[A-Za-z0-9_][A-Za-z0-9_.@~=-]{0,199}"
_KEY = re.compile(rf"{_KEY_PART}(?:/{_KEY_PART})*")
_RESERVED = frozenset(
    {"con", "prn", "aux", "nul", *(f"com{i}" for i in range(10)), *(f"lpt{i}" for i in range(10))}
)


def check_name(name: str, *, what: str) -> str:
    """Return `name` if it may name a collection.

    Args:
        name: One to 64 characters of `A-Z a-z 0-9 _ . @ -`, starting with a letter or a digit.
        what: What the name is for, as the error should call it ("run name").

    Raises:
        InvalidInputError: `name` could leave its folder, clash on a case-insensitive disk, or is reserved there.

    >>> check_name("pythia@demo", what="run name")
    'pythia@demo'
    """
    problem = None
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        problem = "must be 1 to 64 characters of A-Z a-z 0-9 _ . @ - and start with a letter or digit"
    elif ".." in name or name.endswith("."):
        problem = "must not contain '..' or end with '.'"
    elif name.split(".")[0].lower() in _RESERVED:
        problem = "is reserved on some file systems"
    if problem:
        raise InvalidInputError(ErrorKind.BAD_NAME, f"{what} {name!r} {problem}: choose another name")
    return name


def check_key(key: str) -> str:
    """Return `key` if it is a relative object key that cannot leave the store.

    Raises:
        FormatError: an empty, absolute, dotted or otherwise foreign key, as a hostile manifest might hold.

    >>> check_key("runs/a/layers.0.resid_post/c/0/0")
    'runs/a/layers.0.resid_post/c/0/0'
    """
    if not is_key(key):
        raise FormatError(ErrorKind.MANIFEST_DAMAGED, f"object key {key!r} is not one that actstore writes")
    return key


def is_key(key: str) -> bool:
    """Return whether `key` is one that `check_key` accepts."""
    return len(key) <= 900 and _KEY.fullmatch(key) is not None and ".." not in key


def hook_point_folder(hook_point: str) -> str:
    """Return the key part that stands for a hook point: the same text with `:` written as `~`.

    >>> hook_point_folder("module:model.layers.0.mlp.gate:output")
    'module~model.layers.0.mlp.gate~output'
    """
    return hook_point.replace(":", "~")
