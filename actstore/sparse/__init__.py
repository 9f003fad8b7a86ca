"""The bytes of sparse codes: token-major pages and latent-major postings (FORMAT.md, section 8)."""

from actstore.sparse.rows import VALUE_DTYPES, SparseRows, round_values
from actstore.sparse.segment import Block, Segment
from actstore.sparse.segment_grouped import encode_grouped, encode_segment
from actstore.sparse.unit_codes import UnitCodes
from actstore.sparse.unit_format import encode_unit

__all__ = [
    "VALUE_DTYPES",
    "Block",
    "Segment",
    "SparseRows",
    "UnitCodes",
    "encode_grouped",
    "encode_segment",
    "encode_unit",
    "round_values",
]
