"""Do column types, names, hashes and duplicates mean the same however a stream is cut?"""

import hashlib
import json
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.errors import InvalidInputError
from actstore.ingest.columns import (
    MAX_FIELDS,
    ColumnNames,
    conform,
    final_type,
    make_array,
    plain_array,
    unify_schemas,
    unify_types,
)
from actstore.ingest.content_hash import TableHasher
from actstore.ingest.documents import Documents
from actstore.ingest.spool import Spool

leaves = st.sampled_from(
    [
        pa.null(),
        pa.bool_(),
        pa.int8(),
        pa.int64(),
        pa.uint16(),
        pa.uint64(),
        pa.float32(),
        pa.float64(),
        pa.string(),
        pa.large_string(),
        pa.binary(),
        pa.date32(),
        pa.timestamp("ms"),
        pa.timestamp("us"),
        pa.timestamp("us", "UTC"),
    ]
)
types = st.recursive(
    leaves,
    lambda inner: st.one_of(
        inner.map(pa.list_),
        inner.map(pa.large_list),
        inner.map(lambda t: pa.list_(t, 2)),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3).map(lambda d: pa.struct(list(d.items()))),
    ),
    max_leaves=5,
)


def fields_sorted(kind: pa.DataType | None) -> str:
    """Text of a type that does not depend on the order of struct fields."""
    if kind is None:
        return "none"
    if pa.types.is_struct(kind):
        return "{" + ",".join(sorted(f"{f.name}:{fields_sorted(f.type)}" for f in kind)) + "}"
    if kind.num_fields == 1:
        return f"{str(kind).split('<')[0]}<{fields_sorted(kind.value_type)}>"
    return str(kind)


@settings(deadline=None)
@given(types, types)
def test_unifying_is_symmetric_and_absorbs(a, b):
    both = unify_types(a, b)
    assert fields_sorted(both) == fields_sorted(unify_types(b, a))
    assert unify_types(a, a) == a
    if both is not None:
        assert fields_sorted(unify_types(both, a)) == fields_sorted(both)
        assert fields_sorted(unify_types(both, b)) == fields_sorted(both)


@settings(deadline=None)
@given(types, types)
def test_every_unified_type_can_be_reached_and_stored(a, b):
    both = unify_types(a, b)
    if both is not None:
        for kind in (a, b):
            empty = conform("x", pa.nulls(3, kind), final_type(both))
            assert empty.type == final_type(both)
            assert empty.null_count == 3
    assert plain_array("x", pa.nulls(2, a)).type == a


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=4,
)


def as_stored(value, kind: pa.DataType):
    """What a JSON value is once its column has a type: the oracle of casting."""
    t = pa.types
    if value is None or (value == {} and not (t.is_struct(kind) and kind.num_fields)):
        return None
    if t.is_struct(kind):
        return {f.name: as_stored(value.get(f.name), f.type) for f in kind}
    if t.is_list(kind):
        return [as_stored(v, kind.value_type) for v in value]
    return float(value) if t.is_floating(kind) else value


@settings(deadline=None)
@given(st.lists(json_values, min_size=1, max_size=6), st.lists(st.integers(1, 3), min_size=6, max_size=6))
def test_a_stream_has_one_type_or_none_whatever_its_batches(values, sizes):
    batches, rest = [], list(values)
    for size in sizes:
        batches.append(rest[:size])
        rest = rest[size:]

    def stored(pieces):
        with Spool(None) as spool:
            for piece in filter(None, pieces):
                text = pa.array(["t"] * len(piece), pa.large_string())
                array = make_array("x", piece, ["p"] * len(piece))
                batch = pa.RecordBatch.from_pydict(
                    {"text": text, "source_key": text.cast(pa.string()), "x": array}
                )
                spool.add(Documents(batch, ["p"] * len(piece)))
            return [v for b in spool.batches() for v in b["x"].to_pylist()], spool.schema.field("x").type

    try:
        one_by_one, kind = stored([[v] for v in values])
    except InvalidInputError:
        with pytest.raises(InvalidInputError):
            stored(batches)
        return
    assert one_by_one == [as_stored(v, kind) for v in values]
    cut, cut_kind = stored(batches)
    assert fields_sorted(cut_kind) == fields_sorted(kind)
    assert cut == one_by_one


def test_structs_of_many_keys_are_data_not_names():
    old = pa.schema([("x", pa.struct([(f"k{i}", pa.int64()) for i in range(MAX_FIELDS - 1)]))])
    new = pa.schema([("x", pa.struct([("another", pa.int64()), ("more", pa.int64())]))])
    with pytest.raises(InvalidInputError, match=r"1002 different keys by f.jsonl:9.*stringify=\['x'\]"):
        unify_schemas(old, new, place_of=lambda column: "f.jsonl:9")


@given(
    st.lists(st.text("aAbB_2", max_size=4) | st.sampled_from(["text", "DOC_ID", "source_text"]), unique=True)
)
def test_stored_names_never_clash(sources):
    names = ColumnNames()
    stored = [names.stored(s) for s in sources]
    folded = [s.lower() for s in stored]
    assert len(set(folded)) == len(folded)
    assert not set(folded) & {"doc_id", "text", "source_key", "corpus", ""}
    assert [names.stored(s) for s in sources] == stored
    assert names.renamed == {a: b for a, b in zip(sources, stored, strict=True) if a != b}


