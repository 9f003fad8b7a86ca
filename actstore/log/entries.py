"""How is a whole state written as lines, and hashed so that a change costs only what changed? (FORMAT.md, section 4.4)

A state is a set of *entries*, each a canonical JSON line that occurs once: the format, every collection, its epoch once it
was fenced, every live unit, every seal, every announced deletion, and the recent transactions. Its hash is the sum of
the SHA-256 of the entries modulo 2**256, which no order influences: adding an entry adds its hash, removing one
subtracts it. It finds errors and damage; it is not meant to withstand someone who forges entries, who could as well
forge a manifest.
"""

import hashlib
from typing import Any

from actstore.log.actions import (
    check_fields,
    damaged,
    dump_action,
    dump_object,
    parse_action,
    parse_hex,
    parse_id,
    parse_int,
    parse_json,
    parse_key,
    parse_kind,
    parse_objects,
    parse_txn,
    parse_utc,
    too_new,
)
from actstore.log.canonical import dump_plain, fingerprint
from actstore.log.values import Collection, Format, Seal, Unit

MODULUS = 1 << 256


def entry_hash(entry: bytes) -> int:
    """Return what an entry adds to the state hash."""
    return int.from_bytes(hashlib.sha256(entry).digest(), "big")


def format_entry(fmt: Format) -> bytes:
    """Return the entry of the store's format."""
    return _entry("format", dump_action(fmt))


def collection_entry(collection: Collection) -> bytes:
    """Return the entry of what `Create` fixed."""
    plain = {
        "kind": collection.kind,
        "id": collection.id,
        "config": collection.config,
        "info": collection.info,
        "version": collection.version,
    }
    return _entry("collection", plain)


def epoch_entry(kind: str, id: str, epoch: int) -> bytes:
    """Return the entry of a fenced collection's epoch."""
    return _entry("epoch", {"kind": kind, "id": id, "epoch": epoch})


def unit_entry(kind: str, id: str, unit: Unit) -> bytes:
    """Return the entry of a live unit."""
    plain = {
        "kind": kind,
        "id": id,
        "unit": unit.unit,
        "rows": unit.rows,
        "nonfinite": unit.nonfinite,
        "attempt": unit.attempt,
        "objects": [dump_object(obj) for obj in unit.objects],
        "meta": unit.meta,
        "version": unit.version,
    }
    return _entry("unit", plain)


def seal_entry(seal: Seal) -> bytes:
    """Return the entry of a collection's seal."""
    return _entry("seal", dump_action(seal))


def tomb_entry(key: str, not_before: str) -> bytes:
    """Return the entry of one key whose deletion is announced."""
    return _entry("tomb", {"key": key, "not_before": not_before})


def txn_entry(txn: str, version: int) -> bytes:
    """Return the entry of a recent transaction."""
    return _entry("txn", {"txn": txn, "version": version})


def parse_collection(plain: dict[str, Any]) -> Collection:
    """Return the collection, without units, that an entry stands for."""
    check_fields(plain, _COLLECTION_FIELDS, "a collection entry")
    config = parse_json(plain["config"], "config")
    return Collection(
        kind=parse_kind(plain["kind"]),
        id=parse_id(plain["id"]),
        config=config,
        fingerprint=fingerprint(config),
        info=parse_json(plain["info"], "info"),
        version=parse_int(plain["version"], "version"),
    )


def parse_unit(plain: dict[str, Any]) -> Unit:
    """Return the unit that an entry stands for."""
    check_fields(plain, _UNIT_FIELDS, "a unit entry")
    return Unit(
        unit=parse_int(plain["unit"], "unit"),
        rows=parse_int(plain["rows"], "rows"),
        nonfinite=parse_int(plain["nonfinite"], "nonfinite"),
        attempt=parse_hex(plain["attempt"], 32, "attempt"),
        objects=parse_objects(plain["objects"]),
        meta=parse_json(plain["meta"], "meta"),
        version=parse_int(plain["version"], "version"),
    )


def parse_epoch(plain: dict[str, Any]) -> int:
    """Return the epoch that an entry stands for."""
    check_fields(plain, _EPOCH_FIELDS, "an epoch entry")
    return parse_int(plain["epoch"], "epoch")


def parse_seal(plain: dict[str, Any]) -> Seal:
    """Return the seal that an entry stands for."""
    action = parse_action(plain)
    if not isinstance(action, Seal):
        raise damaged("a seal entry is not a seal")
    return action


def parse_format(plain: dict[str, Any]) -> Format:
    """Return the format that an entry stands for."""
    action = parse_action(plain)
    if not isinstance(action, Format):
        raise damaged("a format entry is not a format")
    return action


def parse_tomb(plain: dict[str, Any]) -> tuple[str, str]:
    """Return the key and the time that an entry stands for."""
    check_fields(plain, _TOMB_FIELDS, "a tomb entry")
    return parse_key(plain["key"]), parse_utc(plain["not_before"], "not_before")


def parse_txn_entry(plain: dict[str, Any]) -> tuple[int, str]:
    """Return the version and the transaction that an entry stands for."""
    check_fields(plain, _TXN_FIELDS, "a txn entry")
    return parse_int(plain["version"], "version"), parse_txn(plain["txn"])


def entry_name(plain: object) -> str:
    """Return what an entry of unknown origin says it is, and take that field out of it."""
    name = plain.pop("entry", None) if isinstance(plain, dict) else None
    if name not in _NAMES:
        raise too_new(f"a state entry {name!r}")
    return str(name)


def _entry(name: str, plain: dict[str, Any]) -> bytes:
    plain["entry"] = name
    return dump_plain(plain)


_NAMES = frozenset({"format", "collection", "epoch", "unit", "seal", "tomb", "txn"})
_COLLECTION_FIELDS = frozenset({"kind", "id", "config", "info", "version"})
_EPOCH_FIELDS = frozenset({"kind", "id", "epoch"})
_UNIT_FIELDS = frozenset({"kind", "id", "unit", "rows", "nonfinite", "attempt", "objects", "meta", "version"})
_TOMB_FIELDS = frozenset({"key", "not_before"})
_TXN_FIELDS = frozenset({"txn", "version"})
