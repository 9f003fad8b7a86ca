"""Which stored contexts most activate a neuron, a direction or a latent?

Exact. For neurons and directions every stored row counts: maximum inner product is not a nearest-neighbour question, so no
cluster index helps. Where the hook point has an index of kind `scan_sq8`, its compressed rows are scanned and the answer is
proved by the stored ones (`actstore.query.direction_scan`); otherwise all stored rows are scanned, at the speed of the disk.
Either way all targets of a hook point share the pass. The rows on which a latent fires are known from its postings
(`actstore.query.latent_examples`).
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from actstore.activations import Activations
from actstore.errors import ErrorKind, InvalidInputError
from actstore.faiss_file import has_faiss
from actstore.result import Result
from actstore.run import Run
from actstore.targets import Direction, Latent, Neuron, Target
from actstore.vector_index import open_indexes

from .answer import (
    DEFAULT_MEMORY_BYTES,
    WITHOUT_FAISS,
    RowOptions,
    check_choice,
    find_rows,
    make_result,
    mask_warnings,
    open_acts,
    report_mask,
)
from .bands import Bands, check_bands
from .context import check_context
from .direction_scan import find_along
from .eligible import Selection
from .fold import Fold
from .hit_contexts import Hit, describe_hits
from .latent_examples import answer_latents
from .scan import ScanReport, check_k
from .scores import NeuronScorer, ProjectionScorer, Scorer, Sign


def examples(
    run: Run,
    target: Target | Sequence[Target],
    k: int = 20,
    *,
    sign: Sign = "pos",
    before: int = 16,
    after: int = 8,
    where: str | None = None,
    mask_special: bool = True,
    mask_sinks: bool = True,
    fold: Fold = "context",
    rows: Selection = None,
    docs: Selection = None,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    bands: Bands | None = None,
    regex: str | None = None,
    use_index: bool = True,
) -> Result:
    """Return the tokens on which a target is most active, each with its context.

    The answer is that of sorting all rows by the float64 activation; rows of equal activation are in row order. All
    targets of a hook point share one pass over its rows. Memory: `memory_bytes` and the answer, whatever the run's size;
    decoded tokens and texts are kept in a cache of the process, 256 MiB (`actstore.query.unit_tables`).

    A latent's rows are those on which it fires: a dead one has none, and of one that fires on fewer than `k` rows there are no
    others. While its codes have no postings, all codes are read, and a warning says so.

    Args:
        run: The run to ask; an unfinished one answers from its stored units, with a warning.
        target: `actstore.neuron(...)`, `actstore.direction(...)`, `actstore.latent(...)`, or several.
        k: Examples per target, at most; 1 to 10,000. Not used with `bands`.
        sign: "pos": the largest activations; "neg": the smallest; "abs": those furthest from 0. Where fewer than `k`
            rows are on the side asked for, rows of 0 or of the other sign follow, and a warning says how many. Latents
            are never negative: "pos" only.
        before: Tokens shown before the example.
        after: Tokens shown after it; neither crosses a model window.
        where: SQL condition over columns of `tokens` and of the documents, such as `source = 'web' AND position > 3`.
        mask_special: Leave out tokens that the tokenizer added.
        mask_sinks: Leave out attention sinks: the first token of each window, and rows of over 10 times the median norm.
        fold: "context": of rows with the same last 8 tokens only the best; "doc": only the best of a document; None: all.
        rows: Only these rows (numbers or a slice).
        docs: Only these documents (numbers or a slice).
        memory_bytes: Bound on buffers.
        bands: Which rows of a latent to show besides those of largest value: `bands.top(5) + bands.random(5)`, see
            `actstore.query.bands`. Their definitions are repeated in `meta.request`, and what each held of a latent, with its
            edges, in `meta.mask`.
        regex: Only tokens whose text has a match of this pattern (RE2).
        use_index: Use an index for directions where there is one, and FAISS is installed. The rows of the answer are the same
            without, only later; what was done is in `meta.index`, by hook point.

    Returns:
        Columns: target (when several were given), band (when asked for), rank (from 1, in each band), row, doc_id, position,
        token_id, token, value (the activation, float64), context (struct of text, token_start, token_end, tokens,
        token_index, values; null where a sampled run stores no row).

        `meta.n_eligible` counts, for latents, the rows on which they fire and that pass the masks, all latents together; None
        if one fires on so many rows, or in so many units (more than 16, or of more than a million tokens), that only
        the strongest were looked at.

    Raises:
        NotFoundError: no such hook point, row, document, dictionary or latent; or a run that was not encoded with it.
        InvalidInputError: an index or vector that does not fit the hook point, a bad option, or a run of pooled vectors only.
        FormatError: stored rows are missing or damaged.
    """
    start = time.perf_counter()
    several = not isinstance(target, (Neuron, Direction, Latent))
    targets = check_targets(run, _as_list(target))
    k = check_k(k)
    check_choice(sign, Sign, what="sign")
    check_context(before, after)
    check_choice(fold, Fold, what="fold")
    _check_latent_options(targets, sign, bands)
    options = RowOptions(where, rows, docs, mask_special, mask_sinks, fold, memory_bytes, regex)
    request = {"verb": "examples", "run": run.id, "target": [t.label for t in targets], "k": k, "sign": sign}
    request |= {"before": before, "after": after, **options.echo()}
    if bands is not None:
        request |= {"k": None, "bands": bands.to_list()}
    return _answer(run, targets, options, request, bands, several=several, use_index=use_index, start=start)


def _answer(
    run: Run,
    targets: Sequence[Target],
    options: RowOptions,
    request: Mapping[str, Any],
    bands: Bands | None,
    *,
    several: bool,
    use_index: bool,
    start: float,
) -> Result:
    """Find the rows, one pass for all targets of a hook point or a dictionary, and return them with their contexts."""
    k, sign, before, after = (request[name] for name in ("k", "sign", "before", "after"))
    latents = {i: t for i, t in enumerate(targets) if isinstance(t, Latent)}
    others = {i: t for i, t in enumerate(targets) if not isinstance(t, Latent)}
    found = answer_latents(run, latents, options, bands, k=k or 0, before=before, after=after)
    tables, masks, warnings = found.tables, found.masks, found.warnings
    bytes_read, eligible, used = found.bytes_read, [], dict[str, Any]()
    for hook_point, members in _by_hook_point(others).items():
        acts = open_acts(run, hook_point, options.memory_bytes)
        asked = [others[i] for i in members]
        along_all = _make_scorer(asked, acts, sign)
        scorer: Scorer = along_all
        indexes = open_indexes(run, hook_point, purpose="directions") if use_index else []
        if indexes and not has_faiss():
            indexes = []
            warnings.append(f"{WITHOUT_FAISS}: all rows were compared")
        if indexes:
            along = find_along(run, acts, along_all, options, k=k, indexes=indexes)
            report, used[acts.hook_point] = along.report, along.index
            warnings += along.warnings
        else:
            neurons = [target.index for target in asked if isinstance(target, Neuron)]
            if len(neurons) == len(asked):  # their values are the scores: no product is needed
                scorer = NeuronScorer(neurons, sign)
            report = find_rows(run, acts, scorer, options, k=k)
        described = _describe(run, acts, scorer, report, before, after)
        tables.update(zip(members, described, strict=True))
        masks[acts.hook_point] = report_mask(report, options)
        warnings += mask_warnings(run, report, sum(map(len, described)), k * len(members))
        warnings += _sign_warnings(described, sign)
        bytes_read += report.bytes_read
        eligible.append(report.removed.n_kept)
    pieces = [_name_target(tables[i], targets[i]) if several else tables[i] for i in range(len(targets))]
    return make_result(
        run,
        pieces,
        start=start,
        request=request,
        mask=masks,
        n_requested=(k if bands is None else bands.n_requested) * len(targets),
        n_eligible=_count_eligible(eligible, found.n_eligible),
        bytes_read=bytes_read,
        options=options,
        warnings=warnings,
        seed=None if bands is None or len(bands.seeds) != 1 else next(iter(bands.seeds)),
        index=used or None,
    )


def _count_eligible(by_hook_point: Sequence[int], by_latent: Sequence[int | None]) -> int | None:
    """Return how many rows could have been in the answer: of latents their own rows, of all else those of a hook point."""
    counts = [*by_latent, *([min(by_hook_point)] if by_hook_point else [])]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _check_latent_options(targets: Sequence[Target], sign: Sign, bands: Bands | None) -> None:
    latents = [target for target in targets if isinstance(target, Latent)]
    if latents and sign != "pos":
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"sign={sign!r} of {latents[0].label!r} was asked for, and codes are never negative: leave sign out, or ask for "
            "the latent's direction with actstore.direction(hook_point, vector)",
        )
    if bands is not None:
        check_bands(bands)
        for target in targets:
            if not isinstance(target, Latent):
                raise InvalidInputError(
                    ErrorKind.BAD_ARGUMENT,
                    f"bands= of {target.label!r} were asked for, and only latents have them, as only their rows are few: leave "
                    "bands out, or ask for latents alone",
                )


def _sign_warnings(found: Sequence[pa.Table], sign: Sign) -> list[str]:
    """Return a line when answers are not on the side that was asked for, as of a neuron that never fires."""
    values = np.concatenate([table["value"].to_numpy() for table in found])
    wrong = values <= 0 if sign == "pos" else values >= 0 if sign == "neg" else values == 0
    if not wrong.any():
        return []
    side = {"pos": "above 0", "neg": "below 0", "abs": "other than 0"}[sign]
    return [f"{int(wrong.sum())} of the {len(values)} rows are not {side}: no more rows are"]


def _as_list(target: Any) -> list[Any]:
    # What is no target at all is told by `check_targets`.
    return list(target) if isinstance(target, Iterable) and not isinstance(target, str) else [target]


def check_targets(run: Run, targets: Sequence[Any]) -> list[Target]:
    """Return the targets if the run can be asked about each; of latents that is known once the codes are open.

    Raises:
        InvalidInputError: not targets, none, or one that does not fit its hook point's width.
        NotFoundError: no such hook point.
    """
    if not targets:
        raise InvalidInputError(ErrorKind.BAD_ARGUMENT, "examples() needs at least one target, got none")
    checked: list[Target] = []
    for target in targets:
        if isinstance(target, Latent):
            checked.append(target)
            continue
        if not isinstance(target, (Neuron, Direction)):
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"a target is actstore.neuron(...), .direction(...) or .latent(...), got {type(target).__name__}: "
                "actstore.parse_target reads one from text",
            )
        width = run.d_model(target.hook_point)
        if isinstance(target, Neuron) and target.index >= width:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"{target.label!r}: {target.hook_point!r} has neurons 0 to {width - 1}",
            )
        if isinstance(target, Direction) and target.vector.size != width:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"{target.label!r} has {target.vector.size} dimensions, {target.hook_point!r} has {width}",
            )
        checked.append(target)
    return checked


def _by_hook_point(targets: Mapping[int, Neuron | Direction]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for i, target in targets.items():
        groups.setdefault(target.hook_point, []).append(i)
    return groups


def _make_scorer(targets: Sequence[Neuron | Direction], acts: Activations, sign: Sign) -> ProjectionScorer:
    vectors_qd = np.zeros((len(targets), acts.shape[1]))
    for vector_d, target in zip(vectors_qd, targets, strict=True):
        if isinstance(target, Neuron):
            vector_d[target.index] = 1.0
        else:
            vector_d[:] = target.vector
    neurons = {i: target.index for i, target in enumerate(targets) if isinstance(target, Neuron)}
    return ProjectionScorer(vectors_qd, sign, neurons)


def _describe(
    run: Run, acts: Activations, scorer: Scorer, report: ScanReport, before: int, after: int
) -> list[pa.Table]:
    hits = [
        Hit(query, rank, row)
        for query, best in enumerate(report.best)
        for rank, (_, row) in enumerate(best.ranked(), start=1)
    ]
    table = describe_hits(run.tokenization, acts, scorer, hits, before=before, after=after)
    tables, at = [], 0
    for best in report.best:
        n = len(best.ranked())
        tables.append(table.slice(at, n))
        at += n
    return tables


def _name_target(table: pa.Table, target: Target) -> pa.Table:
    return table.add_column(0, "target", pa.array([target.label] * len(table), pa.string()))
