"""How do a latent's activations, and the densities of all latents, look? Pictures of stored statistics, by matplotlib.

Every function takes a table as `run.codes(dictionary).stats()` gives it and returns a `matplotlib.figure.Figure` that belongs
to nobody else: pyplot and its global state are not touched, no display is needed, and threads may draw side by side.
"""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore._lazy import lazy_import
from actstore.errors import ErrorKind, InvalidInputError
from actstore.latent_stats import QUANTILES, ULTRA_DENSE
from actstore.result import Result
from actstore.save_file import save_file
from actstore.show import visible

from .histograms import density_bars, histogram_bars

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HISTOGRAM = ("latent", "n_tokens", "n_docs", "density", "max", "quantiles", "hist_bins", "hist_counts")
_DENSITIES = ("latent", "density", "is_dead", "is_ultra_dense")
FIGURE_COLUMNS = tuple(dict.fromkeys(_HISTOGRAM + _DENSITIES))
"""Columns of the statistics that `latents_figure` needs."""

_BAR, _LINE, _MARK = "#5b8fd6", "#b3460e", "#e66400"
_SMALL = 8
"""Font size of what is written inside the axes."""

_LOG_FROM = 8.0
"""Ratio of the largest to the least activation from which their axis is logarithmic."""

_PANELS_PER_ROW = 2

KINDS = ("png", "svg", "pdf")
"""Kinds of files a figure is saved as."""


def latent_histogram(stats: pa.Table | Result, *, title: str | None = None) -> "Figure":
    """Return a picture of one latent's activations: how many tokens have which value.

    The areas of the bars are exact counts: the stored histogram's bins, merged to at most 48. Dashed lines are the stored
    quantiles of the values above 0.

    Args:
        stats: One row, as `codes.stats([latent])` gives it.
        title: Default: the latent's number and how often it fires.

    Raises:
        InvalidInputError: not one row, or columns are missing.
        MissingDependencyError: matplotlib is not installed.
    """
    [row] = _rows(stats, _HISTOGRAM, n_rows=1)
    figure = _figure(6.4, 3.6)
    _draw_histogram(figure.add_subplot(), row, title=title or describe_latent(row))
    return figure


def density_plot(
    stats: pa.Table | Result, *, marked: Sequence[int] = (), title: str | None = None
) -> "Figure":
    """Return a picture of how often the latents of a dictionary fire: latents by density, on a logarithmic axis.

    Dead latents have no place on the axis: the title counts them, and those above the limit of ultra-dense ones.

    Args:
        stats: All latents, or those of interest; columns latent, density, is_dead, is_ultra_dense.
        marked: Latents to mark below the bars.
        title: Default: the counts.

    Raises:
        InvalidInputError: columns are missing, or a marked latent is not among the rows.
        MissingDependencyError: matplotlib is not installed.
    """
    table = _table(stats, _DENSITIES)
    figure = _figure(6.4, 3.6)
    _draw_densities(figure.add_subplot(), table, marked, title=title or describe_densities(table))
    return figure


