"""How is an action written in a manifest, and what is accepted when one is read? (FORMAT.md, section 4.3)

`dump_*` turn values into plain JSON, `parse_*` turn JSON of unknown origin into values: every field is there, of the right
type and within bounds, every name and key is one that actstore writes, and nothing is left over. What this version does not
know is refused as too new, never skipped. Parsing errors say what is wrong; the caller adds which object it is in.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from actstore.errors import ErrorKind, FormatError, InvalidInputError
from actstore.log.values import Action, Add, Create, Fence, Format, Json, Seal, StoredObject, Tomb
from actstore.names import check_key, check_name, is_key

INT_END = 1 << 63
"""Counts, sizes and versions are below this: they fit an int64."""

RESERVED = frozenset({"manifests", "checkpoints", "probe", "_hint"})
"""First key parts that no unit, seal or tomb may name: a deletion announced there could cut the history."""

_RESERVED_STARTS = tuple(RESERVED)
_KIND = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_HEX = {n: re.compile(rf"[0-9a-f]{{{n}}}") for n in (32, 64)}
_SHA256 = _HEX[64].fullmatch
_TXN = re.compile(r"[!-~]{1,200}")
_UTC = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z")
_FEATURE = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


def dump_object(obj: StoredObject) -> dict[str, Any]:
    """Return the plain JSON of a promised object."""
    return {"key": obj.key, "nbytes": obj.nbytes, "sha256": obj.sha256}


def dump_action(action: Action) -> dict[str, Any]:
    """Return the plain JSON of an action.

    >>> dump_action(Fence("run", "a", 2))
    {'op': 'fence', 'kind': 'run', 'id': 'a', 'epoch': 2}
    """
    op, names = _SHAPES[type(action)]
    plain: dict[str, Any] = {"op": op, **{name: getattr(action, name) for name in names}}
    if isinstance(action, (Add, Seal)):
        plain["objects"] = [dump_object(obj) for obj in action.objects]
    return plain


def parse_action(plain: object) -> Action:
    """Return the action that a manifest holds.

    Raises:
        FormatError: FORMAT_TOO_NEW for an operation or a field that this version does not know, MANIFEST_DAMAGED for
            anything else that no writer writes.
    """
    op = plain.get("op") if isinstance(plain, dict) else None
    if not isinstance(plain, dict) or not isinstance(op, str):
        raise damaged("an action has no 'op'")
    if op not in _PARSERS:
        raise too_new(f"operation {op!r}")
    kind, names, parse = _PARSERS[op]
    check_fields(plain, names, f"a {op!r} action")
    try:
        return parse(plain)
    except InvalidInputError as error:
        raise damaged(error.message) from error
    except FormatError as error:
        raise FormatError(error.kind, f"in a {kind.__name__} action: {error.message}") from error


def check_fields(plain: Mapping[str, Any], names: frozenset[str], what: str) -> None:
    """Accept `plain` if its keys are exactly `names`."""
    if plain.keys() != names:
        missing, extra = sorted(names - plain.keys()), sorted(plain.keys() - names)
        if missing:
            raise damaged(f"{what} lacks the fields {missing}")
        raise too_new(f"{what} with the fields {extra}")


def parse_int(value: object, name: str) -> int:
    """Return `value` if it is an integer in `[0, 2**63)`."""
    if type(value) is not int or not 0 <= value < INT_END:
        raise damaged(f"{name} is {value!r}, not an integer in [0, 2**63)")
    return value


def parse_text(value: object, pattern: re.Pattern[str], name: str) -> str:
    """Return `value` if it is a string that `pattern` matches whole."""
    if type(value) is not str or not pattern.fullmatch(value):
        raise damaged(f"{name} is {value!r}, which is not of the form {pattern.pattern}")
    return value


def parse_hex(value: object, digits: int, name: str) -> str:
    """Return `value` if it is so many lower-case hex digits (32 or 64)."""
    pattern = _HEX[digits]
    return value if type(value) is str and pattern.fullmatch(value) else parse_text(value, pattern, name)


def parse_txn(value: object) -> str:
    """Return `value` if it may name a transaction: 1 to 200 printable ASCII characters without spaces."""
    return parse_text(value, _TXN, "txn")


def parse_kind(value: object) -> str:
    """Return `value` if it may be the kind of a collection."""
    return parse_text(value, _KIND, "kind")


def parse_id(value: object) -> str:
    """Return `value` if it may name a collection; InvalidInputError (BAD_NAME) otherwise."""
    if type(value) is not str:
        raise damaged(f"id is {value!r}, not a string")
    return check_name(value, what="collection id")


def parse_json(value: object, name: str) -> Json:
    """Return `value` if it is a JSON object."""
    if not isinstance(value, dict):
        raise damaged(f"{name} is {value!r}, not a JSON object")
    return value


def parse_key(value: object) -> str:
    """Return `value` if it is a key under which data may lie."""
    if type(value) is not str:
        raise damaged(f"an object key is {value!r}, not a string")
    if value.startswith(_RESERVED_STARTS) and value.partition("/")[0] in RESERVED:
        raise damaged(f"object key {value!r} lies where the version log has its own objects")
    return check_key(value)


def parse_utc(value: object, name: str) -> str:
    """Return `value` if it is an RFC 3339 time in UTC."""
    return parse_text(value, _UTC, name)


def parse_objects(value: object) -> tuple[StoredObject, ...]:
    """Return the promised objects of a unit or a seal; no key may occur twice."""
    if not isinstance(value, list):
        raise damaged(f"objects is {value!r}, not a list")
    objects = tuple(map(_parse_object, value))
    if len(objects) > 1 and len({obj.key for obj in objects}) != len(objects):
        raise damaged("the same object key is listed twice")
    return objects


def _parse_object(plain: object) -> StoredObject:
    if not isinstance(plain, dict):
        raise damaged(f"an object is {plain!r}, not a JSON object")
    check_fields(plain, _OBJECT_FIELDS, "an object")
    key, nbytes, sha256 = plain["key"], plain["nbytes"], plain["sha256"]
    if (
        type(key) is str
        and is_key(key)
        and not key.startswith(_RESERVED_STARTS)
        and type(nbytes) is int
        and 0 < nbytes < INT_END
        and type(sha256) is str
        and _SHA256(sha256)
    ):
        # Nearly every object: a state has hundreds of thousands, and this is a third of the time of reading it.
        return StoredObject(key, nbytes, sha256)
    nbytes = parse_int(plain["nbytes"], "nbytes")
    if nbytes == 0:
        raise damaged("an object of 0 bytes is promised, and every object has at least one")
    return StoredObject(parse_key(plain["key"]), nbytes, parse_hex(plain["sha256"], 64, "sha256"))


def damaged(problem: str) -> FormatError:
    """Return the error for something that no writer of any version writes."""
    return FormatError(ErrorKind.MANIFEST_DAMAGED, problem)


def too_new(what: str) -> FormatError:
    """Return the error for something that only a newer writer can have written."""
    return FormatError(
        ErrorKind.FORMAT_TOO_NEW, f"{what} is not known to this version of actstore: install a newer one"
    )


def _parse_strings(value: object, item: Callable[[object], str], name: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise damaged(f"{name} is {value!r}, not a list")
    texts = tuple(item(v) for v in value)
    if len(set(texts)) != len(texts):
        raise damaged(f"{name} has an entry twice")
    return texts


def _parse_format(p: dict[str, Any]) -> Format:
    features = _parse_strings(p["features"], lambda v: parse_text(v, _FEATURE, "a feature"), "features")
    if list(features) != sorted(features):
        raise damaged("features are not sorted")
    return Format(
        parse_int(p["reader_min"], "reader_min"), parse_int(p["writer_min"], "writer_min"), features
    )


def _parse_create(p: dict[str, Any]) -> Create:
    config, info = parse_json(p["config"], "config"), parse_json(p["info"], "info")
    return Create(parse_kind(p["kind"]), parse_id(p["id"]), config, info)


def _parse_fence(p: dict[str, Any]) -> Fence:
    return Fence(parse_kind(p["kind"]), parse_id(p["id"]), parse_int(p["epoch"], "epoch"))


def _parse_add(p: dict[str, Any]) -> Add:
    return Add(
        kind=parse_kind(p["kind"]),
        id=parse_id(p["id"]),
        epoch=parse_int(p["epoch"], "epoch"),
        fingerprint=parse_hex(p["fingerprint"], 64, "fingerprint"),
        unit=parse_int(p["unit"], "unit"),
        rows=parse_int(p["rows"], "rows"),
        nonfinite=parse_int(p["nonfinite"], "nonfinite"),
        attempt=parse_hex(p["attempt"], 32, "attempt"),
        objects=parse_objects(p["objects"]),
        meta=parse_json(p["meta"], "meta"),
    )


def _parse_seal(p: dict[str, Any]) -> Seal:
    return Seal(
        kind=parse_kind(p["kind"]),
        id=parse_id(p["id"]),
        epoch=parse_int(p["epoch"], "epoch"),
        units=parse_int(p["units"], "units"),
        rows=parse_int(p["rows"], "rows"),
        objects=parse_objects(p["objects"]),
        meta=parse_json(p["meta"], "meta"),
    )


def _parse_tomb(p: dict[str, Any]) -> Tomb:
    return Tomb(_parse_strings(p["keys"], parse_key, "keys"), parse_utc(p["not_before"], "not_before"))


def _fields(value_class: type) -> Sequence[str]:
    return tuple(value_class.__dataclass_fields__)  # type: ignore[attr-defined]


_SHAPES: dict[type, tuple[str, Sequence[str]]] = {
    cls: (cls.__name__.lower(), _fields(cls)) for cls in (Format, Create, Fence, Add, Seal, Tomb)
}
_OBJECT_FIELDS = frozenset(_fields(StoredObject))
_PARSE: tuple[Callable[[dict[str, Any]], Action], ...] = (
    _parse_format,
    _parse_create,
    _parse_fence,
    _parse_add,
    _parse_seal,
    _parse_tomb,
)
_PARSERS: dict[str, tuple[type, frozenset[str], Callable[[dict[str, Any]], Action]]] = {
    op: (cls, frozenset(names) | {"op"}, parse)
    for (cls, (op, names)), parse in zip(_SHAPES.items(), _PARSE, strict=True)
}
