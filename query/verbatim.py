"""Which documents hold a piece of text word for word? Those a text was cut from must not answer questions about it."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from actstore.arrow_arrays import to_array
from actstore.corpus import DOC_ID, TEXT, Corpus

from .unit_tables import read_texts

Int64s = npt.NDArray[np.int64]

_BATCH_DOCUMENTS = 64
"""Texts looked through at a time."""


def holding_among(corpus: Corpus, doc_ids: Sequence[int] | Int64s, piece: str) -> Int64s:
    """Return which of some documents hold `piece`, ascending; reads the row groups of their texts.

    Raises:
        FormatError: a part is missing or damaged.
    """
    texts = read_texts(corpus, doc_ids)
    return np.array(sorted(doc_id for doc_id, text in texts.items() if piece in text), np.int64)


def holding(corpus: Corpus, piece: str) -> Int64s:
    """Return all documents of a corpus that hold `piece`, ascending; reads every text, 64 at a time.

    Raises:
        FormatError: a part is missing or damaged.
    """
    found = [np.empty(0, np.int64)]
    for part in corpus.parts:
        path = corpus.objects.file(part.objects[0])
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(_BATCH_DOCUMENTS, columns=[DOC_ID, TEXT], use_threads=False):
                holds = pc.match_substring(batch.column(TEXT), piece)
                found.append(to_array(pa.chunked_array([batch.column(DOC_ID).filter(holds)])))
    return np.sort(np.concatenate(found))
