"""What is known about every token row of the demo's corpus, besides its activations?

A few numbers per row, in memory: the demo's corpus has about 125,000 rows. It is asked with SQL, as a user would.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.run import Run
from actstore.store import Store

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

NO_TOKEN = -1
"""Stands for the token before the first one of a model window, or before the first that is not special."""

FACTS_SQL = """
    SELECT t.row, t.token_id, t.doc_id, d.kind,
           lag(CASE WHEN NOT t.is_special THEN t.token_id END) OVER same_window AS previous_id,
           d.split = 'held-out' AS is_held_out, NOT t.is_special AND t.window_position > 0 AS is_shown
    FROM tokens t JOIN documents d ON d.corpus = t.corpus AND d.doc_id = t.doc_id
    WHERE t.tokenization = ?
    WINDOW same_window AS (PARTITION BY t.doc_id, t."window" ORDER BY t.row)
    ORDER BY t.row
"""


@dataclass(frozen=True, slots=True, eq=False)
class TokenFacts:
    """Arrays of one entry per row, rows ascending; t is the number of rows."""

    rows: Ints
    """Shape (t,): row numbers."""
    token_ids: Ints
    previous_ids: Ints
    """The token before it in its window; `NO_TOKEN` if there is none, or a special one."""
    doc_ids: Ints
    kind_codes: Ints
    """Index into `kinds`."""
    is_held_out: Bools
    """Its document was not trained on."""
    is_shown: Bools
    """Neither a special token nor a window's first token, whose activations are an attention sink's."""
    kinds: tuple[str, ...]
    words: dict[int, str]
    """Readable text of the tokens that occur."""

    def index(self, rows: Ints) -> Ints:
        """Where in the arrays the rows stand; all must exist."""
        return np.searchsorted(self.rows, rows)


def read_facts(store: Store, run: Run) -> TokenFacts:
    """The facts of every row of a run's tokenization, through SQL."""
    tokenization = run.tokenization
    table = store.sql(FACTS_SQL, [tokenization.id]).to_arrow()
    kinds, kind_codes = np.unique(table["kind"].to_numpy(zero_copy_only=False), return_inverse=True)
    vocabulary = tokenization.vocabulary()
    return TokenFacts(
        rows=_ints(table["row"]),
        token_ids=_ints(table["token_id"]),
        previous_ids=_ints(table["previous_id"].fill_null(NO_TOKEN)),
        doc_ids=_ints(table["doc_id"]),
        kind_codes=kind_codes.astype(np.int64),
        is_held_out=table["is_held_out"].to_numpy(zero_copy_only=False).astype(np.bool_),
        is_shown=table["is_shown"].to_numpy(zero_copy_only=False).astype(np.bool_),
        kinds=tuple(str(kind) for kind in kinds),
        words=dict(zip(vocabulary["token_id"].to_pylist(), vocabulary["token"].to_pylist(), strict=True)),
    )


def _ints(column: Any) -> Ints:
    return np.asarray(column.to_numpy(zero_copy_only=False), dtype=np.int64)
