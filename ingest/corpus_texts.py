"""How are a corpus's texts read for tokenizing, in order and in bounded memory?"""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from actstore.corpus import DOC_ID, TEXT, Corpus

from .token_encoding import TextBatch

_TEXT_BYTES = 2 << 20
"""Text that is encoded at once: enough documents to keep the tokenizer's threads busy."""

_TEXT_DOCUMENTS = 4_096


def read_texts(corpus: Corpus, first_doc: int) -> Iterator[TextBatch]:
    """Yield the texts of a corpus from a document on, about 2 MiB at a time."""
    for path in corpus.part_paths(first_doc):
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for group in range(file.metadata.num_row_groups):
                table = file.read_row_group(group, columns=[DOC_ID, TEXT], use_threads=False)
                yield from _split_texts(table, first_doc)


def _split_texts(table: pa.Table, first_doc: int) -> Iterator[TextBatch]:
    table_first = table[DOC_ID][0].as_py()
    start = max(0, first_doc - table_first)
    sizes = pc.binary_length(table[TEXT]).to_pylist()
    while start < len(sizes):
        stop, total = start + 1, sizes[start]
        while stop < len(sizes) and total + sizes[stop] <= _TEXT_BYTES and stop - start < _TEXT_DOCUMENTS:
            total += sizes[stop]
            stop += 1
        yield TextBatch(table_first + start, table[TEXT].slice(start, stop - start).to_pylist())
        start = stop
