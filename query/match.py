"""In which contexts do latents fire together, apart, or one after the other?

    run.match(fires(latent("sae", 3)) & ~fires(latent("sae", 9)), within=4)
    run.match(fires(latent("sae", 3)) & (fires(latent("sae", 7)) > 2), within=8, ordered=True)

Exact. Where all dictionaries have postings, those of the rarest latent are read first and only firings near them are kept of
the others; otherwise the codes are scanned.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from actstore.checks import check_whole
from actstore.codes import Codes
from actstore.errors import ErrorKind, InvalidInputError
from actstore.patterns import Conjunction, Fires, Pattern, conjunctions, describe, fires, parse_pattern
from actstore.result import Meta, Result
from actstore.run import Run
from actstore.targets import Latent

from .answer import DEFAULT_MEMORY_BYTES, RowOptions, check_choice
from .cofiring import Bools, Float64s, Int64s, match_anchors, stretch, strongest
from .context import check_context
from .eligible import Masks, Removed, Selection
from .firings import Firings, find_firings, is_encoded
from .fold import Fold
from .latents import run_warnings
from .row_contexts import describe_shown, show_rows
from .row_mask import RowMask, sink_rule
from .scan import check_k
from .top_k import TopK

__all__ = ["Pattern", "fires", "match", "parse_pattern"]

MAX_WITHIN = 1 << 20
"""Longest distance in tokens: longer than any document that one would call near."""

Scope = Literal["window", "document"]
RankMatches = Literal["strength", "row"]

PARTS_TYPE = pa.list_(
    pa.struct(
        [
            pa.field("latent", pa.string()),
            pa.field("row", pa.int64()),
            pa.field("distance", pa.int32()),
            pa.field("value", pa.float64()),
        ]
    )
)
"""The strongest firing of each condition near the answer, in the order of the pattern."""


def match(
    run: Run,
    pattern: Pattern | Latent,
    k: int = 20,
    *,
    within: int = 0,
    ordered: bool = False,
    scope: Scope = "window",
    rank: RankMatches = "strength",
    before: int = 16,
    after: int = 8,
    where: str | None = None,
    regex: str | None = None,
    mask_special: bool = True,
    mask_sinks: bool = True,
    fold: Fold = "context",
    rows: Selection = None,
    docs: Selection = None,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
) -> Result:
    """Return the tokens at which a pattern of latents holds, each with its context.

    A pattern is written out as alternatives of latents that must fire and latents that must not. The answer is a row on which the
    first latent of an alternative (its anchor) fires such that

    - every other latent that must fire does so on tokens that lie, together with the anchor, within `within` tokens of each
      other (their largest distance is at most `within`; 0: on the same token),
    - if `ordered`, each of them strictly after the one before it in the pattern, and
    - no latent that must not fire does so within `within` tokens of the anchor, before or after it.

    `~` is moved to the latents first: `~(a & b)` means `~a | ~b`.

    Tokens that `mask_special` and `mask_sinks` leave out do not count for any latent; `where`, `regex`, `rows` and `docs` are
    about the answer's own row. Memory: 24 bytes per firing that is kept; TOO_LARGE when that is beyond `memory_bytes`.

    Args:
        run: The run to ask; one that is not complete answers from what is encoded.
        pattern: `fires(latent(...))` joined by `&`, `|`, `~`, with bounds as `fires(...) > 0.5`; latents of several
            dictionaries of the run may be mixed.
        k: Answers, at most.
        within: Distance in tokens.
        ordered: Whether the latents must follow each other as in the pattern.
        scope: "window": inside one model window, by its token positions; "document": inside one document, by the document's
            token positions, across windows.
        rank: "strength": by the weakest of the alternative's latents, each as its largest value near the anchor divided by its
            largest value in the run; of several alternatives that hold at a row the strongest (fuzzy logic's and, or: Zadeh 1965,
            "Fuzzy sets", Information and Control 8(3)). "row": in the order of the corpus. Equal ones by row.
        before: Tokens shown before each answer.
        after: Tokens shown after it.
        where: SQL condition over columns of `tokens` and of the documents.
        regex: Regular expression (RE2) that the answer's token matches.
        mask_special: Tokens that the tokenizer added do not count.
        mask_sinks: Attention sinks do not count: the first token of each window, and rows of over 10 times the median norm.
        fold: "context": of rows with the same last 8 tokens only the best; "doc": only the best of a document; None: all.
        rows: Only these rows (numbers or a slice).
        docs: Only these documents (numbers or a slice).
        memory_bytes: Bound on the firings held.

    Returns:
        Columns: rank, row, doc_id, position, token_id, token, value (the strength, 0 to 1), parts (`PARTS_TYPE`: of each
        latent that must fire the strongest value near the anchor, where, and how many tokens away), context (its values are
        the largest of the pattern's latents' on each token, each as a share of its largest value in the run).

    Raises:
        NotFoundError: no such dictionary, codes, latent, row or document.
        InvalidInputError: no pattern, one that holds nowhere, an alternative in which nothing must fire, more firings than
            `memory_bytes` holds, or a bad option.
        FormatError: stored codes are missing or damaged.
    """
    start = time.perf_counter()
    k, within = check_k(k), check_whole(within, what="within", least=0, most=MAX_WITHIN)
    check_choice(scope, Scope, what="scope")
    check_choice(rank, RankMatches, what="rank")
    check_choice(fold, Fold, what="fold")
    check_context(before, after)
    alternatives = conjunctions(pattern)
    if not alternatives:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"the pattern {describe(pattern)} holds nowhere: it asks a latent to fire and not to fire; leave one of the two out",
        )
    options = RowOptions(where, rows, docs, mask_special, mask_sinks, fold, memory_bytes, regex)
    found = find_firings(
        run, alternatives, reach=within if scope == "window" else None, memory_bytes=memory_bytes
    )
    search = _Search(run, found, options, within=within, ordered=ordered, scope=scope)
    best, removed = search.run_all(alternatives, k=k, rank=rank)
    table = search.describe(best, before=before, after=after)
    request = {"verb": "match", "run": run.id, "pattern": describe(pattern), "k": k, "within": within}
    request |= {"ordered": ordered, "scope": scope, "rank": rank, "before": before, "after": after}
    warnings = [w for codes in found.codes.values() for w in run_warnings(run, codes)]
    if len(best) < k:
        warnings.append(f"{len(best)} rows were found of {k} asked for")
    meta = Meta(
        version=run.store.version,
        recall=1.0,
        n_requested=k,
        n_returned=len(best),
        n_eligible=removed.n_kept,
        bytes_read=found.nbytes + search.nbytes,
        request={**request, **options.echo()},
        mask={
            "n_rows": removed.n_seen,
            "removed": dict(removed.counts),
            "firing_rows_removed": search.dropped,
        },
        budget={"memory_bytes": memory_bytes},
        warnings=tuple(dict.fromkeys(warnings)),
        elapsed_s=time.perf_counter() - start,
    )
    return Result(table, meta)


@dataclass(slots=True)
class _Matches:
    """The rows at which one conjunction holds, ascending, with each condition's strongest firing near them; m of them."""

    conjunction: Conjunction
    rows: Int64s
    strength: Float64s
    parts: dict[Fires, tuple[Float64s, Int64s, Int64s]] = field(default_factory=dict)
    """Value, row and distance of the strongest firing of each latent, shape (m,) each."""

    def parts_at(self, row: int) -> list[dict[str, Any]]:
        """Return the row's entry of the column `parts`."""
        i = int(np.searchsorted(self.rows, row))
        return [
            {"latent": leaf.label, "row": int(r[i]), "distance": int(d[i]), "value": float(v[i])}
            for leaf, (v, r, d) in self.parts.items()
        ]


