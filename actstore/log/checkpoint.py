"""What are the bytes of a whole state, and when are they worth writing? (FORMAT.md, section 4.6)

A checkpoint is derived: a gzip file of a header line and the state's entries, one a line. It is believed only after
the sum of its entries' hashes was found in the manifest of its version, so that a damaged one costs time and nothing
else. It may be deleted at any time.
"""

import gc
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from actstore.errors import FormatError
from actstore.log.actions import check_fields, damaged, parse_hex
from actstore.log.canonical import canonical_json, parse_json_object
from actstore.log.chunked import ChunkedMap
from actstore.log.entries import (
    MODULUS,
    entry_hash,
    entry_name,
    parse_collection,
    parse_epoch,
    parse_format,
    parse_seal,
    parse_tomb,
    parse_txn_entry,
    parse_unit,
)
from actstore.log.manifest import sha256_hex
from actstore.log.state import State
from actstore.log.txns import RecentTxns
from actstore.log.values import Collection, Format, Seal, Unit

CHECKPOINTS = "checkpoints/"
FMT = "AC-1"
MIN_VERSIONS = 64
"""Fewer versions than that are read as fast as a checkpoint."""

BYTES_RATIO = 4
"""A new checkpoint waits until the manifests since the last one have a quarter of its size: then all checkpoints
together take at most four times the bytes of the manifests, and a reader opens with few of them."""

_KEY = re.compile(r"checkpoints/(\d{20})-([0-9a-f]{8})\.json\.gz")
_HEADER_FIELDS = frozenset({"fmt", "v", "manifest_sha256"})
_GZIP = 31
_MAX_RATIO, _MIN_BOUND = 64, 1 << 20
"""Entries hold hashes and UUIDs and compress about sevenfold; what unpacks to much more is a bomb."""


@dataclass(frozen=True, slots=True)
class CheckpointKey:
    """What the key of a checkpoint says."""

    key: str
    version: int
    sha8: str
    """First 8 hex digits of the SHA-256 of its bytes."""


def parse_checkpoint_key(key: str) -> CheckpointKey | None:
    """Return what a key under `checkpoints/` says, or None for a foreign key."""
    match = _KEY.fullmatch(key)
    return CheckpointKey(key, int(match[1]), match[2]) if match else None


def is_due(*, versions: int, every: int, manifest_bytes: int, checkpoint_bytes: int) -> bool:
    """Return whether a checkpoint is worth writing.

    Args:
        versions: Since the last checkpoint.
        every: At least so many.
        manifest_bytes: Of these versions' manifests.
        checkpoint_bytes: Size of the last checkpoint, 0 when there is none.
    """
    return versions >= every and manifest_bytes * BYTES_RATIO >= checkpoint_bytes


def encode_checkpoint(state: State) -> tuple[str, bytes]:
    """Return the key and the bytes of a state's checkpoint; the same ones whenever zlib packs the same."""
    header = {"fmt": FMT, "v": state.version, "manifest_sha256": state.manifest_sha256}
    packer = zlib.compressobj(level=1, wbits=_GZIP)
    parts = [packer.compress(canonical_json(header) + b"\n")]
    parts += [packer.compress(entry + b"\n") for entry in state.entries()]
    data = b"".join([*parts, packer.flush()])
    return f"{CHECKPOINTS}{state.version:020}-{sha256_hex(data)[:8]}.json.gz", data


def decode_checkpoint(data: bytes, name: CheckpointKey) -> State:
    """Return the state in a checkpoint, its hash computed from the bytes of the entries.

    The caller compares `manifest_sha256` and `after` with the manifest of that version before it uses the state.

    Raises:
        FormatError: it is damaged.
    """
    try:
        if sha256_hex(data)[:8] != name.sha8:
            raise damaged("its bytes do not have the hash in its name")
        lines = _unpack(data).split(b"\n")
        if lines.pop() != b"":
            raise damaged("its last line is cut short")
        header = parse_json_object(lines.pop(0))
        check_fields(header, _HEADER_FIELDS, "a checkpoint header")
        if (header["fmt"], header["v"]) != (FMT, name.version):
            raise damaged(f"its header is {header}")
        with _collector_paused():
            hash_sum = sum(map(entry_hash, lines)) % MODULUS
            entries = _parse_lines(lines)
            return _build(name.version, parse_hex(header["manifest_sha256"], 64, "sha256"), entries, hash_sum)
    except FormatError as error:
        raise FormatError(error.kind, f"{name.key}: {error.message}") from error


