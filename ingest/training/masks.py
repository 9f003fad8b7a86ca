"""Which stored rows may a dictionary learn from?

Not special tokens, not the first token of a window (attention sinks are nearly always there), and not the documents that are
kept for measuring. Those are known from the tokens. Rows whose norm marks them as sinks, and rows that are not finite, are
found when the activations are at hand (`norm_limit`).

Source: Xiao et al. (2023), "Efficient Streaming Language Models with Attention Sinks", arXiv:2309.17453, section 3.1; Sun et
al. (2024), "Massive Activations in Large Language Models", arXiv:2402.17762, section 2.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actstore.ingest.check_documents import DocumentTokens
from actstore.run import Run
from actstore.sampling import parse_kept
from actstore.stats import SINK_NORM_RATIO

Bools = npt.NDArray[np.bool_]
Int64s = npt.NDArray[np.int64]

_COLUMNS = ("doc_id", "is_special", "window_position")
_FEWEST_DOCUMENTS = 10
"""A tenth of the documents at most is held out, so fewer leave none."""


@dataclass(frozen=True, slots=True)
class Window:
    """A model's window of a document of the evaluation."""

    token_ids: npt.NDArray[np.int32]
    """(t,): the whole window."""

    is_stored: Bools
    """(t,): whether the run has the row."""

    rows: Int64s
    """(t,): row numbers."""

    keep: Bools
    """(t,): whether a dictionary is trained for it, as far as the tokens tell."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What is measured on."""

    documents: Int64s
    """Held out if `is_held_out`; ascending."""

    is_held_out: bool
    windows: tuple[Window, ...]
    begins_with_special: bool
    """Whether every window begins with a special token."""

    def rows(self) -> Int64s:
        """Return the stored rows that a dictionary is trained for, as far as the tokens tell."""
        return np.concatenate([np.empty(0, np.int64), *(w.rows[w.keep & w.is_stored] for w in self.windows)])


class TokenMask:
    """Which rows may be learned from, as far as the tokens tell. A bit for each row, filled in unit by unit when asked."""

    def __init__(self, run: Run, *, special: bool, sinks: bool, held_out: Int64s) -> None:
        """Say what is masked; reads nothing yet.

        Args:
            run: Whose rows.
            special: Whether special tokens are.
            sinks: Whether the first token of each window is.
            held_out: Documents that are, ascending.
        """
        self._run, self._special, self._sinks, self._held_out = run, special, sinks, held_out
        self._unit_rows = run.tokenization.rows_per_unit
        n_units = max(run.collection.units, default=-1) + 1
        self._bits = np.zeros(-(-n_units * self._unit_rows // 8), np.uint8)
        self._is_known = np.zeros(n_units, np.bool_)

    def keep(self, rows: Int64s) -> Bools:
        """Return which of some stored rows may be learned from, (n,)."""
        units = rows // self._unit_rows
        for unit in np.unique(units[~self._is_known[units]]).tolist():
            self._read(unit)
        found: Bools = (self._bits[rows >> 3] >> (rows & 7).astype(np.uint8)) & 1 > 0
        return found

    def _read(self, unit: int) -> None:
        table = self._run.tokenization.unit_table(unit, _COLUMNS)
        keep = np.ones(table.num_rows, np.bool_)
        if self._special:
            keep &= ~table["is_special"].to_numpy()
        if self._sinks:
            keep &= table["window_position"].to_numpy() > 0
        if len(self._held_out):
            keep &= ~np.isin(table["doc_id"].to_numpy(), self._held_out)
        numbers = np.flatnonzero(keep) + unit * self._unit_rows
        np.bitwise_or.at(self._bits, numbers >> 3, (1 << (numbers & 7)).astype(np.uint8))
        self._is_known[unit] = True


def norm_limit(run: Run, hook_point: str, *, sinks: bool) -> float:
    """Return the norm above which a row is taken for an attention sink; infinite if sinks stay, or the median is unknown."""
    median = run.stats(hook_point).norm_quantile(0.5) if sinks else math.nan
    return SINK_NORM_RATIO * median if math.isfinite(median) and median > 0 else math.inf


def choose_evaluation(run: Run, *, n_rows: int, seed: int, special: bool, sinks: bool) -> Evaluation:
    """Draw documents of about `n_rows` rows to measure on; at most a tenth of the documents, unless those are very few.

    Reads the token table of every unit in which a drawn document lies.

    Args:
        run: The run.
        n_rows: Rows wanted; windows are taken until there are so many.
        seed: Of the choice.
        special: Whether special tokens are masked.
        sinks: Whether the first token of each window is.
    """
    tokenization = run.tokenization
    n_documents = tokenization.corpus.n_documents
    is_held_out = n_documents >= _FEWEST_DOCUMENTS
    per_document = max(1.0, run.n_rows / max(1, n_documents))
    most = n_documents // _FEWEST_DOCUMENTS if is_held_out else n_documents
    wanted = min(most, math.ceil(n_rows / per_document))
    rng = np.random.default_rng([seed, 0x6576616C])
    documents = np.sort(rng.choice(n_documents, size=wanted, replace=False)).astype(np.int64)
    windows: list[Window] = []
    begins, found = True, 0
    tokens, kept = DocumentTokens(tokenization), parse_kept(run.collection.config)
    # In the order drawn, and not by number, windows would be a fairer choice where there are too many: they are not.
    for doc_id in documents.tolist():
        for unit, table in tokens.windows(doc_id):
            if unit not in run.collection.units or found >= n_rows:
                continue
            rows = table["row"].to_numpy()
            is_special, position = table["is_special"].to_numpy(), table["window_position"].to_numpy()
            keep = ~(is_special & special) & ~((position == 0) & sinks)
            begins &= bool(is_special[0])
            stored = np.ones(len(rows), np.bool_)
            if kept is not None:
                offsets = kept.offsets(unit, kept.rows_per_unit)
                stored = np.isin(rows - unit * tokenization.rows_per_unit, offsets)
            windows.append(Window(table["token_id"].to_numpy(), stored, rows, keep))
            found += len(rows)
    return Evaluation(documents, is_held_out, tuple(windows), begins and bool(windows))
