"""Which of the rows on which a latent fires should be shown? Bands: from the top, by rank, by value, by percentile, at random.

The highest activations alone tell little of what a latent stands for: half of what it does lies far below them. A band says
exactly which rows it draws from, and answers repeat that definition, because "quantile" means another thing in every tool:

* `top`: the rows of largest value.
* `rank`: all rows by falling value, cut into groups of equal size.
* `value`: equal widths of the range from 0 to the largest value.
* `percentile`: between percentiles of the values.
* `random`: any rows on which the latent fires.
* `nonactivating`: rows on which it does not fire.

All but the last draw from the same list: the rows on which the latent fires that pass every mask, of near-duplicates the best
alone, by falling value and then by rising row. A row that one band shows is not shown again by a later one.

Source: Paulo et al. (2024), "Automatically Interpreting Millions of Features in Large Language Models", arXiv:2410.13928
(examples drawn from groups by rank); Bricken et al. (2023), "Towards Monosemanticity" (examples by equal widths of value).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from actstore.checks import check_whole
from actstore.errors import ErrorKind, InvalidInputError
from actstore.sampling import row_hashes

Int64s = npt.NDArray[np.int64]
Float64s = npt.NDArray[np.float64]

MAX_BAND_ROWS = 10_000
"""Most rows of one band, as of the answers to one question."""

MAX_BANDS = 1000
"""Most bands in one answer."""

Kind = Literal["top", "rank", "value", "percentile", "random", "nonactivating"]


@dataclass(frozen=True, slots=True)
class Band:
    """One definition; `rank`, `value` and `percentile` make several bands of it."""

    kind: Kind
    per: int
    """Rows from each band, at most."""

    n_bands: int = 1
    edges: tuple[float, ...] = ()
    """Of `percentile`: ascending shares of the rows."""

    seed: int = 0
    """Of what is drawn by chance: `top` draws nothing."""

    @property
    def n_requested(self) -> int:
        """Rows of all its bands, at most."""
        return self.per * self.n_bands

    def to_dict(self) -> dict[str, Any]:
        """Return the definition as answers repeat it."""
        told: dict[str, Any] = {"band": self.kind}
        if self.kind in ("rank", "value"):
            told["n_bands"] = self.n_bands
        if self.kind == "percentile":
            told["percentiles"] = list(self.edges)
        told["n" if self.n_bands == 1 and self.kind != "percentile" else "per"] = self.per
        return told if self.kind == "top" else told | {"seed": self.seed}


@dataclass(frozen=True, slots=True)
class Bands:
    """Bands in the order in which they are shown; `+` puts others behind.

    >>> [band.kind for band in (top(5) + random(5)).parts]
    ['top', 'random']
    """

    parts: tuple[Band, ...]

    def __add__(self, other: object) -> "Bands":
        if not isinstance(other, Bands):
            return NotImplemented
        return Bands(self.parts + other.parts)

    @property
    def n_requested(self) -> int:
        """Rows of all bands, at most."""
        return sum(part.n_requested for part in self.parts)

    @property
    def needs_all(self) -> bool:
        """Whether every row on which the latent fires must be known."""
        return any(part.kind != "top" for part in self.parts)

    @property
    def seeds(self) -> set[int]:
        """Seeds of what is drawn by chance."""
        return {part.seed for part in self.parts if part.kind != "top"}

    def to_list(self) -> list[dict[str, Any]]:
        """Return the definitions as answers repeat them."""
        return [part.to_dict() for part in self.parts]


def top(n: int = 20) -> Bands:
    """Return the band of the `n` rows of largest value."""
    return _bands("top", n)


def rank(n_bands: int = 10, per: int = 5, *, seed: int = 0) -> Bands:
    """Return bands by rank: all rows by falling value in `n_bands` groups of equal size, `per` drawn at random from each.

    Where the rows cannot be shared equally, the first groups have one more. Band `rank:1/10` has the largest values.
    """
    return _bands("rank", per, n_bands=n_bands, seed=seed)


def value(n_bands: int = 10, per: int = 5, *, seed: int = 0) -> Bands:
    """Return bands by value: `n_bands` equal widths of the range from 0 to the largest value, `per` drawn from each.

    Each holds the values above its lower edge, up to and including its upper one. `value:1/10` has the largest.
    """
    return _bands("value", per, n_bands=n_bands, seed=seed)


def percentile(shares: Sequence[float], per: int = 5, *, seed: int = 0) -> Bands:
    """Return bands between percentiles of the values on rows where the latent fires, `per` drawn at random from each.

    Args:
        shares: From 0 to 1, ascending: `[0.5, 0.9, 0.99]` makes the bands from 0.5 to 0.9, from 0.9 to 0.99, and from 0.99 to
            the largest value. A band holds the values at or above its lower percentile and below its upper one, the
            last up to the maximum; percentiles between two values are interpolated (`numpy.quantile`, "linear").
        per: Rows from each.
        seed: Of the draw.

    Raises:
        InvalidInputError: not ascending numbers from 0 to 1, such as percentiles in percent.
    """
    try:
        edges = tuple(float(share) for share in shares)
    except (TypeError, ValueError) as error:
        raise _bad(f"percentiles are a list of numbers from 0 to 1, got {shares!r:.80}") from error
    rising = all(a < b for a, b in itertools.pairwise(edges))
    if not edges or not rising or not 0 <= edges[0] <= edges[-1] < 1:
        raise _bad(
            f"percentiles must be ascending shares from 0 up to below 1, such as [0.5, 0.9, 0.99], got {list(edges)}"
        )
    return _bands("percentile", per, n_bands=len(edges), edges=edges, seed=seed)


def random(n: int = 20, *, seed: int = 0) -> Bands:
    """Return the band of `n` rows drawn at random, each as likely as any other, from those on which the latent fires."""
    return _bands("random", n, seed=seed)


def nonactivating(n: int = 20, *, seed: int = 0) -> Bands:
    """Return the band of `n` rows drawn at random from those that pass the masks and on which the latent does not fire."""
    return _bands("nonactivating", n, seed=seed)


def parse_bands(text: str) -> Bands:
    """Return the bands that a command line names, separated by commas.

    Args:
        text: Of `top:N`, `rank:BANDSxPER`, `value:BANDSxPER`, `percentile:SHARE/SHARE/...xPER`, `random:N` and
            `nonactivating:N`; each may end in `@SEED`.

    Raises:
        InvalidInputError: something else.

    >>> [band["band"] for band in parse_bands("top:5,rank:10x2,random:5@7").to_list()]
    ['top', 'rank', 'random']
    """
    found = Bands(())
    for piece in text.split(","):
        found += _parse_band(piece.strip())
    return found


def check_bands(bands: object) -> Bands:
    """Return `bands` if they can be answered.

    Raises:
        InvalidInputError: not bands, none, or too many.
    """
    if not isinstance(bands, Bands):
        raise _bad(
            f"bands= are made with actstore.query.bands, such as bands.top(5) + bands.random(5), got {bands!r:.80}"
        )
    if not bands.parts:
        raise _bad("bands= has no band: leave it out, or give one such as bands.top(20)")
    n_bands = sum(part.n_bands for part in bands.parts)
    if n_bands > MAX_BANDS:
        raise _bad(f"bands= has {n_bands} bands, at most {MAX_BANDS} are answered at once")
    return bands


@dataclass(slots=True)
class Picked:
    """What one band shows of one latent."""

    band: str
    low: float | None
    """Lower edge in value; None where the band has no edges in value."""

    high: float | None
    n_rows: int | None
    """Rows that the band draws from, those that an earlier band shows included; None of `nonactivating`: nobody counts them."""

    index: Int64s = field(default_factory=lambda: np.empty(0, np.int64))
    """Rows shown, as indices into the list that was drawn from, by falling value."""

    def to_dict(self) -> dict[str, Any]:
        """Return what answers say of the band."""
        return {
            "band": self.band,
            "low": self.low,
            "high": self.high,
            "n_rows": self.n_rows,
            "n_returned": len(self.index),
        }


def pick_rows(bands: Bands, rows: Int64s, values: Float64s) -> list[Picked]:
    """Return what every band shows, in order; `nonactivating` shows nothing of these rows.

    Of the rows that a band draws from, those with the smallest hashes of their number and the seed are drawn
    (`actstore.sampling.row_hashes`): any `per` of them are equally likely.

    Args:
        bands: The definitions.
        rows: Row numbers, by falling value and then by rising row, shape (n,).
        values: Their values, above 0, shape (n,).
    """
    free = np.ones(len(rows), np.bool_)
    found = []
    for band in bands.parts:
        for picked, inside in _regions(band, values):
            if band.kind != "nonactivating":
                candidates = inside[free[inside]]
                picked.index = _draw(band, candidates, rows)
                free[picked.index] = False
            found.append(picked)
    return found


def _regions(band: Band, values: Float64s) -> list[tuple[Picked, Int64s]]:
    """Return each band of a definition with the indices it draws from, in the order they are shown."""
    everything = np.arange(len(values))
    if band.kind == "nonactivating":
        return [(Picked("nonactivating", None, None, None), everything[:0])]
    if band.kind in ("top", "random"):
        return [(Picked(band.kind, None, None, len(values)), everything)]
    if band.kind == "rank":
        groups = np.array_split(everything, band.n_bands)
        return [
            (Picked(f"rank:{i}/{band.n_bands}", *_ends(values[group]), len(group)), group)
            for i, group in enumerate(groups, start=1)
        ]
    if band.kind == "value":
        return _value_regions(band, values)
    return _percentile_regions(band, values)


def _ends(values: Float64s) -> tuple[float | None, float | None]:
    return (float(values[-1]), float(values[0])) if len(values) else (None, None)


def _value_regions(band: Band, values: Float64s) -> list[tuple[Picked, Int64s]]:
    n = band.n_bands
    largest = float(values[0]) if len(values) else 0.0
    edges = largest * np.arange(n + 1) / n
    edges[-1] = largest
    inside = np.searchsorted(edges, values, side="left") - 1
    regions = []
    for i in range(n - 1, -1, -1):
        mine = np.flatnonzero(inside == i)
        told = Picked(f"value:{n - i}/{n}", float(edges[i]), float(edges[i + 1]), len(mine))
        regions.append((told, mine))
    return regions


def _percentile_regions(band: Band, values: Float64s) -> list[tuple[Picked, Int64s]]:
    if len(values):
        edges = np.quantile(values, band.edges)
        inside = np.searchsorted(edges, values, side="right") - 1
    else:
        edges, inside = np.zeros(len(band.edges)), np.empty(0, np.int64)
    regions = []
    for i in range(len(edges) - 1, -1, -1):
        mine = np.flatnonzero(inside == i)
        last = i + 1 == len(edges)
        name = f"percentile:{band.edges[i]:g}-{1 if last else band.edges[i + 1]:g}"
        high = (float(values[0]) if len(values) else 0.0) if last else float(edges[i + 1])
        regions.append((Picked(name, float(edges[i]), high, len(mine)), mine))
    return regions


def _draw(band: Band, candidates: Int64s, rows: Int64s) -> Int64s:
    if band.kind == "top" or len(candidates) <= band.per:
        return candidates[: band.per]
    hashes = row_hashes(rows[candidates], band.seed)
    chosen = candidates[np.lexsort((rows[candidates], hashes))[: band.per]]
    chosen.sort()
    return chosen


def _bands(kind: Kind, per: int, *, n_bands: int = 1, edges: tuple[float, ...] = (), seed: int = 0) -> Bands:
    per = check_whole(per, what=f"rows of band {kind!r}", least=1, most=MAX_BAND_ROWS)
    n_bands = check_whole(n_bands, what=f"n_bands of {kind!r}", least=1, most=MAX_BANDS)
    seed = check_whole(seed, what=f"seed of band {kind!r}", least=0, most=(1 << 64) - 1)
    return Bands((Band(kind, per, n_bands, edges, seed),))


def _parse_band(text: str) -> Bands:
    body, at, seed_text = text.partition("@")
    kind, _, what = body.partition(":")
    many, _, per = what.rpartition("x")
    seed = {"seed": _number(seed_text, text)} if at else {}
    if kind == "top" and not at and not many:
        return top(_number(what, text))
    if kind in ("random", "nonactivating") and not many:
        return (random if kind == "random" else nonactivating)(_number(what, text), **seed)
    if kind in ("rank", "value"):
        return (rank if kind == "rank" else value)(_number(many, text), _number(per, text), **seed)
    if kind == "percentile":
        try:
            shares = [float(share) for share in many.split("/")]
        except ValueError:
            raise _unreadable(text) from None
        return percentile(shares, _number(per, text), **seed)
    raise _unreadable(text)


def _number(digits: str, text: str) -> int:
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 20):
        raise _unreadable(text)
    return int(digits)


def _unreadable(text: str) -> InvalidInputError:
    return _bad(
        f"band {text!r} is none of top:N, rank:BANDSxPER, value:BANDSxPER, percentile:0.5/0.9/0.99xPER, random:N, "
        "nonactivating:N (all but top may end in @SEED)"
    )


def _bad(message: str) -> InvalidInputError:
    return InvalidInputError(ErrorKind.BAD_ARGUMENT, message)
