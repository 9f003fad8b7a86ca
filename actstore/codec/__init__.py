"""Rows of numbers to the bytes of Zarr v3 shards and back (FORMAT.md, sections 6 and 7)."""
