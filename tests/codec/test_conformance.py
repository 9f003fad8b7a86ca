"""Our shards read by zarr-python and TensorStore, theirs read by us, and the bytes themselves."""

import json

import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.codec.decode import decode_shard
from actstore.codec.encode import encode_shard
from actstore.codec.metadata import parse_zarr_json, zarr_json
from actstore.codec.spec import CODECS, ShardSpec, blosc_configuration, plan_spec
from actstore.dtypes import STORED_DTYPES, stored_dtype
from actstore.errors import ErrorKind, FormatError, InvalidInputError
from actstore.testing.runs import addressed_rows

ALL = [(codec, dtype) for codec in CODECS for dtype in STORED_DTYPES]


def write_ours(folder, spec, unit_rows):
    """Write one shard per unit; return the whole array as a Zarr reader must see it."""
    expected = np.zeros((len(unit_rows) * spec.rows_per_shard, spec.stored_width), stored_dtype(spec.dtype))
    for unit, n_rows in enumerate(unit_rows):
        start = unit * spec.rows_per_shard
        rows = addressed_rows(start + np.arange(n_rows), spec.d_model, spec.dtype)
        expected[start : start + n_rows] = rows
        path = folder / "c" / str(unit) / "0"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"".join(encode_shard(spec, rows, threads=2).buffers))
    (folder / "zarr.json").write_bytes(zarr_json(spec, n_shards=len(unit_rows), attributes={"run": "r"}))
    return expected


def open_theirs(folder, spec, n_shards):
    """Create an array with zarr-python's own writer, from the same choices."""
    blosc = blosc_configuration(spec)
    compressors = [*([zarr.codecs.BloscCodec(**blosc)] if blosc else []), zarr.codecs.Crc32cCodec()]
    return zarr.create_array(
        zarr.storage.LocalStore(folder),
        shape=(n_shards * spec.rows_per_shard, spec.stored_width),
        dtype=stored_dtype(spec.dtype),
        shards=(spec.rows_per_shard, spec.stored_width),
        chunks=(spec.rows_per_chunk, spec.stored_width),
        compressors=compressors,
        filters=None,
        fill_value=0,
        dimension_names=("row", "d_model"),
        attributes={"actstore": {"logical_dtype": spec.dtype}},
        config={"write_empty_chunks": True},
    )


def bits(array):
    return np.ascontiguousarray(array).view(np.uint8)


@pytest.mark.parametrize(("codec", "dtype"), ALL)
def test_zarr_and_tensorstore_read_our_shards(tmp_path, codec, dtype):
    spec = ShardSpec(64, 16, 24, dtype, codec)
    expected = write_ours(tmp_path, spec, [64, 64, 37])
    array = zarr.open_array(zarr.storage.LocalStore(tmp_path), mode="r")
    assert array.metadata.dimension_names == ("row", "byte" if dtype == "int8" else "d_model")
    attributes = dict(array.attrs["actstore"])
    if dtype == "int8":
        assert attributes.pop("d_model") == 24
        assert "float32" in attributes.pop("layout")["scale"]
        assert array.shape[1] == 28
    assert attributes == {"logical_dtype": dtype, "run": "r"}
    assert np.array_equal(bits(array[:]), bits(expected))
    assert np.array_equal(bits(array[50:130:7]), bits(expected[50:130:7]))
    other = tensorstore.open({"driver": "zarr3", "kvstore": f"file://{tmp_path}/"}).result()
    assert np.array_equal(bits(other.read().result()), bits(expected))


@pytest.mark.parametrize(("codec", "dtype"), ALL)
def test_our_bytes_are_zarrs_bytes(tmp_path, codec, dtype):
    spec = ShardSpec(64, 16, 24, dtype, codec)
    rows = addressed_rows(np.arange(128), spec.d_model, dtype)
    open_theirs(tmp_path, spec, 2)[:] = rows
    for shard in range(2):
        ours = encode_shard(spec, rows[64 * shard : 64 * (shard + 1)])
        theirs = (tmp_path / "c" / str(shard) / "0").read_bytes()
        assert b"".join(ours.buffers) == theirs
        assert ours.nbytes == len(theirs)


@pytest.mark.parametrize(("codec", "dtype"), ALL)
def test_we_read_what_zarr_and_tensorstore_wrote(tmp_path, codec, dtype):
    spec = ShardSpec(32, 8, 12, dtype, codec)
    rows = addressed_rows(np.arange(64), spec.d_model, dtype)
    open_theirs(tmp_path / "zarr", spec, 2)[:] = rows
    (tmp_path / "ts").mkdir()
    (tmp_path / "ts" / "zarr.json").write_bytes(zarr_json(spec, n_shards=2, attributes={}))
    other = tensorstore.open({"driver": "zarr3", "kvstore": f"file://{tmp_path}/ts/"}).result()
    other.write(rows).result()
    for folder in ("zarr", "ts"):
        assert parse_zarr_json((tmp_path / folder / "zarr.json").read_bytes()) == (spec, 2)
        for shard in range(2):
            data = (tmp_path / folder / "c" / str(shard) / "0").read_bytes()
            found = decode_shard(spec, data, n_rows=32, key="k")
            assert np.array_equal(bits(found), bits(rows[32 * shard : 32 * (shard + 1)]))


