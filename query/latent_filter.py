"""Which latents of a dictionary count, and what is known of each? Hygiene first, then the caller's own conditions.

Masks are applied in a fixed order and a latent is counted at the first that removes it: dead latents, ultra-dense ones, those
outside of the density asked for, then `where`, an SQL condition over the columns of the view `latents`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.codes import Codes
from actstore.errors import ErrorKind, InvalidInputError
from actstore.latent_stats import LATENT_STATS_SCHEMA, ULTRA_DENSE

from .duck import Limits, open_locked, run_query
from .sql_gate import CHANCE_FUNCTIONS, Checked, bad_sql, check_statement, count_tables

Bools = npt.NDArray[np.bool_]
Float64s = npt.NDArray[np.float64]
Int64s = npt.NDArray[np.int64]

_VIEW = "latents"
_MAKE_ROWS = frozenset({"unnest", "unlist", "generate_subscripts"})
"""Functions that make several rows, or none, of one."""


@dataclass(frozen=True, slots=True)
class LatentOptions:
    """Which latents the caller wants to hear of."""

    where: str | None = None
    """SQL condition over the statistics."""

    density: tuple[float | None, float | None] = (None, None)
    """Least and largest share of rows on which a latent fires; None for no bound."""

    mask_dead: bool = True
    """Leave out latents that fire on no stored row."""

    mask_ultra_dense: bool = True
    """Leave out latents that fire on more than 10 % of the rows."""

    def echo(self) -> dict[str, Any]:
        """Return the options as they are reported."""
        return {
            "where_latents": self.where,
            "density": list(self.density),
            "mask_dead": self.mask_dead,
            "mask_ultra_dense": self.mask_ultra_dense,
        }


@dataclass(slots=True)
class KnownLatents:
    """What is known of every latent of a dictionary on a run, and which of them count."""

    keep: Bools
    """Shape (n_latents,), as all that follow."""

    n_tokens: Int64s
    """Stored rows on which it fires."""

    largest: Float64s | None
    """Its largest value, 0 where it never fires; None while there are no statistics."""

    n_rows: int
    """Rows with codes."""

    removed: dict[str, int] = field(default_factory=dict)
    """Latents that each mask keeps out."""

    @property
    def density(self) -> Float64s:
        """Share of the rows on which each latent fires."""
        return self.n_tokens / max(1, self.n_rows)

    def apply(self, name: str, passing: Bools) -> None:
        """Narrow `keep` to `passing` and count what that removes."""
        narrowed = self.keep & passing
        self.removed[name] = int(self.keep.sum() - narrowed.sum())
        self.keep = narrowed

    def report(self) -> dict[str, Any]:
        """Return how many latents each mask removed."""
        mask: dict[str, Any] = {"n_latents": len(self.keep), "removed": dict(self.removed)}
        if "ultra_dense" in self.removed:
            mask["max_density"] = ULTRA_DENSE
        return mask


def check_density(
    density: tuple[float | None, float | None] | None,
) -> tuple[float | None, float | None]:
    """Return the bounds on density, both included.

    Raises:
        InvalidInputError: not a pair of numbers from 0 to 1, in order, or None.

    >>> check_density((1e-6, None))
    (1e-06, None)
    """
    if density is None:
        return (None, None)
    is_pair = isinstance(density, (tuple, list)) and len(density) == 2
    bounds = list(density) if is_pair else [-1]
    numbers = [b for b in bounds if b is not None]
    plain = all(isinstance(b, (int, float, np.number)) and not isinstance(b, bool) for b in numbers)
    if not is_pair or not plain or not all(0 <= b <= 1 for b in numbers) or numbers != sorted(numbers):
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"density= is a pair (least, largest) of shares from 0 to 1, None for no bound, got {density!r:.80}",
        )
    low, high = (None if b is None else float(b) for b in bounds)
    return (low, high)


def has_statistics(codes: Codes) -> bool:
    """Return whether postings, and with them statistics, of the codes are complete."""
    postings = codes.run.store.state.collections.get(("postings", codes.id))
    return postings is not None and postings.is_sealed


def know_latents(codes: Codes, options: LatentOptions, *, memory_bytes: int) -> KnownLatents:
    """Return the latents of a dictionary on a run with those that count marked.

    Reads the statistics; without them (no postings yet) the counts of firing rows of the codes, and `where` is refused.
    Memory: 32 bytes per latent, and the columns that `where` mentions.

    Raises:
        InvalidInputError: `where` is no condition over the statistics.
        NotFoundError: `where` was given, and there are no statistics.
    """
    everything = np.ones(codes.n_latents, np.bool_)
    if has_statistics(codes):
        stats = codes.stats(columns=["n_tokens", "max"])
        largest = np.nan_to_num(stats["max"].to_numpy().astype(np.float64))
        known = KnownLatents(everything, stats["n_tokens"].to_numpy(), largest, codes.n_rows)
    else:
        known = KnownLatents(everything, codes.counts(), None, codes.n_rows)
    if options.mask_dead:
        known.apply("dead", known.n_tokens > 0)
    if options.mask_ultra_dense:
        known.apply("ultra_dense", known.density <= ULTRA_DENSE)
    low, high = options.density
    if low is not None or high is not None:
        inside = known.density >= (0 if low is None else low)
        known.apply("density", inside & (known.density <= (1 if high is None else high)))
    if options.where is not None:
        chosen = np.zeros(codes.n_latents, np.bool_)
        chosen[order_latents(codes, options.where, None, memory_bytes=memory_bytes)] = True
        known.apply("where", chosen)
    return known


def order_latents(codes: Codes, where: str | None, order_by: str | None, *, memory_bytes: int) -> Int64s:
    """Return the latents for which a condition holds, in an order; equal ones by number.

    Args:
        codes: The codes, with statistics.
        where: SQL condition over the columns of `latents`; None for all.
        order_by: What ORDER BY takes; None for the order of their numbers.
        memory_bytes: Memory of DuckDB; the columns that are mentioned are held besides.

    Raises:
        InvalidInputError: BAD_SQL: not such a condition or order, or unknown columns.
    """
    mentioned = {"latent"}
    if where is not None:
        mentioned |= _check_part(where, "where", _where(where))
    if order_by is not None:
        mentioned |= _check_part(order_by, "order_by", _order(order_by))
    known = [*LATENT_STATS_SCHEMA.names]
    columns = known if "*" in mentioned else [name for name in known if name in mentioned]
    table = codes.stats(columns=columns)
    text = f"SELECT latent FROM {_VIEW}{_where(where)}{_order(order_by)}"
    text += ", latent" if order_by is not None else "\nORDER BY latent"
    limits = Limits(memory_bytes=memory_bytes, max_result_bytes=1 << 30, timeout_s=None, threads=1)
    with open_locked([], {_VIEW: table}, [], limits) as con:
        try:
            found = run_query(con, text, None, limits, hide=lambda message: message)
        except InvalidInputError as error:
            if "not found in FROM" not in str(error):
                raise
            asked = " and ".join(
                f"{n}={v!r:.200}" for n, v in (("where", where), ("order_by", order_by)) if v
            )
            raise bad_sql(
                f"{asked} names a column that latents do not have; there are: {', '.join(known)}"
            ) from error
    latents: Int64s = found["latent"].to_numpy().astype(np.int64)
    return latents


def _where(where: str | None) -> str:
    # The line breaks keep a comment at the end of the condition from swallowing what follows.
    return "" if where is None else f" WHERE (\n{where}\n)"


def _order(order_by: str | None) -> str:
    return "" if order_by is None else f" ORDER BY\n{order_by}\n"


def _check_part(text: str, name: str, clause: str) -> set[str]:
    """Return the columns that a condition or an order mentions, if it is nothing else than one."""
    if not isinstance(text, str) or not text.strip():
        example = "density > 0.001 AND max > 2" if name == "where" else "density DESC"
        raise bad_sql(f"{name}= must be SQL like {example!r}, got {text!r:.80}")
    try:
        checked = check_statement(f"SELECT latent FROM {_VIEW}{clause}", {_VIEW})
    except InvalidInputError as error:
        raise InvalidInputError(
            error.kind, f"{name}={text!r:.200} cannot be read: {error.message}"
        ) from error
    if not _is_plain(checked.tree, ordered=name == "order_by"):
        wanted = "one condition" if name == "where" else "what ORDER BY takes"
        raise bad_sql(
            f"{name}= must be {wanted} over the statistics of a latent, without a SELECT, LIMIT, GROUP BY or UNION, "
            f"got {text!r:.200}"
        )
    _refuse_chance(checked, name)
    return checked.columns


def _is_plain(tree: Mapping[str, Any], *, ordered: bool) -> bool:
    """Return whether a statement is SELECT latent FROM latents with a WHERE or an ORDER BY alone."""
    modifiers = [m["type"] for m in tree.get("modifiers") or ()]
    extras = ("group_expressions", "group_sets", "having", "qualify", "sample")
    return (
        tree["type"] == "SELECT_NODE"
        and tree["from_table"]["type"] == "BASE_TABLE"
        and not any(tree.get(key) for key in extras)
        and not tree["cte_map"]["map"]
        and modifiers == (["ORDER_MODIFIER"] if ordered else [])
        and (not ordered or not tree.get("where_clause"))
        and count_tables(tree) == 1
    )


def _refuse_chance(checked: Checked, name: str) -> None:
    if checked.functions & _MAKE_ROWS:
        raise bad_sql(
            f"{name}= may not use unnest(): a latent is one row; write list_max(quantiles), quantiles[1] and the like"
        )
    chance = sorted(checked.functions & CHANCE_FUNCTIONS)
    if chance:
        raise bad_sql(
            f"{name}= may not use {chance[0]}(): hash(latent) gives an order or a sample that can be repeated"
        )