class _Search:
    """One question: the firings that count, and where a pattern holds among them."""

    def __init__(
        self, run: Run, found: Firings, options: RowOptions, *, within: int, ordered: bool, scope: Scope
    ) -> None:
        self._run = run
        self._found = found
        self._options = options
        self._within = within
        self._ordered = ordered
        self._scope = scope
        self._matches: list[_Matches] = []
        self.nbytes = 0
        self.dropped: dict[str, int] = {}
        """Firings that masks on tokens left out, by mask."""

    def run_all(
        self, alternatives: Sequence[Conjunction], *, k: int, rank: RankMatches
    ) -> tuple[list[tuple[float, int]], Removed]:
        """Return (strength, row) of the best `k` rows, best first, and what masks removed."""
        coordinates = self._place_firings()
        self._matches = [self._hold(conjunction, coordinates) for conjunction in alternatives]
        rows = np.unique(np.concatenate([np.empty(0, np.int64), *(m.rows for m in self._matches)]))
        strength = np.zeros(len(rows))
        for found in self._matches:
            at = np.searchsorted(rows, found.rows)
            strength[at] = np.maximum(strength[at], found.strength)
        removed, best = Removed(), TopK(k)
        options = self._options
        masks = Masks(
            options.where, options.rows, options.docs, special=False, sinks=False, regex=options.regex
        )
        with self._mask(masks, self._codes[0]) as mask:
            kept = np.flatnonzero(mask.keep(rows, removed))
            scores = strength[kept] if rank == "strength" else -rows[kept].astype(np.float64)
            if len(kept):
                best.offer(scores, rows[kept], mask.fold_keys(options.fold, rows[kept]))
            self.nbytes += sum(mask.bytes_of_units.values())
        told = [row for _, row in best.ranked()]
        return [(float(strength[np.searchsorted(rows, row)]), row) for row in told], removed

    def describe(self, best: Sequence[tuple[float, int]], *, before: int, after: int) -> pa.Table:
        """Return the answer's table."""
        rows = np.array([row for _, row in best], np.int64)
        own = np.array([strength for strength, _ in best], np.float64)
        tokenization = self._run.tokenization
        shown = show_rows(tokenization, rows, before=before, after=after)
        values, missing = self._found.shares(shown.token_rows)
        ranks = np.arange(1, len(rows) + 1)
        table = describe_shown(tokenization, shown, values, ranks=ranks, own=own, missing=missing)
        at = table.schema.get_field_index("context")
        parts = [self._parts_of(strength, row) for strength, row in best]
        return table.add_column(at, "parts", pa.array(parts, PARTS_TYPE))

    def _parts_of(self, strength: float, row: int) -> list[dict[str, Any]]:
        """Return the parts of the first alternative that holds at a row as strongly as any."""
        for found in self._matches:
            i = int(np.searchsorted(found.rows, row))
            if i < len(found.rows) and found.rows[i] == row and found.strength[i] == strength:
                return found.parts_at(row)
        raise AssertionError("an answer comes from one of the alternatives")

    @property
    def _codes(self) -> list[Codes]:
        return list(self._found.codes.values())

    def _mask(self, masks: Masks, codes: Codes) -> RowMask:
        run = self._run
        rule = sink_rule(run, codes.hook_point) if masks.sinks else None
        memory = max(64 << 20, self._options.memory_bytes // 4)
        return RowMask(run, masks, sinks=rule, norms=codes.norms, memory_bytes=memory)

    def _place_firings(self) -> tuple[Int64s, Int64s]:
        """Drop firings on tokens that do not count, and return all rows that stay and their coordinates."""
        options = self._options
        rows, removed = self._found.all_rows(), Removed()
        masks = Masks(None, None, None, special=options.mask_special, sinks=options.mask_sinks)
        # What is a sink is a matter of the hook point, and latents of several may be in the pattern.
        by_hook_point = {codes.hook_point: codes for codes in reversed(self._codes)}
        for codes in by_hook_point.values():
            with self._mask(masks, codes) as mask:
                some = is_encoded(codes, rows)
                counts = np.ones(len(rows), np.bool_)
                counts[some] = mask.keep(rows[some], removed)
                rows = rows[counts]
        names = ("doc_id", "position") if self._scope == "document" else ("window_position",)
        with self._mask(Masks(None, None, None, special=False, sinks=False), self._codes[0]) as mask:
            told = mask.columns(rows, *names)
            self.nbytes += sum(mask.bytes_of_units.values())
        self.dropped = dict(removed.counts)
        if self._scope == "document":
            segments, places = np.unique(told["doc_id"], return_inverse=True)[1], told["position"]
        else:
            # Windows are stretches of rows: the row of a window's first token names the window.
            places = told["window_position"]
            segments = np.unique(rows - places, return_inverse=True)[1]
        n_places = int(places.max(initial=0)) + 1
        where = stretch(segments.astype(np.int64), places.astype(np.int64), self._within, n_places)
        return rows, where

    def _hold(self, conjunction: Conjunction, coordinates: tuple[Int64s, Int64s]) -> _Matches:
        """Return where one conjunction holds."""
        kept, where = coordinates
        placed = {
            leaf: _Placed.of(*self._found.of(leaf), kept, where)
            for leaf in (*conjunction.positive, *conjunction.negative)
        }
        anchor = placed[conjunction.positive[0]]
        holds = match_anchors(
            [placed[leaf].where for leaf in conjunction.positive],
            [placed[leaf].where for leaf in conjunction.negative],
            within=self._within,
            ordered=self._ordered,
        )
        return self._measured(conjunction, placed, anchor.only(holds))

    def _measured(
        self, conjunction: Conjunction, placed: dict[Fires, "_Placed"], anchor: "_Placed"
    ) -> _Matches:
        strength = np.full(len(anchor.rows), np.inf)
        parts = {}
        for i, leaf in enumerate(conjunction.positive):
            if i == 0:
                values, rows, distance = anchor.values, anchor.rows, np.zeros(len(anchor.rows), np.int64)
            else:
                of_leaf = placed[leaf]
                # In order: strictly after the anchor.
                reach = -1 if self._ordered else self._within
                values, at = strongest(
                    anchor.where, of_leaf.where, of_leaf.values, before=reach, after=self._within
                )
                rows, distance = of_leaf.rows[at], of_leaf.where[at] - anchor.where
            strength = np.minimum(strength, values / self._found.largest(leaf))
            parts[leaf] = (values, rows, distance)
        order = np.argsort(anchor.rows, kind="stable")
        parts = {leaf: (v[order], r[order], d[order]) for leaf, (v, r, d) in parts.items()}
        return _Matches(conjunction, anchor.rows[order], strength[order], parts)


@dataclass(frozen=True, slots=True)
class _Placed:
    """Firings of one condition that count, sorted by coordinate."""

    where: Int64s
    rows: Int64s
    values: Float64s

    @classmethod
    def of(cls, rows: Int64s, values: Float64s, kept: Int64s, where: Int64s) -> "_Placed":
        """Place firings, given by rows, that are among the rows that count."""
        place = np.minimum(np.searchsorted(kept, rows), max(0, len(kept) - 1))
        counts = kept[place] == rows if len(kept) else np.zeros(len(rows), np.bool_)
        rows, values, found = rows[counts], values[counts], where[place[counts]]
        # In a document's order rows of a later unit may come first only if positions repeat: sort, by row among equals.
        order = np.lexsort((rows, found))
        return cls(found[order], rows[order], values[order])

    def only(self, holds: Bools) -> "_Placed":
        return _Placed(self.where[holds], self.rows[holds], self.values[holds])