def latents_figure(
    stats: pa.Table | Result,
    latents: Sequence[int],
    *,
    labels: Mapping[int, str] | None = None,
    title: str | None = None,
) -> "Figure":
    """Return one picture of several latents: the densities of all, these marked, and a histogram of each.

    Args:
        stats: Rows of all latents, as `codes.stats()` gives them.
        latents: Those to show, in this order.
        labels: A few words for each, such as its commonest token; shown after its number.
        title: Above all.

    Raises:
        InvalidInputError: none or unknown latents, or columns are missing.
        MissingDependencyError: matplotlib is not installed.
    """
    table = _table(stats, FIGURE_COLUMNS)
    chosen = _chosen(table, latents)
    n_lines = -(-len(chosen) // _PANELS_PER_ROW)
    figure = _figure(9.6, 3.0 + 1.9 * n_lines)
    grid = figure.add_gridspec(1 + n_lines, _PANELS_PER_ROW, height_ratios=[1.3] + [1.0] * n_lines)
    top = figure.add_subplot(grid[0, :])
    _draw_densities(top, table, latents, title=describe_densities(table))
    for i, row in enumerate(chosen):
        panel = figure.add_subplot(grid[1 + i // _PANELS_PER_ROW, i % _PANELS_PER_ROW])
        words = (labels or {}).get(row["latent"], "")
        name = f"latent {row['latent']}: {words}" if words else f"latent {row['latent']}"
        _draw_histogram(panel, row, title=f"{name} ({row['density']:.2%} of tokens)", small=True)
    if title:
        figure.suptitle(_drawable(title), parse_math=False)
    return figure


def describe_latent(row: Mapping[str, Any]) -> str:
    """Return in words how often a latent fires: the title of its picture, and its text for those who cannot see it."""
    if not row["n_tokens"]:
        return f"latent {row['latent']}: dead, fires on no token"
    return (
        f"latent {row['latent']}: fires on {row['n_tokens']:,} tokens ({row['density']:.3%}) "
        f"of {row['n_docs']:,} documents, at most {row['max']:.4g}"
    )


def describe_densities(table: pa.Table) -> str:
    """Return in words how many latents there are, and how many are dead or ultra-dense."""
    n = table.num_rows
    dead, dense = (int(np.sum(_column(table, name))) for name in ("is_dead", "is_ultra_dense"))
    share = max(n, 1)
    return f"{n:,} latents: {dead:,} dead ({dead / share:.1%}), {dense:,} ultra-dense ({dense / share:.1%})"


def figure_bytes(figure: "Figure", kind: str = "png", *, dpi: int = 150) -> bytes:
    """Return a figure as the bytes of a file; the same figure gives the same PNG.

    Raises:
        InvalidInputError: a kind that is none of `KINDS`.
    """
    if kind not in KINDS:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT, f"a figure is saved as one of {', '.join(KINDS)}, got {kind!r}"
        )
    dates: dict[str, dict[str, Any]] = {
        "png": {"Software": None},
        "svg": {"Date": None},
        "pdf": {"CreationDate": None},
    }
    sink = io.BytesIO()
    figure.savefig(sink, format=kind, dpi=dpi, metadata=dates[kind])
    return sink.getvalue()


def save_figure(figure: "Figure", path: str | os.PathLike[str], *, dpi: int = 150) -> Path:
    """Write a figure to a file, whose ending says what kind (.png, .svg, .pdf), and return its path.

    Raises:
        InvalidInputError: another ending.
        NotFoundError: the folder does not exist.
        StorageError: the file cannot be written.
    """
    return save_file(path, figure_bytes(figure, Path(path).suffix.lstrip(".").lower(), dpi=dpi))


def _figure(width: float, height: float) -> "Figure":
    module = lazy_import("matplotlib.figure", needed_for="a picture", extra="query")
    figure: Figure = module.Figure(figsize=(width, height), layout="constrained")
    return figure


def _draw_histogram(axes: "Axes", row: Mapping[str, Any], *, title: str, small: bool = False) -> None:
    axes.set_title(_drawable(title), fontsize=_SMALL + (not small), parse_math=False)
    if not row["n_tokens"]:
        _say(axes, "never fires")
        return
    bars = histogram_bars(row["hist_bins"], row["hist_counts"], largest=row["max"])
    is_log = bool(bars.edges[-1] >= _LOG_FROM * bars.edges[0])
    # Stored bins double in width at every power of two: counts alone would jump there.
    widths = np.diff(np.log2(bars.edges)) if is_log else np.diff(bars.edges)
    _draw_bars(axes, bars.counts / widths, bars.edges)
    _set_value_axis(axes, float(bars.edges[0]), float(bars.edges[-1]), is_log=is_log)
    # Labels of neighbouring quantiles would cover each other at one height.
    for i, (q, value) in enumerate(zip(QUANTILES, row["quantiles"], strict=True)):
        axes.axvline(value, color=_LINE, linestyle="--", linewidth=0.8)
        label = f"{q * 100:g} %" if small else f"{q * 100:g} %: {value:.3g}"
        height = 0.98 - 0.075 * i * (2 if small else 1)
        _label(axes, value, height, label, size=_SMALL - 2 * small)
    axes.set_ylabel("tokens per doubling" if is_log else "tokens per unit", fontsize=_SMALL - small)
    if not small:
        axes.set_xlabel("activation where the latent fires; dashed: quantiles", fontsize=_SMALL)
    axes.tick_params(labelsize=_SMALL - small)


def _draw_densities(axes: "Axes", table: pa.Table, marked: Sequence[int], *, title: str) -> None:
    axes.set_title(_drawable(title), fontsize=_SMALL + 1, parse_math=False)
    densities = np.asarray(_column(table, "density"), np.float64)
    bars = density_bars(densities)
    if not bars.counts.size:
        _say(axes, "no latent fires")
        return
    _draw_bars(axes, bars.counts, bars.edges)
    axes.set_xscale("log")
    axes.set_xlim(bars.edges[0] / 1.2, max(1.0, bars.edges[-1]))
    axes.axvline(ULTRA_DENSE, color=_LINE, linestyle=":", linewidth=1)
    median = float(np.median(densities[densities > 0]))
    axes.axvline(median, color=_LINE, linestyle="--", linewidth=1)
    for x, words, height in ((ULTRA_DENSE, " ultra-dense", 0.98), (median, f" median {median:.2g}", 0.88)):
        axes.text(
            x, height, words, transform=axes.get_xaxis_transform(), fontsize=_SMALL, color=_LINE, va="top"
        )
    rows = _chosen(table, marked) if len(marked) else []
    shown = [row["density"] for row in rows if row["density"] > 0]
    axes.plot(
        shown,
        [0.03] * len(shown),
        "^",
        color=_MARK,
        markersize=6,
        transform=axes.get_xaxis_transform(),
        clip_on=False,
    )
    axes.set_xlabel("share of tokens on which a latent fires (log scale)", fontsize=_SMALL)
    axes.set_ylabel("latents", fontsize=_SMALL)
    axes.tick_params(labelsize=_SMALL)


def _draw_bars(axes: "Axes", heights: npt.NDArray[Any], edges: npt.NDArray[np.float64]) -> None:
    ticker = lazy_import("matplotlib.ticker", needed_for="a picture", extra="query")
    axes.stairs(heights, edges, fill=True, color=_BAR)
    axes.set_ylim(0, float(heights.max()) * 1.3)
    axes.yaxis.set_major_locator(ticker.MaxNLocator(nbins=5, integer=bool(heights.max() >= 1)))


def _set_value_axis(axes: "Axes", low: float, high: float, *, is_log: bool) -> None:
    """Make the axis of activations, logarithmic with powers of two on it or linear, with room for a label at its end."""
    if not is_log:
        axes.set_xlim(low, high + 0.15 * (high - low))
        return
    ticker = lazy_import("matplotlib.ticker", needed_for="a picture", extra="query")
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high * (high / low) ** 0.15)
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:.3g}"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())