HASHED = {
    "text": st.text(max_size=4),
    "n": st.none() | st.integers(-5, 5),
    "flag": st.none() | st.booleans(),
    "raw": st.none() | st.binary(max_size=3),
    "tags": st.none() | st.lists(st.none() | st.text("ab", max_size=2), max_size=3),
    "pair": st.none() | st.lists(st.floats(0, 1, width=32), min_size=2, max_size=2),
    "meta": st.none()
    | st.fixed_dictionaries({"a": st.none() | st.integers(0, 3), "l": st.lists(st.booleans(), max_size=2)}),
    "map": st.none()
    | st.dictionaries(st.sampled_from("ab"), st.integers(0, 2)).map(lambda d: list(d.items())),
    "price": st.none() | st.decimals(0, 9, places=2),
    "when": st.none() | st.datetimes(),
}
HASH_SCHEMA = pa.schema(
    {
        "text": pa.large_string(),
        "n": pa.int64(),
        "flag": pa.bool_(),
        "raw": pa.binary(),
        "tags": pa.list_(pa.string()),
        "pair": pa.list_(pa.float32(), 2),
        "meta": pa.struct([("a", pa.int64()), ("l", pa.list_(pa.bool_()))]),
        "map": pa.map_(pa.string(), pa.int64()),
        "price": pa.decimal128(5, 2),
        "when": pa.timestamp("us"),
    }
)


def digest(batch: pa.RecordBatch, cuts: list[int]) -> str:
    hasher = TableHasher(batch.schema)
    edges = [0, *sorted(min(c, batch.num_rows) for c in cuts), batch.num_rows]
    for a, b in pairwise(edges):
        hasher.update(batch.slice(a, b - a))
    return hasher.hexdigest()


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.fixed_dictionaries(HASHED), min_size=1, max_size=6),
    st.lists(st.fixed_dictionaries(HASHED), min_size=1, max_size=6),
    st.lists(st.integers(0, 6), max_size=3),
)
def test_hash_is_of_the_values_alone(first, second, cuts):
    a, b = (pa.RecordBatch.from_pylist(rows, HASH_SCHEMA) for rows in (first, second))
    assert digest(a, cuts) == digest(a, [])
    # An array with other offsets and other garbage under its nulls.
    shifted = pa.concat_batches([b, a]).slice(b.num_rows)
    assert digest(shifted, []) == digest(a, [])
    assert (digest(a, []) == digest(b, [])) == a.equals(b)


def test_hash_sees_names_types_and_where_nulls_are():
    seen = set()
    for name, array in (
        ("x", pa.array([1, None])),
        ("y", pa.array([1, None])),
        ("x", pa.array([None, 1])),
        ("x", pa.array([1, 0])),
        ("x", pa.array([1, None], pa.int32())),
        ("x", pa.array(["1", None])),
        ("x", pa.array(["1", ""])),
        ("x", pa.array([["1"], []])),
        ("x", pa.array([[], ["1"]])),
        ("x", pa.array([["1"], None])),
    ):
        seen.add(digest(pa.record_batch({name: array}), []))
    assert len(seen) == 10


@settings(deadline=None)
@given(st.lists(st.text("ab ", max_size=3), min_size=1, max_size=30), st.integers(1, 5))
def test_first_occurrences_are_those_of_a_plain_loop(texts, step):
    with Spool(None) as spool:
        for start in range(0, len(texts), step):
            piece = texts[start : start + step]
            batch = pa.RecordBatch.from_pydict(
                {"text": pa.array(piece, pa.large_string()), "source_key": pa.array(piece)}
            )
            spool.add(Documents(batch, piece))
        seen: set[str] = set()
        expected = [not (t in seen or seen.add(t)) for t in texts]
        assert spool.first_occurrences().tolist() == expected
        assert spool.n_empty == sum(not t.strip() for t in texts)
        assert spool.text_bytes == sum(map(len, texts))


def test_the_hash_has_a_definition():
    """The definition of FORMAT.md, written out for one small table with hashlib alone."""
    sha = hashlib.sha256

    def streams(kind: str, nulls: bytes, lengths: list[int], values: bytes) -> bytes:
        sizes = np.array(lengths, "<i8").tobytes()
        return sha(kind.encode() + nulls).digest() + sha(sizes).digest() + sha(values).digest()

    batch = pa.record_batch({"n": pa.array([5, None]), "t": pa.array([["a", "bc"], []])})
    expected = sha(
        sha(b"n").digest()
        + streams("int64", b"\0\1", [], np.array([5], "<i8").tobytes())
        + sha(b"t").digest()
        + streams("list<item: string>", b"\0\0", [2, 0], b"")
        + streams("string", b"\0\0", [1, 2], b"abc")
    ).hexdigest()
    assert digest(batch, []) == expected
    assert json.dumps(expected)
