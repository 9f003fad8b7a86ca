"""What do `examples` and `nearest` have in common? The options that say which rows count, and how an answer is reported."""

import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import pyarrow as pa

from actstore.activations import Activations
from actstore.checks import MAX_BYTES, check_whole
from actstore.codec.cache import BytesCache
from actstore.errors import ErrorKind, InvalidInputError
from actstore.hook_points import canonical_hook_point
from actstore.result import Meta, Result
from actstore.run import Run
from actstore.stats import SINK_NORM_RATIO

from .eligible import Eligibility, Masks, Removed, Selection, sink_norm_limit
from .fold import Fold
from .row_mask import sink_rule
from .scan import ScanReport, plan_block_rows, scan_top_k
from .scores import Scorer
from .token_pattern import check_pattern
from .top_k import TopK
from .where import check_condition

DEFAULT_MEMORY_BYTES = 512 << 20
"""Bound on the buffers of one question, the answer itself not counted."""

DEFAULT_RECALL = 0.95
"""Of the true answer: what those who search approximately mostly ask for."""

WITHOUT_FAISS = "FAISS is not installed (pip install 'actstore[cpu]')"
"""Why no index was asked; begins a warning."""

_READERS: BytesCache[Activations] = BytesCache(4)
"""Counted, not weighed."""

_MANY_NORMS = 0.01
"""Share of rows removed by the norm rule beyond which it has stopped being about a few sinks."""


@dataclass(frozen=True, slots=True)
class RowOptions:
    """Which rows count, and how many of the same kind."""

    where: str | None = None
    rows: Selection = None
    docs: Selection = None
    mask_special: bool = True
    mask_sinks: bool = True
    fold: Fold = "context"
    memory_bytes: int = DEFAULT_MEMORY_BYTES
    regex: str | None = None
    exclude_docs: Selection = None
    has_next: bool = False

    def __post_init__(self) -> None:
        """Check the limit on memory, the pattern, and that the condition is a text.

        Raises:
            InvalidInputError: not a whole number of bytes, not a regular expression, or no text.
        """
        if self.where is not None:
            check_condition(self.where)
        if self.regex is not None:
            check_pattern(self.regex)
        # Too little for the question at hand is told where that is known.
        check_whole(self.memory_bytes, what="memory_bytes", least=1, most=MAX_BYTES)

    @property
    def masks(self) -> Masks:
        """The masks asked for."""
        return Masks(
            self.where,
            self.rows,
            self.docs,
            special=self.mask_special,
            sinks=self.mask_sinks,
            regex=self.regex,
            exclude_docs=self.exclude_docs,
            has_next=self.has_next,
        )

    def echo(self) -> dict[str, Any]:
        """Return the options as they are reported."""
        told: dict[str, Any] = {
            "where": self.where,
            "mask_special": self.mask_special,
            "mask_sinks": self.mask_sinks,
            "fold": self.fold,
        }
        # Not every question takes a pattern: those that do repeat it when it was given.
        return told if self.regex is None else told | {"regex": self.regex}


def check_choice(value: object, choices: object, *, what: str) -> None:
    """Check that `value` is one of a Literal's values.

    Raises:
        InvalidInputError: it is not; the message lists them.
    """
    allowed = [c for choice in get_args(choices) for c in (get_args(choice) or (choice,))]
    allowed = [None if c is type(None) else c for c in allowed]
    # Of an array `in` would ask whether all its elements are equal to a choice.
    is_one = value is None or isinstance(value, str | bool | np.bool_)
    if not is_one or value not in allowed:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"{what} must be one of {', '.join(map(repr, allowed))}, got {value!r:.80}",
        )


def check_recall(recall: float) -> float:
    """Return the share of the true answer that an index must have been measured to find.

    Raises:
        InvalidInputError: not a number above 0 and at most 1.
    """
    if isinstance(recall, bool) or not isinstance(recall, int | float | np.number) or not 0 < recall <= 1:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT, f"recall must be a number above 0 and at most 1, got {recall!r:.80}"
        )
    return float(recall)


