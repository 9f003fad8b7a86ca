"""Which latents are most like one? By what they write, by what they read, or by firing together."""

import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from actstore.checks import MAX_BYTES, check_whole
from actstore.codes import Codes
from actstore.dictionary import Dictionary
from actstore.errors import ErrorKind, InvalidInputError, NotFoundError
from actstore.result import Meta, Result
from actstore.run import Run
from actstore.targets import Latent, parse_target

from .answer import DEFAULT_MEMORY_BYTES, check_choice
from .coactivation import MEASURES, Unit, count_documents, count_tokens, measure_all
from .latent_filter import Float64s, Int64s, KnownLatents, LatentOptions, check_density, know_latents
from .latents import run_warnings
from .scan import check_k

__all__ = ["By", "Measure", "neighbours"]

By = Literal["decoder", "encoder", "coactivation"]
Measure = Literal["cosine", "jaccard", "npmi", "phi", "lift", "p_other", "p_this"]


def neighbours(
    run: Run,
    latent: Latent | str,
    k: int = 20,
    *,
    by: By = "decoder",
    measure: Measure | None = None,
    unit: Unit = "token",
    min_both: int = 5,
    where: str | None = None,
    density: tuple[float | None, float | None] | None = None,
    mask_dead: bool = True,
    mask_ultra_dense: bool = True,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
) -> Result:
    """Return the latents of a dictionary that are most like one of them; equal ones by number.

    "decoder" and "encoder" compare weights by cosine, every latent, in float64 and in blocks. "coactivation" counts on how many
    tokens (or documents) of the run two latents both fire, exactly: the tokens of this latent are read from its postings, and
    the other latents on them from the codes; no matrix over pairs is made. All stored rows count, special tokens and attention
    sinks too, as in the latents' own statistics.

    Of N tokens (documents), n_this and n_other of which have each latent and n_both have both; p = n / N:

    - jaccard: n_both / (n_this + n_other - n_both)
    - npmi: log(p_both / (p_this p_other)) / -log p_both; -1 if they never meet, 0 if independent, 1 if always together
    - phi: the correlation of the two indicators; 0 where one of them fires nowhere or everywhere
    - lift: n_both / n_expected, with n_expected = n_this n_other / N, what chance alone would give
    - p_other: n_both / n_this, the share of this latent's tokens on which the other fires; p_this: n_both / n_other

    Memory: `memory_bytes` for blocks of weights; 80 bytes per latent and the codes of 8,192 rows for counts.

    Args:
        run: The run whose statistics count, and whose codes are counted.
        latent: `actstore.latent(...)`, or its text `latent:DICTIONARY:INDEX`.
        k: Latents returned, at most.
        by: What is compared.
        measure: "cosine" for weights; for "coactivation" one of the others, by default "npmi".
        unit: What counts as firing together: on the same "token", or anywhere in the same "document".
        min_both: Least number of tokens or documents on which both fire: measures of rare events are ruled by chance.
        where: SQL condition over the other latents' statistics.
        density: Least and largest share of rows on which they fire, both included, None for no bound.
        mask_dead: Leave out latents that fire on none of the run's rows.
        mask_ultra_dense: Leave out latents that fire on more than 10 % of the rows.
        memory_bytes: Bound on buffers.

    Returns:
        Columns: rank (from 1), latent, value (the measure), and of weights: density, max; of counts: n_both, n_this, n_other,
        n_expected, jaccard, npmi, phi, lift, p_other, p_this, density, max.

    Raises:
        NotFoundError: no such dictionary or latent; no codes or postings, for "coactivation".
        InvalidInputError: a measure that does not go with `by`, a latent that never fires or whose weights are zero, a bad
            option.
        FormatError: stored weights or codes are missing or damaged.

    Source: Bouma (2009), "Normalized (Pointwise) Mutual Information in Collocation Extraction", GSCL, eq. 7 (npmi); Yule
    (1912), "On the Methods of Measuring Association Between Two Attributes", JRSS 75 (phi); Jaccard (1901).
    """
    start = time.perf_counter()
    k = check_k(k)
    check_choice(by, By, what="by")
    check_choice(unit, Unit, what="unit")
    min_both = check_whole(min_both, what="min_both", least=1)
    memory_bytes = check_whole(memory_bytes, what="memory_bytes", least=1, most=MAX_BYTES)
    target, chosen = _check_target(latent), _check_measure(by, measure)
    options = LatentOptions(where, check_density(density), mask_dead, mask_ultra_dense)
    dictionary = run.store.dictionary(target.dictionary)
    if target.index >= dictionary.n_latents:
        raise NotFoundError(
            ErrorKind.ROW_NOT_FOUND,
            f"{target.label!r} was asked for, dictionary {dictionary.id!r} has latents [0, {dictionary.n_latents})",
        )
    codes = _codes_of(run, target, by, options)
    known = _know(codes, dictionary.n_latents, options, memory_bytes)
    known.apply("itself", np.arange(dictionary.n_latents) != target.index)
    if by == "coactivation":
        assert codes is not None
        table, n_eligible = _by_counts(codes, known, target.index, chosen, unit, min_both, k)
    else:
        table, n_eligible = _by_weights(dictionary, known, target.index, by, k, memory_bytes)
    request: dict[str, Any] = {"verb": "neighbours", "run": run.id, "latent": target.label, "k": k}
    request |= {"by": by, "measure": chosen}
    request |= {"unit": unit, "min_both": min_both} if by == "coactivation" else {}
    meta = Meta(
        version=run.store.version,
        recall=1.0,
        n_requested=k,
        n_returned=table.num_rows,
        n_eligible=n_eligible,
        request={**request, **options.echo()},
        mask=known.report(),
        budget={"memory_bytes": memory_bytes},
        warnings=_warnings(run, codes),
        elapsed_s=time.perf_counter() - start,
    )
    return Result(table, meta)


