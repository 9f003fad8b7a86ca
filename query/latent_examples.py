"""Which stored contexts most activate a latent, and what do those look like on which it fires less, or not at all?

Exact: a latent's postings are all rows on which it fires. Where they are few enough, all of them are masked and counted; of a
latent that fires on many millions of rows, or in many units, only the strongest are looked at, until enough of them pass.
Windows are cut when they are asked for, and every token in them carries the latent's own value.

Requests, tokens and texts being in the process's caches: one or two for the postings of each latent, however many rows are
shown, and the pages of the rows' codes where the latent's list is too long to be read whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.arrow_arrays import from_texts
from actstore.codes import Codes
from actstore.errors import ErrorKind, NotFoundError
from actstore.run import Run
from actstore.stats import SINK_NORM_RATIO
from actstore.targets import Latent

from .answer import RowOptions
from .bands import Bands, Picked, pick_rows, top
from .eligible import Removed
from .latent_rows import LatentRows, Values, open_latent_rows, value_order, values_among, values_at
from .quiet_rows import StoredRows, draw_quiet_rows
from .row_contexts import describe_shown, show_rows
from .row_mask import RowMask, SinkRule, sink_rule

Int64s: TypeAlias = npt.NDArray[np.int64]
Float64s: TypeAlias = npt.NDArray[np.float64]

WHOLE_ROWS = 1 << 20
"""A latent that fires on no more rows is read whole: about 3 MB."""

WHOLE_UNITS = 16
"""All rows of a latent are masked and counted where they lie in no more units: a new process reads as many objects for it, which
takes it about 6 ms on a local disk, and a request for each elsewhere."""

WHOLE_TOKENS = 1 << 20
"""And where these units hold no more tokens: 16 of the usual ones."""

_SPARE_ROWS = 2
"""Rows looked at beside those asked for: most often the masks and folding leave out none or one of the strongest."""

_FEW_KEYS = 1024
"""Keys that are told apart one by one. numpy's `unique` imports 16 ms of modules at its first call."""


@dataclass(slots=True)
class Found:
    """What is shown of one latent."""

    rows: Int64s
    """In the order shown."""

    ranks: Int64s
    """From 1 in every band."""

    bands: list[str]
    """Of every row; empty if none were asked for."""

    firing: tuple[Int64s, Values] | None
    """All rows on which the latent fires, in any order, and its values there; None if they were not read."""

    n_eligible: int | None
    report: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(slots=True)
class LatentAnswers:
    """The answers about some latents, by the place of each in the question."""

    tables: dict[int, pa.Table] = field(default_factory=dict)
    masks: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    n_eligible: list[int | None] = field(default_factory=list)
    bytes_read: int = 0