def open_acts(run: Run, hook_point: str, memory_bytes: int) -> Activations:
    """Return the activations of a hook point with half of `memory_bytes` for their buffers.

    The last four asked for are kept in the process, each with up to 80 MiB of checksums: scattered rows are then read without
    reading those again.

    Raises:
        NotFoundError: the run has no such hook point.
    """
    name, storage, collection = canonical_hook_point(hook_point), run.store.storage, run.collection
    memory = max(1 << 20, memory_bytes // 2)

    def load() -> tuple[Activations, int]:
        run.activations(hook_point)  # tells which there are, where there is no such hook point
        return Activations(storage, collection, name, memory_bytes=memory), 1

    # A reader keeps the storage and the collection that it reads alive, so their identities name no others.
    return _READERS.get(f"{id(storage)} {id(collection)} {name} {memory}", load)


def find_rows(
    run: Run,
    acts: Activations,
    scorer: Scorer,
    options: RowOptions,
    *,
    k: int,
    drop_zero_rows: bool = False,
    barred: Sequence[tuple[int | None, int | None]] | None = None,
    units: Collection[int] | None = None,
) -> ScanReport:
    """Return the best `k` rows of every query among those that count; see `actstore.query.scan.scan_top_k`.

    Of all stored units, or of `units` only: the others then count for nothing. Of no unit nothing is read, nor are the masks
    looked at.
    """
    check_choice(options.fold, Fold, what="fold")
    if units is not None and not units:
        limit = sink_rule(run, acts.hook_point).limit if options.mask_sinks else math.inf
        return ScanReport(Removed(), limit, best=[TopK(k) for _ in range(scorer.n_queries)])
    block_rows = plan_block_rows(acts.shape[1], scorer.n_queries, options.memory_bytes)
    norm_limit = sink_norm_limit(run, acts.hook_point) if options.mask_sinks else math.inf
    with Eligibility(
        run, options.masks, memory_bytes=max(64 << 20, options.memory_bytes // 4), units=units
    ) as eligibility:
        return scan_top_k(
            acts,
            scorer,
            eligibility,
            k=k,
            fold=options.fold,
            norm_limit=norm_limit,
            drop_zero_rows=drop_zero_rows,
            block_rows=block_rows,
            barred=barred,
        )


def report_mask(report: ScanReport, options: RowOptions) -> dict[str, Any]:
    """Return which masks were in force and how many rows each removed."""
    removed = report.removed
    mask: dict[str, Any] = {"n_rows": removed.n_seen, "removed": dict(removed.counts)}
    if options.mask_sinks:
        known = math.isfinite(report.norm_limit)
        mask["norm_limit"] = report.norm_limit if known else None
        mask["max_norm_ratio"] = SINK_NORM_RATIO
    return mask


def mask_warnings(run: Run, report: ScanReport, n_returned: int, n_requested: int) -> list[str]:
    """Return what a careful reader should know about a pass."""
    removed, warnings = report.removed, []
    if not run.is_complete:
        planned = len(run.tokenization.units)
        warnings.append(f"run {run.id!r} is not complete: {run.n_units} of {planned} units were asked")
    sample = run.collection.config.get("sample")
    if sample is not None:
        warnings.append(
            f"run {run.id!r} keeps a sample of its rows, {sample['rate']:.3g} of them: no others were asked"
        )
    nonfinite = removed.counts.get("nonfinite", 0)
    if nonfinite:
        warnings.append(f"{nonfinite} rows hold NaN or infinite values and were left out")
    norm = removed.counts.get("norm", 0)
    if norm > _MANY_NORMS * max(1, removed.n_seen):
        warnings.append(
            f"{norm} of {removed.n_seen} rows were left out as attention sinks for their norm, more than sinks usually are: "
            "mask_sinks=False keeps them"
        )
    if n_returned < n_requested:
        warnings.append(f"{n_returned} rows were found of {n_requested} asked for")
    return warnings


def make_result(
    run: Run,
    pieces: Sequence[pa.Table],
    *,
    start: float,
    request: Mapping[str, Any],
    mask: Mapping[str, Any],
    n_requested: int | None,
    n_eligible: int | None,
    bytes_read: int,
    options: RowOptions,
    warnings: Sequence[str],
    seed: int | None = None,
    exact: bool = True,
    recall: float | None = 1.0,
    index: Mapping[str, Any] | None = None,
) -> Result:
    """Return the answer with everything that must be known about it."""
    table = pa.concat_tables(pieces)
    meta = Meta(
        version=run.store.version,
        exact=exact,
        recall=recall,
        n_requested=n_requested,
        n_returned=table.num_rows,
        n_eligible=n_eligible,
        bytes_read=bytes_read,
        request=dict(request),
        mask=dict(mask),
        seed=seed,
        index=index,
        budget={"memory_bytes": options.memory_bytes},
        warnings=tuple(dict.fromkeys(warnings)),
        elapsed_s=time.perf_counter() - start,
    )
    return Result(table, meta)