def _check_target(latent: Latent | str) -> Latent:
    target = parse_target(latent) if isinstance(latent, str) else latent
    if not isinstance(target, Latent):
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"neighbours() takes actstore.latent(dictionary, index), got {latent!r:.80}",
        )
    return target


def _check_measure(by: By, measure: Measure | None) -> str:
    if measure is None:
        return "npmi" if by == "coactivation" else "cosine"
    check_choice(measure, Measure, what="measure")
    if (measure == "cosine") == (by == "coactivation"):
        wanted = ", ".join(MEASURES) if by == "coactivation" else "cosine"
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT, f"measure={measure!r} does not go with by={by!r}: use {wanted}"
        )
    return measure


def _codes_of(run: Run, target: Latent, by: By, options: LatentOptions) -> Codes | None:
    """Return the run's codes; None for weights of a dictionary that the run was not encoded with."""
    try:
        return run.codes(target.dictionary)
    except NotFoundError:
        if by == "coactivation" or options.where is not None:
            raise
        return None


def _know(codes: Codes | None, n_latents: int, options: LatentOptions, memory_bytes: int) -> KnownLatents:
    if codes is not None:
        return know_latents(codes, options, memory_bytes=memory_bytes)
    return KnownLatents(np.ones(n_latents, np.bool_), np.zeros(n_latents, np.int64), None, 0)


def _warnings(run: Run, codes: Codes | None) -> tuple[str, ...]:
    if codes is None:
        return (
            f"run {run.id!r} is not encoded: densities are unknown, and no latent was left out for its own",
        )
    return run_warnings(run, codes)


def _by_weights(
    dictionary: Dictionary, known: KnownLatents, index: int, by: By, k: int, memory_bytes: int
) -> tuple[pa.Table, int]:
    """Return the latents of largest cosine, and how many there were to choose from."""
    read: Callable[..., Any] = dictionary.decoder if by == "decoder" else dictionary.encoder
    own_d = np.asarray(read([index])[0], np.float64)
    length = float(np.sqrt(own_d @ own_d))
    if not length > 0:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"the {by} weights of latent {index} of dictionary {dictionary.id!r} are all zeros: they have no direction",
        )
    cosines = np.full(dictionary.n_latents, -np.inf)
    # A latent's weights as float32, what they are cut from, and as float64 twice.
    step = max(1, memory_bytes // 2 // (24 * own_d.size))
    for first in range(0, dictionary.n_latents, step):
        block_fd = np.asarray(read(np.arange(first, min(first + step, dictionary.n_latents))), np.float64)
        lengths = np.sqrt(np.einsum("fd,fd->f", block_fd, block_fd))
        alive = lengths > 0
        # Not a BLAS call: equal weights must give equal cosines, whatever block they are in.
        products = (block_fd[alive] * own_d).sum(axis=1)
        cosines[first : first + len(block_fd)][alive] = products / lengths[alive] / length
    known.apply("zero_weights", cosines > -np.inf)
    here = np.flatnonzero(known.keep)
    values = np.clip(cosines[here], -1, 1)
    order = np.lexsort((here, -values))[:k]
    return _table(known, here[order], values[order], {}), len(here)


def _by_counts(
    codes: Codes, known: KnownLatents, index: int, measure: str, unit: Unit, min_both: int, k: int
) -> tuple[pa.Table, int]:
    """Return the latents of largest measure, and how many there were to choose from."""
    counts = (count_tokens if unit == "token" else count_documents)(codes, index)
    if not counts.n_this:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"latent {index} of dictionary {codes.dictionary!r} never fires on run {codes.run.id!r}: it fires together with none",
        )
    known.apply("min_both", counts.n_both >= min_both)
    here = np.flatnonzero(known.keep)
    chosen = counts.only(here)
    measured = measure_all(chosen)
    values = measured[measure]
    order = np.lexsort((here, -values))[:k]
    columns = {
        "n_both": pa.array(chosen.n_both[order], pa.int64()),
        "n_this": pa.array(np.full(len(order), chosen.n_this), pa.int64()),
        "n_other": pa.array(chosen.n_other[order], pa.int64()),
        "n_expected": pa.array(chosen.n_expected[order], pa.float64()),
        **{name: pa.array(measured[name][order], pa.float64()) for name in MEASURES},
    }
    return _table(known, here[order], values[order], columns), len(here)


def _table(known: KnownLatents, latents: Int64s, values: Float64s, more: Mapping[str, Any]) -> pa.Table:
    nulls = pa.nulls(len(latents), pa.float64())
    never = known.n_tokens[latents] == 0
    largest = nulls if known.largest is None else pa.array(known.largest[latents], mask=never)
    return pa.table(
        {
            "rank": pa.array(np.arange(1, len(latents) + 1), pa.int32()),
            "latent": pa.array(latents, pa.int32()),
            "value": pa.array(values, pa.float64()),
            **more,
            "density": nulls if not known.n_rows else pa.array(known.density[latents], pa.float64()),
            "max": largest,
        }
    )
