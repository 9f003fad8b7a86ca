"""How are a corpus's texts read for tokenizing, in order and in bounded memory?"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from actstore.corpus import DOC_ID, ROLES, TEXT, Corpus

from .token_encoding import TextBatch
from .token_roles import RoleSpans

_TEXT_BYTES = 2 << 20
"""Text that is encoded at once: enough documents to keep the tokenizer's threads busy."""

_TEXT_DOCUMENTS = 4_096


def read_texts(corpus: Corpus, first_doc: int) -> Iterator[TextBatch]:
    """Yield the texts of a corpus from a document on, with their roles if they have any, about 2 MiB at a time."""
    columns = [DOC_ID, TEXT, *([ROLES] if corpus.is_chat else [])]
    for path in corpus.part_paths(first_doc):
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for group in range(file.metadata.num_row_groups):
                table = file.read_row_group(group, columns=columns, use_threads=False)
                yield from _split_texts(table, first_doc)


def _split_texts(table: pa.Table, first_doc: int) -> Iterator[TextBatch]:
    table_first = table[DOC_ID][0].as_py()
    start = max(0, first_doc - table_first)
    sizes = pc.binary_length(table[TEXT]).to_pylist()
    names = table.column_names
    while start < len(sizes):
        stop, total = start + 1, sizes[start]
        while stop < len(sizes) and total + sizes[stop] <= _TEXT_BYTES and stop - start < _TEXT_DOCUMENTS:
            total += sizes[stop]
            stop += 1
        piece = table.slice(start, stop - start)
        roles = [_spans(messages) for messages in piece[ROLES].to_pylist()] if ROLES in names else None
        yield TextBatch(table_first + start, piece[TEXT].to_pylist(), roles)
        start = stop


def _spans(messages: Sequence[Mapping[str, Any]]) -> RoleSpans:
    return RoleSpans(
        tuple(m["role"] for m in messages),
        tuple(m["start"] for m in messages),
        tuple(m["end"] for m in messages),
    )
