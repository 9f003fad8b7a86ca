"""Which tokens does a question about firing latents look at, and what are their codes? A text's, some rows', or a document's."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore._lazy import lazy_import
from actstore.checks import is_whole
from actstore.codes import Codes
from actstore.dictionary import Dictionary
from actstore.errors import ErrorKind, InvalidInputError, NotFoundError
from actstore.run import Run
from actstore.sparse import SparseRows
from actstore.targets import Document

from .eligible import Masks, Removed, check_selection
from .firings import is_encoded
from .row_mask import RowMask, sink_rule
from .unit_tables import read_words

Bools = npt.NDArray[np.bool_]
Int64s = npt.NDArray[np.int64]

MAX_ROWS = 1 << 22
"""Most tokens in one question: what is held of each takes about 40 bytes."""

_BATCH_ROWS = 8192


@dataclass(slots=True)
class CodedTokens:
    """The tokens asked about, those that masks left, in their order; t of them."""

    rows: Int64s | None
    """Row numbers, shape (t,); None for a text."""

    doc_id: Int64s | None
    position: npt.NDArray[np.int32]
    """In the document or text, shape (t,); so the next one."""

    token_id: npt.NDArray[np.int32]
    tokens: pa.Array
    removed: Removed
    echo: dict[str, Any]
    """The subject and the masks, as they are reported."""

    _codes: Codes | None = None
    _held: SparseRows | None = None

    def __len__(self) -> int:
        return len(self.position)

    def batches(self) -> Iterator[tuple[int, SparseRows]]:
        """Yield the index of the first token and the codes of some tokens, in order."""
        for start in range(0, len(self), _BATCH_ROWS):
            stop = min(len(self), start + _BATCH_ROWS)
            if self._held is not None:
                yield start, self._held.slice(start, stop)
            else:
                assert self._codes is not None
                assert self.rows is not None
                yield start, self._codes.rows(self.rows[start:stop])


def read_subject(
    run: Run, what: Any, dictionary: Dictionary, codes: Codes | None, *, special: bool, sinks: bool
) -> CodedTokens:
    """Return the tokens of a text, of rows or of a document; rows given by number are taken as they are, without masks.

    Raises:
        NotFoundError: no such row or document.
        InvalidInputError: a subject that is none of these, too many rows, or an empty text.
    """
    if isinstance(what, str):
        return _of_text(run, what, dictionary, codes, special=special, sinks=sinks)
    if codes is None:
        raise AssertionError("rows and documents are asked about through codes")
    if isinstance(what, Document):
        return _of_document(run, what.doc_id, codes, special=special, sinks=sinks)
    return _of_rows(run, [int(what)] if is_whole(what) else what, codes)


def _of_text(
    run: Run, text: str, dictionary: Dictionary, codes: Codes | None, *, special: bool, sinks: bool
) -> CodedTokens:
    encoders = lazy_import(
        "actstore.ingest.dictionaries.encoder", needed_for="active() of a text", extra="ingest"
    )
    hook_point = encoders.check_fits(dictionary, run)
    [encoded] = run.encode_text([text], hook_point)
    value_dtype = "float32" if codes is None else codes.value_dtype
    held: SparseRows = encoders.Encoder(dictionary, value_dtype=value_dtype).encode(encoded.activations)
    removed = Removed(n_seen=len(encoded.token_ids))
    keep = np.ones(len(encoded.token_ids), np.bool_)
    if special:
        keep = removed.apply("special", keep, ~encoded.is_special)
    if sinks:
        keep = removed.apply("window_first", keep, np.arange(len(keep)) > 0)
        norms = np.linalg.norm(encoded.activations.astype(np.float64), axis=1)
        keep = removed.apply("norm", keep, norms <= sink_rule(run, hook_point).limit)
    removed.n_kept = int(keep.sum())
    at = np.flatnonzero(keep)
    echo = {"subject": "text", "text": text, "mask_special": special, "mask_sinks": sinks}
    token_id = encoded.token_ids[at]
    words = read_words(run.tokenization).read(token_id)
    return CodedTokens(None, None, at.astype(np.int32), token_id, words, removed, echo, _held=held.take(at))


def _of_document(run: Run, doc_id: int, codes: Codes, *, special: bool, sinks: bool) -> CodedTokens:
    rows, _ = codes.document(doc_id)
    rows = np.asarray(rows, np.int64)
    removed = Removed()
    masks = Masks(None, None, None, special=special, sinks=sinks)
    rule = sink_rule(run, codes.hook_point) if sinks else None
    with RowMask(run, masks, sinks=rule, norms=codes.norms, memory_bytes=64 << 20) as mask:
        keep = mask.keep(rows, removed)
        keep = removed.apply("repeated", keep, _first_of_position(mask, rows, keep))
        removed.n_kept = int(keep.sum())
        found = _described(run, mask, rows[keep], codes, removed)
    found.echo = {"subject": "document", "doc_id": doc_id, "mask_special": special, "mask_sinks": sinks}
    return found


def _first_of_position(mask: RowMask, rows: Int64s, keep: Bools) -> Bools:
    """Return which rows are the first at their position: where windows overlap, a token has several rows."""
    told = mask.columns(rows, "position", "is_special")
    places = told["position"].astype(np.int64) * 2 + told["is_special"]
    at = np.flatnonzero(keep)
    _, first = np.unique(places[at], return_index=True)
    firsts = np.zeros(len(rows), np.bool_)
    firsts[at[first]] = True
    return firsts


def _of_rows(run: Run, what: Any, codes: Codes) -> CodedTokens:
    top = run.tokenization.rows_per_unit * len(run.tokenization.units)
    if isinstance(what, (bytes, dict)) or what is None:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"active() is asked about a text, row numbers, or actstore.query.active.document(doc_id), got {what!r:.80}",
        )
    rows = check_selection(what, top, name="rows", what="row")
    assert rows is not None
    if not 0 < len(rows) <= MAX_ROWS:
        raise InvalidInputError(
            ErrorKind.TOO_LARGE if len(rows) else ErrorKind.BAD_ARGUMENT,
            f"active() takes 1 to {MAX_ROWS} rows, got {len(rows)}: statistics of all rows are run.latents()",
        )
    stored = is_encoded(codes, rows)
    if isinstance(what, slice):  # row numbers have gaps, and a range may go over them
        rows = rows[stored]
    elif not stored.all():
        codes.rows(rows[~stored][:1])  # tells which rows there are
    if not len(rows):
        raise NotFoundError(
            ErrorKind.ROW_NOT_FOUND,
            f"rows {what!r:.80} were asked for, and codes {codes.id!r} have none of them",
        )
    removed = Removed(n_seen=len(rows), n_kept=len(rows))
    no_masks = Masks(None, None, None, special=False, sinks=False)
    with RowMask(run, no_masks, sinks=None, norms=codes.norms, memory_bytes=64 << 20) as mask:
        found = _described(run, mask, rows, codes, removed)
    told: Any = rows.tolist() if len(rows) <= 16 else f"{len(rows)} rows from {rows[0]} to {rows[-1]}"
    found.echo = {"subject": "rows", "rows": told, "mask_special": False, "mask_sinks": False}
    return found


def _described(run: Run, mask: RowMask, rows: Int64s, codes: Codes, removed: Removed) -> CodedTokens:
    told = mask.columns(rows, "doc_id", "position", "token_id")
    words = read_words(run.tokenization).read(told["token_id"])
    return CodedTokens(
        rows, told["doc_id"], told["position"], told["token_id"], words, removed, {}, _codes=codes
    )
