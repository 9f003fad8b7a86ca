"""Which `zarr.json` describes a hook point's array, and which ones can this reader decode? (FORMAT.md, section 6)

Only the layout that actstore writes is accepted, so foreign metadata can name no codec with side effects: a chain of
`bytes`, optionally one known `blosc`, and `crc32c`, inside `sharding_indexed` with its index at the end.
"""

import json
from collections.abc import Mapping
from typing import Any, cast

from actstore.codec.spec import CODECS, ShardSpec, blosc_configuration
from actstore.dtypes import SCALE_BYTES, stored_dtype
from actstore.errors import ActstoreError, ErrorKind, FormatError

_LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
_BYTES = {"name": "bytes"}
"""Numbers of one byte have no order of bytes."""

_CRC = {"name": "crc32c"}
_INT8_LAYOUT = {
    "numbers": "the first d_model bytes of a row, int8",
    "scale": "the last 4 bytes of a row, float32, little-endian",
    "value": "number * scale * 2^exponent + mean, each step rounded to float32",
}
"""For who reads the array without knowing its format."""


def zarr_json(spec: ShardSpec, *, n_shards: int, attributes: Mapping[str, Any]) -> bytes:
    """Return the array metadata of `n_shards` shards, the same bytes for the same arguments.

    Args:
        spec: Layout of the shards.
        n_shards: Shards of the whole array, rows that do not exist included.
        attributes: Further members of `attributes.actstore`, as JSON values.

    >>> spec = ShardSpec(8, 4, 2, "bfloat16", "hot")
    >>> parse_zarr_json(zarr_json(spec, n_shards=3, attributes={})) == (spec, 3)
    True
    """
    document = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [n_shards * spec.rows_per_shard, spec.stored_width],
        "data_type": str(stored_dtype(spec.dtype)),
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [spec.rows_per_shard, spec.stored_width]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0 if spec.dtype in ("bfloat16", "int8") else 0.0,
        "codecs": [_sharding(spec)],
        "dimension_names": ["row", "byte" if spec.dtype == "int8" else "d_model"],
        "attributes": {"actstore": {**_layout_attributes(spec), **attributes, "logical_dtype": spec.dtype}},
    }
    return json.dumps(document, indent=2, sort_keys=True, allow_nan=False).encode() + b"\n"


def parse_zarr_json(data: bytes) -> tuple[ShardSpec, int]:
    """Return the layout and the number of shards that array metadata describes.

    Raises:
        FormatError: not JSON, not an array of the layout above, or a codec or dtype that is not on the list.
    """
    try:
        document = json.loads(data)
        spec, n_shards = _spec_of(document)
        same = document["codecs"] == [_sharding(spec)] and _grid_is_plain(document)
    except (
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        AttributeError,
        RecursionError,
        ActstoreError,
    ) as error:
        raise FormatError(
            ErrorKind.OBJECT_DAMAGED, f"zarr.json is not array metadata that actstore reads ({error!r})"
        ) from error
    if not same:
        raise FormatError(
            ErrorKind.OBJECT_DAMAGED,
            "zarr.json describes codecs, an index or chunk keys that actstore does not read: "
            f"found {document['codecs']!r}, expected {[_sharding(spec)]!r}",
        )
    return spec, n_shards


def _layout_attributes(spec: ShardSpec) -> dict[str, Any]:
    return {"d_model": spec.d_model, "layout": _INT8_LAYOUT} if spec.dtype == "int8" else {}


def _sharding(spec: ShardSpec) -> dict[str, Any]:
    blosc = blosc_configuration(spec)
    numbers = _BYTES if stored_dtype(spec.dtype).itemsize == 1 else _LITTLE
    chain = [numbers, *([{"name": "blosc", "configuration": blosc}] if blosc else []), _CRC]
    return {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [spec.rows_per_chunk, spec.stored_width],
            "codecs": chain,
            "index_codecs": [_LITTLE, _CRC],
            "index_location": "end",
        },
    }


def _spec_of(document: Any) -> tuple[ShardSpec, int]:
    n_rows, width = _ints(document["shape"])
    rows_per_shard, shard_width = _ints(document["chunk_grid"]["configuration"]["chunk_shape"])
    sharding = document["codecs"][0]["configuration"]
    rows_per_chunk, chunk_width = _ints(sharding["chunk_shape"])
    data_type = document["data_type"]
    dtype = document["attributes"].get("actstore", {}).get("logical_dtype", data_type)
    d_model = width - SCALE_BYTES if dtype == "int8" else width
    spec = ShardSpec(rows_per_shard, rows_per_chunk, d_model, dtype, _codec_of(sharding["codecs"]))
    if (shard_width, chunk_width) != (width, width) or n_rows % rows_per_shard:
        raise ValueError("chunks do not hold full rows, or the last shard is cut")
    if str(stored_dtype(dtype)) != data_type:
        raise ValueError(f"logical dtype {dtype!r} is not stored as {data_type!r}")
    return spec, n_rows // rows_per_shard


def _ints(pair: Any) -> tuple[int, int]:
    if not (isinstance(pair, list) and len(pair) == 2 and all(type(size) is int for size in pair)):
        raise ValueError(f"expected two integers, found {pair!r}")
    return cast(tuple[int, int], tuple(pair))


def _codec_of(chain: list[dict[str, Any]]) -> str:
    found = [codec["configuration"] for codec in chain if codec["name"] == "blosc"]
    if not found:
        return "hot"
    plain = {key: value for key, value in found[0].items() if key != "typesize"}
    return next((name for name, known in CODECS.items() if known == plain), f"blosc {plain!r}")


def _grid_is_plain(document: dict[str, Any]) -> bool:
    return (
        document["zarr_format"] == 3
        and document["node_type"] == "array"
        and document["chunk_grid"]["name"] == "regular"
        and document["chunk_key_encoding"]
        in (
            {"name": "default", "configuration": {"separator": "/"}},
            {"name": "default"},
        )
        and not document.get("storage_transformers")
    )
