"""Whatever happens to stored bytes, a reader gives the rows that were written or a named error, never other numbers."""

import contextlib
import hashlib
import itertools
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from numcodecs.blosc import Blosc

from actstore.activations import Activations
from actstore.codec.crc import crc32c
from actstore.codec.decode import decode_shard
from actstore.codec.encode import encode_shard
from actstore.codec.index import encode_index
from actstore.codec.spec import CODECS, ShardSpec
from actstore.errors import ErrorKind, FormatError
from actstore.log.values import StoredObject
from actstore.testing.runs import addressed_rows, make_run

HOOK = "layers.0.resid_post"
KEYS = tuple(f"runs/r/{HOOK}/c/{shard}/0" for shard in range(4))
UNIT_ROWS = {0: 16, 1: 11}
EXISTING = np.concatenate([np.arange(16), 16 + np.arange(11)])
BOTH = list(itertools.product(CODECS, [True, False]))


def spec_of(codec):
    return ShardSpec(8, 4, 3, "float16", codec)


def make(storage, codec, with_sums=True):
    return make_run(storage, spec=spec_of(codec), rows_per_unit=16, unit_rows=UNIT_ROWS, with_sums=with_sums)


N_WAYS = 5


def read_all_ways(acts, *, only=None):
    """Try every way of reading, or the one that `only` falls on; return the errors. Any wrong number fails here."""
    ways = {
        "slice": lambda: [(EXISTING, acts.read(slice(None), dtype="stored"))],
        "rows": lambda: [(EXISTING[::-1], acts.read(EXISTING[::-1], dtype="stored"))],
        "one by one": lambda: [([row], acts.read([row], dtype="stored")) for row in EXISTING],
        "scan": lambda: [(rows, values.copy()) for rows, values in acts.scan(3, dtype="stored")],
        "shuffled": lambda: list(acts.shuffled(5, buffer_bytes=60, dtype="stored")),
    }
    errors = []
    chosen = list(ways.items()) if only is None else [list(ways.items())[only % N_WAYS]]
    for way, read in chosen:
        try:
            batches = read()
        except FormatError as error:
            errors.append(error)
            continue
        assert sum(len(rows) for rows, _ in batches) == len(EXISTING), way
        for rows, values in batches:
            assert values.tobytes() == addressed_rows(np.asarray(rows), 3, "float16").tobytes(), way
    return errors


def check_damaged(errors, key, kind=ErrorKind.OBJECT_DAMAGED):
    assert errors
    for error in errors:
        assert error.kind is kind
        assert key in error.message


@pytest.mark.parametrize(("codec", "with_sums"), BOTH)
def test_every_single_bit_flip_of_a_shard(memory, codec, with_sums):
    storage = memory()
    run = make(storage, codec, with_sums)
    key = KEYS[3]  # a partial one
    good = storage.get(key)
    warm = Activations(storage, run, HOOK)
    assert read_all_ways(warm) == []
    spec = spec_of(codec)
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        storage.put_hint(key, bytes(bad))
        # The ways take turns: 5 and 8 have no common divisor, so every way meets every bit of a byte.
        errors = read_all_ways(Activations(storage, run, HOOK), only=bit)
        assert {error.kind for error in errors} <= {ErrorKind.OBJECT_DAMAGED}
        region = "index" if bit // 8 >= len(good) - spec.index_bytes else "chunks"
        checksum_of_hot = codec == "hot" and bit // 8 % 28 >= 24
        if not with_sums or region == "index" or not checksum_of_hot:
            assert len(errors) == 1, (bit, region)
            check_damaged(errors, key)
        assert {error.kind for error in read_all_ways(warm, only=bit + 1)} <= {ErrorKind.OBJECT_DAMAGED}
    storage.put_hint(key, good)
    assert read_all_ways(warm) == []


@pytest.mark.parametrize("codec", CODECS)
def test_every_single_bit_flip_of_the_sums(memory, codec):
    storage = memory()
    run = make(storage, codec)
    key = run.units[1].meta["sums"]["key"]
    good = storage.get(key)
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        storage.put_hint(key, bytes(bad))
        errors = read_all_ways(Activations(storage, run, HOOK), only=bit)
        assert len(errors) == 1
        check_damaged(errors, key)


@pytest.mark.parametrize(("codec", "with_sums"), BOTH)
def test_every_truncation_and_an_extension(memory, codec, with_sums):
    storage = memory()
    run = make(storage, codec, with_sums)
    for key in (KEYS[2], run.units[1].objects[-1].key):
        good = storage.get(key)
        for length in range(1, len(good)):
            storage.put_hint(key, good[:length])
            errors = read_all_ways(Activations(storage, run, HOOK), only=length)
            assert len(errors) == 1
            check_damaged(errors, key)
        storage.put_hint(key, good + b"\0")
        assert {error.kind for error in read_all_ways(Activations(storage, run, HOOK))} <= {
            ErrorKind.OBJECT_DAMAGED
        }
        storage.put_hint(key, good)