def _label(axes: "Axes", x: float, height: float, words: str, *, size: int) -> None:
    """Write beside an upright line, above whatever lies there."""
    axes.annotate(
        words,
        (x, height),
        xycoords=axes.get_xaxis_transform(),
        xytext=(2, 0),
        textcoords="offset points",
        fontsize=size,
        color=_LINE,
        va="top",
        bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5},
    )


def _say(axes: "Axes", words: str) -> None:
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", fontsize=_SMALL + 2)
    axes.set_axis_off()


def _table(stats: pa.Table | Result, columns: Sequence[str]) -> pa.Table:
    table = stats.table if isinstance(stats, Result) else stats
    lacking = [name for name in columns if name not in table.column_names]
    if lacking:
        raise InvalidInputError(
            ErrorKind.MISSING_COLUMN,
            f"a picture of latents needs the columns {', '.join(columns)}, and {', '.join(lacking)} are not in the table: "
            "give what run.codes(dictionary).stats() returns",
        )
    return table


def _rows(stats: pa.Table | Result, columns: Sequence[str], *, n_rows: int) -> list[dict[str, Any]]:
    table = _table(stats, columns)
    if table.num_rows != n_rows:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"a histogram is of {n_rows} latent, got the statistics of {table.num_rows}: give codes.stats([latent])",
        )
    rows: list[dict[str, Any]] = table.select(list(columns)).to_pylist()
    return rows


def _chosen(table: pa.Table, latents: Sequence[int]) -> list[dict[str, Any]]:
    """Return the rows of some latents, in their order."""
    if not len(latents):
        raise InvalidInputError(ErrorKind.BAD_ARGUMENT, "a picture of latents needs at least one, got none")
    places = {int(latent): i for i, latent in enumerate(_column(table, "latent"))}
    unknown = [int(latent) for latent in latents if int(latent) not in places]
    if unknown:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"latent {unknown[0]} is not among the {len(places)} of the table: give the statistics of all",
        )
    rows: list[dict[str, Any]] = table.take(pa.array([places[int(latent)] for latent in latents])).to_pylist()
    return rows


def _column(table: pa.Table, name: str) -> Any:
    return table[name].to_numpy(zero_copy_only=False)


def _drawable(text: str) -> str:
    """Return text with what is hidden, and what matplotlib's own font lacks, as escapes: no picture has empty boxes."""
    fonts = lazy_import("matplotlib.font_manager", needed_for="a picture", extra="query")
    font = fonts.get_font(fonts.findfont("DejaVu Sans"))
    return "".join(
        c if font.get_char_index(ord(c)) else c.encode("ascii", "backslashreplace").decode()
        for c in visible(text)
    )