def answer_latents(
    run: Run,
    targets: Mapping[int, Latent],
    options: RowOptions,
    bands: Bands | None,
    *,
    k: int,
    before: int,
    after: int,
) -> LatentAnswers:
    """Return the contexts of every latent: the best `k`, or those of `bands`.

    Args:
        run: The run asked.
        targets: Latents of it, checked, by place.
        options: Which rows count.
        bands: Which of them are shown; None for the best `k`.
        k: Rows shown of each latent, at most.
        before: Tokens shown before each row.
        after: Tokens shown after it.

    Raises:
        NotFoundError: the run was not encoded with a dictionary, or the dictionary has no such latent.
        InvalidInputError: a mask is none, or what must be in memory at once does not fit.
        FormatError: stored objects are missing or damaged.
    """
    answers = LatentAnswers()
    for dictionary in dict.fromkeys(target.dictionary for target in targets.values()):
        members = {i: t for i, t in targets.items() if t.dictionary == dictionary}
        codes = _open_codes(run, dictionary, members.values())
        source = open_latent_rows(
            codes, [t.index for t in members.values()], memory_bytes=options.memory_bytes
        )
        rule = sink_rule(run, codes.hook_point) if options.mask_sinks else None
        mask = RowMask(
            run,
            options.masks,
            sinks=rule,
            norms=codes.norms,
            memory_bytes=max(64 << 20, options.memory_bytes // 4),
        )
        with mask:
            search = _Search(run, codes, source, mask, rule, options, bands or top(k), bands is not None)
            for i, target in members.items():
                found = search.find(target)
                answers.tables[i] = search.describe(target, found, before, after)
                answers.masks[target.label] = found.report
                answers.warnings += found.warnings
                answers.n_eligible.append(found.n_eligible)
            answers.bytes_read += search.bytes_read + sum(mask.bytes_of_units.values())
        answers.warnings += _run_warnings(run, codes, source)
    return answers


class _Search:
    """One question about the latents of one dictionary."""

    def __init__(
        self,
        run: Run,
        codes: Codes,
        source: LatentRows,
        mask: RowMask,
        rule: SinkRule | None,
        options: RowOptions,
        bands: Bands,
        is_banded: bool,
    ) -> None:
        self._run, self._codes, self._source, self._mask = run, codes, source, mask
        self._rule, self._fold, self._bands, self._is_banded = rule, options.fold, bands, is_banded
        self._rows_per_unit = run.tokenization.rows_per_unit
        self._stored = StoredRows(run, codes.collection)
        self.bytes_read = 0

    def find(self, target: Latent) -> Found:
        """Return the rows to show of one latent."""
        n_firing = self._source.count(target.index)
        self.bytes_read += self._source.nbytes(target.index)
        has_quiet = any(band.kind == "nonactivating" for band in self._bands.parts)
        firing = None
        is_whole = self._bands.needs_all
        if is_whole or n_firing <= min(WHOLE_ROWS, self._source.most_rows):
            if is_whole or has_quiet or self._is_few(len(self._codes.collection.units)):
                firing = self._source.whole(target.index)
            else:
                firing = self._source.ranked(target.index)
            is_whole |= self._is_few(int(np.count_nonzero(np.bincount(firing[0] // self._rows_per_unit))))
        removed = Removed()
        rows, values = self._all(firing, removed) if is_whole and firing else self._best(target, removed)
        picked = pick_rows(self._bands, rows, values)
        shown = [rows[one.index] for one in picked]
        if has_quiet and firing is not None and n_firing:
            self._add_quiet(shown, firing[0])
        n_eligible = removed.n_kept if is_whole else None
        found = Found(
            np.concatenate(shown) if shown else np.empty(0, np.int64),
            np.concatenate([np.arange(1, len(some) + 1) for some in shown]),
            [one.band for one, some in zip(picked, shown, strict=True) for _ in some.tolist()],
            firing,
            n_eligible,
        )
        found.report = self._report(removed, n_firing, None if is_whole else removed.n_seen, picked, shown)
        found.warnings = self._warnings(target, n_firing, n_eligible, picked, shown)
        return found

    def describe(self, target: Latent, found: Found, before: int, after: int) -> pa.Table:
        """Return the rows with their contexts, and the latent's value on every token shown."""
        tokenization = self._run.tokenization
        shown = show_rows(tokenization, found.rows, before=before, after=after)
        token_rows = shown.token_rows
        exist = self._stored.exist(token_rows)
        if found.firing is not None:
            values = values_among(*found.firing, token_rows)
        else:
            values = self._read_values(target.index, token_rows, exist)
        table = describe_shown(
            tokenization, shown, values, ranks=found.ranks, missing=None if exist.all() else ~exist
        )
        if self._is_banded:
            table = table.add_column(0, "band", from_texts(found.bands))
        return table

    def _is_few(self, n_units: int) -> bool:
        """Whether the rows of so many units are few enough to be looked at all."""
        return n_units <= WHOLE_UNITS and n_units * self._rows_per_unit <= WHOLE_TOKENS

    def _all(self, firing: tuple[Int64s, Values], removed: Removed) -> tuple[Int64s, Float64s]:
        """Return all rows that count, folded, in the order of answers; or as many as the top needs."""
        rows, values = firing
        if not (rows[1:] > rows[:-1]).all():
            ascending = np.argsort(rows)
            rows, values = rows[ascending], values[ascending]
        keep = self._mask.keep(rows, removed)
        rows, values = rows[keep], values[keep]
        order = value_order(values)
        rows, values = rows[order], values[order]
        if self._fold is None:
            return rows, values.astype(np.float64)
        if self._bands.needs_all:
            first = _first_of_each(self._mask.fold_keys(self._fold, rows))
        else:
            first = self._folded_prefix(rows, self._bands.n_requested)
        return rows[first], values[first].astype(np.float64)

    def _folded_prefix(self, rows: Int64s, n: int) -> Int64s:
        """Return where the first `n` rows of different keys are; all if there are no more."""
        size = n + _SPARE_ROWS
        while True:
            first = _first_of_each(self._mask.fold_keys(self._fold, rows[:size]))
            if len(first) >= n or size >= len(rows):
                return first[:n]
            size = _next_look(size, n, len(first))

    def _best(self, target: Latent, removed: Removed) -> tuple[Int64s, Float64s]:
        """Return the best rows that count, folded, looking at no more of them than it takes."""
        n, n_firing = self._bands.n_requested, self._source.count(target.index)
        size = n + _SPARE_ROWS
        while True:
            rows, values = self._source.best(target.index, size)
            counted = Removed()
            ascending = np.argsort(rows)
            keep = np.empty(len(rows), np.bool_)
            keep[ascending] = self._mask.keep(rows[ascending], counted)
            # Keys of all of them: their tokens are at hand, those of other rows would be looked up again.
            keys = self._mask.fold_keys(self._fold, rows)[keep]
            rows, values = rows[keep], values[keep]
            first = _first_of_each(keys)
            if len(first) >= n or size >= n_firing:
                removed.counts, removed.n_seen, removed.n_kept = (
                    counted.counts,
                    counted.n_seen,
                    counted.n_kept,
                )
                return rows[first], values[first].astype(np.float64)
            size = _next_look(size, n, len(first))

    def _add_quiet(self, shown: list[Int64s], firing: Int64s) -> None:
        """Draw the rows of the `nonactivating` bands into `shown`."""
        bands = [band for band in self._bands.parts for _ in range(band.n_bands)]
        seen: set[bytes] = set()
        for some in shown if self._fold is not None else ():
            seen.update(key.tobytes() for key in self._mask.fold_keys(self._fold, some))
        among = self._mask.named_rows() if any(band.kind == "nonactivating" for band in bands) else None
        for i, band in enumerate(bands):
            if band.kind == "nonactivating":
                shown[i] = draw_quiet_rows(
                    self._stored,
                    among,
                    band.per,
                    seed=band.seed,
                    firing=firing,
                    keep=self._is_quiet_answer,
                    keys=lambda rows: self._mask.fold_keys(self._fold, rows),
                    shown=seen,
                )

    def _is_quiet_answer(self, rows: Int64s) -> npt.NDArray[np.bool_]:
        keep = self._mask.keep(rows, Removed())
        if self._rule is None or self._rule.has_nonfinite:
            # A row that is not finite is stored as one of norm 0, and so are rows of zeros: neither is a context to show.
            keep[keep] = self._codes.norms(rows[keep]) > 0
        return keep

    def _read_values(self, latent: int, token_rows: Int64s, exist: npt.NDArray[np.bool_]) -> Float64s:
        """Return a latent's value on tokens, from the codes of their rows; 0 where there is no row."""
        rows = np.array(sorted(set(token_rows[exist].tolist())), np.int64)
        codes = self._codes.rows(rows)
        mine = np.flatnonzero(codes.latents == latent)
        at = np.searchsorted(codes.indptr, mine, side="right") - 1
        return values_at(rows[at], codes.values[mine], token_rows)

    def _report(
        self,
        removed: Removed,
        n_firing: int,
        n_examined: int | None,
        picked: Sequence[Picked],
        shown: Sequence[Int64s],
    ) -> dict[str, Any]:
        report: dict[str, Any] = {"n_rows": n_firing, "removed": dict(removed.counts)}
        if n_examined is not None:
            report["n_examined"] = n_examined
        if self._rule is not None:
            report["norm_limit"] = self._rule.limit if np.isfinite(self._rule.limit) else None
            report["max_norm_ratio"] = SINK_NORM_RATIO
        if self._is_banded:
            report["bands"] = [
                one.to_dict() | {"n_returned": len(rows)} for one, rows in zip(picked, shown, strict=True)
            ]
        return report

    def _warnings(
        self,
        target: Latent,
        n_firing: int,
        n_eligible: int | None,
        picked: Sequence[Picked],
        shown: Sequence[Int64s],
    ) -> list[str]:
        n_shown, n_asked = sum(map(len, shown)), self._bands.n_requested
        if not n_firing:
            return [f"{target.label} is dead: it fires on none of the {self._codes.n_rows} encoded rows"]
        if n_eligible == 0:
            return [f"{target.label} fires on {n_firing} rows, and the masks leave none of them"]
        if n_shown < n_asked:
            short = [one.band for one, rows in zip(picked, shown, strict=True) if not len(rows)]
            empty = f"; no row in {', '.join(short)}" if short and self._is_banded else ""
            return [f"{n_shown} rows of {target.label} were found of {n_asked} asked for{empty}"]
        return []


def _next_look(size: int, n: int, n_found: int) -> int:
    """Return how many of the strongest rows to look at for `n` that count, `size` of them having given `n_found`.

    Each may need another unit's tokens: few more where few are missing, many where hardly any count.
    """
    return min(4 * size, size + (2 * (n - n_found) * size) // max(1, n_found) + _SPARE_ROWS)


def _first_of_each(keys: npt.NDArray[Any]) -> Int64s:
    """Return where each key comes first, ascending."""
    if len(keys) > _FEW_KEYS:
        return np.sort(np.unique(keys, return_index=True)[1])
    first: dict[Any, int] = {}
    for place, key in enumerate(keys.tolist()):
        first.setdefault(key, place)
    return np.fromiter(first.values(), np.int64, len(first))


def _open_codes(run: Run, dictionary: str, targets: Any) -> Codes:
    """Return the codes, once the dictionary is known to have the latents.

    Raises:
        NotFoundError: no such dictionary, codes or latent.
    """
    if not any(kind == "dictionary" for kind, _ in run.store.state.collections):
        label = next(iter(targets)).label
        raise NotFoundError(
            ErrorKind.COLLECTION_NOT_FOUND,
            f"{label!r} was asked for, and this store holds no dictionaries: import or train one and encode the run "
            "(actstore sae), or ask for the latent's encoder direction with actstore.direction(hook_point, vector)",
        )
    codes = run.codes(dictionary)
    for target in targets:
        if target.index >= codes.n_latents:
            raise NotFoundError(
                ErrorKind.ROW_NOT_FOUND,
                f"{target.label!r} was asked for, dictionary {dictionary!r} has latents 0 to {codes.n_latents - 1}",
            )
    return codes


def _run_warnings(run: Run, codes: Codes, source: LatentRows) -> list[str]:
    warnings = []
    if not run.is_complete:
        planned = len(run.tokenization.units)
        warnings.append(f"run {run.id!r} is not complete: {run.n_units} of {planned} units were asked")
    if not codes.is_complete:
        warnings.append(
            f"codes {codes.id!r} are not complete: {len(codes.collection.units)} of {run.n_units} units were asked"
        )
    if source.postings is None:
        warnings.append(
            f"codes {codes.id!r} have no postings yet, and all codes were read: build them, and answers take milliseconds "
            f"(actstore sae encode STORE {codes.dictionary} {run.id})"
        )
    sample = run.collection.config.get("sample")
    if sample is not None:
        warnings.append(
            f"run {run.id!r} keeps a sample of its rows, {sample['rate']:.3g} of them: no others were asked"
        )
    return warnings