@settings(max_examples=60, deadline=None)
@given(
    codec_dtype=st.sampled_from(ALL),
    n_chunks=st.integers(1, 5),
    rows_per_chunk=st.integers(1, 9),
    d_model=st.integers(1, 700),
    data=st.data(),
)
def test_round_trip_of_any_bits(codec_dtype, n_chunks, rows_per_chunk, d_model, data):
    """NaN payloads, infinities, signed zeros and denormals included: the rows are random bits."""
    codec, dtype = codec_dtype
    spec = ShardSpec(n_chunks * rows_per_chunk, rows_per_chunk, d_model, dtype, codec)
    n_rows = data.draw(st.integers(1, spec.rows_per_shard))
    seed = data.draw(st.integers(0, 2**32))
    raw = np.random.default_rng(seed).bytes(n_rows * spec.row_bytes)
    rows = np.frombuffer(raw, stored_dtype(dtype)).reshape(n_rows, spec.stored_width)
    shard = encode_shard(spec, rows)
    stored = b"".join(shard.buffers)
    assert len(stored) == shard.nbytes
    assert len(shard.sums) == spec.n_sums_of(n_rows)
    assert decode_shard(spec, stored, n_rows=n_rows, key="k").tobytes() == raw


def test_hot_rows_are_not_copied():
    spec = ShardSpec(64, 16, 24, "float16", "hot")
    rows = addressed_rows(np.arange(64), 24, "float16")
    shared = [
        np.shares_memory(np.frombuffer(buffer, np.uint8), rows)
        for buffer in encode_shard(spec, rows).buffers[::2]
    ]
    assert shared == [True] * 4 + [False]


@pytest.mark.parametrize("shape", [(0, 4), (9, 4), (8, 5), (8,)])
def test_rows_of_another_shape_are_refused(shape):
    with pytest.raises(InvalidInputError, match="a shard takes 1 to 8 rows of 4 numbers"):
        encode_shard(ShardSpec(8, 4, 4, "float16", "hot"), np.zeros(shape, np.float16))


def test_rows_of_another_dtype_are_refused():
    with pytest.raises(InvalidInputError, match="uint16, not float32"):
        encode_shard(ShardSpec(8, 4, 4, "bfloat16", "hot"), np.zeros((8, 4), np.float32))


@pytest.mark.parametrize(
    ("unit", "d_model", "dtype", "expected"),
    [
        (65_536, 768, "bfloat16", (65_536, 512)),
        (65_536, 4096, "bfloat16", (16_384, 128)),
        (65_536, 768, "float32", (32_768, 256)),
        (65_536, 64, "float16", (65_536, 8192)),
        (1024, 8, "float32", (1024, 1024)),
        (100, 64, "float32", (100, 100)),
        (48_000, 768, "bfloat16", (48_000, 375)),
        (65_536, 768, "int8", (65_536, 1024)),
        (65_536, 4096, "int8", (16_384, 128)),
    ],
)
def test_planned_sizes(unit, d_model, dtype, expected):
    spec = plan_spec(rows_per_unit=unit, d_model=d_model, dtype=dtype, codec="hot")
    assert (spec.rows_per_shard, spec.rows_per_chunk) == expected
    assert spec.rows_per_shard * spec.row_bytes <= 128 << 20
    assert spec.rows_per_chunk % spec.rows_per_sum == 0


@pytest.mark.parametrize(("unit", "d_model"), [(0, 4), (4, 0), (99_999, 4096), (65_535, 768)])
def test_sizes_that_cannot_be_cut_are_refused(unit, d_model):
    with pytest.raises(InvalidInputError):
        plan_spec(rows_per_unit=unit, d_model=d_model, dtype="bfloat16", codec="hot")


def changed(path, value):
    document = json.loads(zarr_json(ShardSpec(8, 4, 2, "bfloat16", "cold"), n_shards=3, attributes={}))
    place = document
    for step in path[:-1]:
        place = place[step]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["codecs", 0, "configuration", "codecs", 1, "name"], "numcodecs.pickle"),
        (["codecs", 0, "configuration", "codecs", 1, "configuration", "cname"], "snappy"),
        (["codecs", 0, "configuration", "codecs", 0, "configuration", "endian"], "big"),
        (["codecs", 0, "configuration", "codecs"], []),
        (["codecs", 0, "configuration", "index_location"], "start"),
        (["codecs", 0, "name"], "bytes"),
        (["data_type"], "float64"),
        (["attributes", "actstore", "logical_dtype"], "float16"),
        (["chunk_grid", "configuration", "chunk_shape"], [8, 1]),
        (["shape"], [23, 2]),
        (["shape"], [True, 2]),
        (["shape"], None),
        (["zarr_format"], 2),
        (["chunk_key_encoding", "configuration", "separator"], "."),
        (["storage_transformers"], ["x"]),
        (["attributes", "actstore", "logical_dtype"], "int8"),
    ],
)
def test_foreign_metadata_is_refused(path, value):
    with pytest.raises(FormatError) as error:
        parse_zarr_json(changed(path, value))
    assert error.value.kind is ErrorKind.OBJECT_DAMAGED


@pytest.mark.parametrize("shape", [[24, 4], [24, 3], [24, 5]])
def test_int8_rows_without_room_for_a_number_and_a_scale(shape):
    document = json.loads(zarr_json(ShardSpec(8, 4, 2, "int8", "hot"), n_shards=3, attributes={}))
    document["shape"] = shape
    with pytest.raises(FormatError):
        parse_zarr_json(json.dumps(document).encode())


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"shape": [1, 2]}'])
def test_what_is_no_metadata_is_refused(data):
    with pytest.raises(FormatError):
        parse_zarr_json(data)