@pytest.mark.parametrize(("codec", "with_sums"), BOTH)
def test_a_missing_object_is_named(storage, codec, with_sums):
    run = make(storage, codec, with_sums)
    for key in (KEYS[1], run.units[0].objects[-1].key):
        good = storage.get(key)
        warm = Activations(storage, run, HOOK)
        assert read_all_ways(warm) == []
        storage.delete(key)
        errors = read_all_ways(Activations(storage, run, HOOK))
        assert len(errors) == 5
        check_damaged(errors, key, ErrorKind.OBJECT_MISSING)
        if key == KEYS[1]:
            check_damaged(read_all_ways(warm), key, ErrorKind.OBJECT_MISSING)
        storage.put_new(key, [good])


@pytest.mark.parametrize(("codec", "with_sums"), BOTH)
def test_a_shard_swapped_with_its_sibling(memory, codec, with_sums):
    """Every checksum in a swapped shard is right; only the manifest knows better."""
    storage = memory()
    run = make(storage, codec, with_sums)
    warm = Activations(storage, run, HOOK)
    assert read_all_ways(warm) == []
    first, second = (storage.get(key) for key in KEYS[:2])
    storage.put_hint(KEYS[0], second)
    storage.put_hint(KEYS[1], first)
    for acts in (Activations(storage, run, HOOK), warm):
        errors = read_all_ways(acts)
        assert len(errors) == 5
        assert {error.kind for error in errors} == {ErrorKind.OBJECT_DAMAGED}


@pytest.mark.parametrize("codec", CODECS)
def test_chunks_swapped_within_a_shard(memory, codec):
    """By an index that is right about everything but the order."""
    storage = memory()
    run = make(storage, codec)
    good = storage.get(KEYS[0])
    body, index = good[:-36], np.frombuffer(good[-36:-4], "<u8").reshape(2, 2)
    turned = index[::-1].tobytes()
    storage.put_hint(KEYS[0], body + turned + crc32c(turned).to_bytes(4, "little"))
    errors = read_all_ways(Activations(storage, run, HOOK))
    assert len(errors) == 5
    check_damaged(errors, KEYS[0])


def test_a_shard_in_another_chunk_order_is_read_by_its_index(memory):
    """Zarr writers may order chunks as they like; offsets are looked up, not computed."""
    storage = memory()
    spec = spec_of("hot")
    run = make(storage, "hot", with_sums=False)
    good = storage.get(KEYS[0])
    body = good[28:56] + good[:28]
    index = np.array([[28, 28], [0, 28]], "<u8").tobytes()
    turned = body + index + crc32c(index).to_bytes(4, "little")
    storage.put_hint(KEYS[0], turned)
    unit = run.units[0]
    objects = (StoredObject(KEYS[0], len(turned), hashlib.sha256(turned).hexdigest()), *unit.objects[1:])
    run = replace(run, units={**run.units, 0: replace(unit, objects=objects)})
    assert spec.n_chunks == 2
    assert read_all_ways(Activations(storage, run, HOOK)) == []


INDEXES = {
    "absent chunk": [[2**64 - 1, 2**64 - 1], [28, 28]],
    "outside": [[0, 28], [29, 28]],
    "overflowing": [[2**64 - 28, 28], [28, 28]],
    "negative": [[2**63, 28], [28, 28]],
    "short": [[0, 27], [28, 28]],
    "huge": [[0, 2**63], [28, 28]],
}


@pytest.mark.parametrize("name", INDEXES)
def test_a_forged_index(name):
    body = np.array(INDEXES[name], "<u8").tobytes()
    data = bytes(56) + body + crc32c(body).to_bytes(4, "little")
    with pytest.raises(FormatError) as error:
        decode_shard(spec_of("hot"), data, n_rows=8, key="k")
    assert error.value.kind is ErrorKind.OBJECT_DAMAGED


@pytest.mark.parametrize("claim", [0, 1, 47, 49, 2**20, 2**31 - 1, 2**32 - 1])
def test_a_forged_frame_claims_no_memory(claim):
    spec = ShardSpec(8, 8, 3, "float16", "lz4")
    frame = bytearray(Blosc("lz4", 5, 2, 0, typesize=2).encode(bytes(48)))
    frame[4:8] = claim.to_bytes(4, "little")
    data = bytes(frame) + crc32c(bytes(frame)).to_bytes(4, "little") + encode_index([len(frame) + 4], 1)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="claims another length"):
            decode_shard(spec, data, n_rows=8, key="k")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("codec", ["lz4", "cold"])
def test_random_frames_with_right_checksums(codec):
    """Compressed garbage behind a valid checksum: an error or rows, and never a crash."""
    spec = ShardSpec(64, 64, 24, "float16", codec)
    good = b"".join(encode_shard(spec, addressed_rows(np.arange(64) // 9, 24, "float16")).buffers)
    frame = good[: -spec.index_bytes - 4]
    rng = np.random.default_rng(0)
    for _ in range(2000):
        bad = bytearray(frame)
        for place in rng.integers(0, len(bad), rng.integers(1, 4)):
            bad[place] = rng.integers(0, 256)
        data = bytes(bad) + crc32c(bytes(bad)).to_bytes(4, "little") + encode_index([len(bad) + 4], 1)
        with contextlib.suppress(FormatError):
            assert decode_shard(spec, data, n_rows=64, key="k").shape == (64, 24)