def _unpack(data: bytes) -> bytes:
    bound = max(_MIN_BOUND, len(data) * _MAX_RATIO)
    unpacker = zlib.decompressobj(wbits=_GZIP)
    try:
        plain = unpacker.decompress(data, bound)
    except zlib.error as error:
        raise damaged(f"it cannot be unpacked: {error}") from error
    if not unpacker.eof or unpacker.unused_data:
        raise damaged(f"it is cut short, has trailing bytes, or unpacks to more than {bound} bytes")
    return plain


def _parse_lines(lines: list[bytes]) -> list[Any]:
    try:
        entries = json.loads(b"[" + b",".join(lines) + b"]")
    except (ValueError, RecursionError) as error:
        raise damaged(f"an entry is not JSON: {error}") from error
    if not isinstance(entries, list) or len(entries) != len(lines):
        raise damaged("an entry is not one JSON value")
    return entries


@contextmanager
def _collector_paused() -> Iterator[None]:
    # A hundred thousand new values without cycles make the cyclic collector walk them all again and again:
    # measured, half of the time of opening a store.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(slots=True)
class _Parts:
    collection: Collection
    units: dict[int, Unit]
    epoch: int = 0
    seal: Seal | None = None


def _build(version: int, manifest_sha256: str, entries: list[Any], hash_sum: int) -> State:
    named = [(entry_name(plain), plain) for plain in entries]
    parts: dict[tuple[str, str], _Parts] = {}
    formats: list[Format] = []
    tombs: dict[str, str] = {}
    txns: dict[int, str] = {}
    for name, plain in named:
        if name == "collection":
            collection = parse_collection(plain)
            parts[collection.kind, collection.id] = _Parts(collection, {})
    for name, plain in named:
        if name in ("unit", "epoch", "seal"):
            _put_part(parts, name, plain)
        elif name == "format":
            formats.append(parse_format(plain))
        elif name == "tomb":
            tombs.update([parse_tomb(plain)])
        elif name == "txn":
            txns.update([parse_txn_entry(plain)])
    if len(formats) != 1:
        raise damaged(f"it has {len(formats)} format entries instead of one")
    collections = {key: _collection(part) for key, part in parts.items()}
    return State(
        version=version,
        manifest_sha256=manifest_sha256,
        format=formats[0],
        collections=collections,
        txns=RecentTxns.of(txns),
        tombs=tombs,
        hash_sum=hash_sum,
        n_units=sum(len(c.units) for c in collections.values()),
        n_rows=sum(c.rows for c in collections.values()),
        nbytes=sum(c.nbytes for c in collections.values()),
    )


def _put_part(parts: dict[tuple[str, str], _Parts], name: str, plain: dict[str, Any]) -> None:
    part = parts.get((str(plain.get("kind")), str(plain.get("id"))))
    if part is None:
        raise damaged(f"a {name} entry belongs to no collection")
    if name == "seal":
        part.seal = parse_seal(plain)
        return
    if name == "epoch":
        part.epoch = parse_epoch(plain)
    else:
        unit = parse_unit(plain)
        part.units[unit.unit] = unit


def _collection(part: _Parts) -> Collection:
    base, seal = part.collection, part.seal
    units = part.units.values()
    nbytes = sum(obj.nbytes for unit in units for obj in unit.objects)
    return Collection(
        kind=base.kind,
        id=base.id,
        config=base.config,
        fingerprint=base.fingerprint,
        info=base.info,
        version=base.version,
        epoch=part.epoch,
        units=ChunkedMap.of(part.units),
        seal=seal,
        rows=sum(unit.rows for unit in units),
        nbytes=nbytes + sum(obj.nbytes for obj in (seal.objects if seal else ())),
        nonfinite=sum(unit.nonfinite for unit in units),
    )
