"""How do some latents of a dictionary look on one page? Statistics, tokens, histogram and contexts of each, in one HTML file.

Or in one picture, without contexts.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from actstore.checks import check_whole
from actstore.errors import ErrorKind, InvalidInputError
from actstore.result import Result
from actstore.run import Run
from actstore.save_file import save_file
from actstore.show import cut
from actstore.show_html import escape, html_details, html_image, html_page, html_table
from actstore.targets import latent as latent_of

from .latents import latents as find_latents
from .plots import (
    FIGURE_COLUMNS,
    density_plot,
    describe_densities,
    describe_latent,
    figure_bytes,
    latent_histogram,
    latents_figure,
    save_figure,
)

MAX_LATENTS = 200
"""Latents of a page, at most: beyond, pages of pictures grow slow to open."""

_DPI = 80
_PANELS = 10
_TOKENS = {
    "top_tokens_by_mean": "tokens of the highest mean",
    "top_tokens_by_count": "commonest tokens",
    "promoted": "promotes",
    "suppressed": "suppresses",
}
_HIDDEN = ("target", "token_id", "position")
"""Columns of examples that a page has no use for: the heading and the context say it."""


def latent_page(
    run: Run,
    dictionary: str,
    latents: Sequence[int],
    *,
    k: int = 10,
    title: str | None = None,
    notes: Mapping[int, str] | None = None,
    **options: Any,
) -> str:
    """Return one HTML page about some latents: for each its statistics, tokens, a histogram, and its contexts.

    Everything from the corpus is escaped; the page loads nothing and allows no scripts.

    Args:
        run: The run to ask.
        dictionary: Name of the dictionary; the run was encoded with it and has postings.
        latents: Which, in the order shown; at most `MAX_LATENTS`.
        k: Contexts of each.
        title: Heading of the page.
        notes: A few words about latents, shown below their headings.
        **options: As `actstore.query.examples.examples` takes them, such as `bands`, `where`, `fold`.

    Raises:
        NotFoundError: no such dictionary, codes, postings or latent.
        InvalidInputError: no or too many latents, or a bad option.
        MissingDependencyError: matplotlib is not installed.
    """
    numbers = list(dict.fromkeys(check_whole(latent, what="a latent", least=0) for latent in latents))
    if not 1 <= len(numbers) <= MAX_LATENTS:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"a page shows 1 to {MAX_LATENTS} latents, got {len(numbers)}: choose some, or make several pages",
        )
    title = title or f"Latents of {dictionary} on {run.id}"
    codes = run.codes(dictionary)
    told = find_latents(run, dictionary, None, latents=numbers, order_by=None, mask_dead=False)
    words = {row["latent"]: row for row in told.table.select(["latent", *_TOKENS]).to_pylist()}
    stats = codes.stats(numbers)
    examples = run.examples([latent_of(dictionary, number) for number in numbers], k, **options)
    densities = codes.stats(columns=["latent", "density", "is_dead", "is_ultra_dense"])
    parts = [_density_part(densities, numbers)]
    for i, number in enumerate(numbers):
        row = stats.slice(i, 1)
        parts.append(_latent_part(dictionary, row, words[number], (notes or {}).get(number, ""), examples))
    parts.append(html_details("Question, masks and version", examples.meta.to_dict() | {"elapsed_s": None}))
    return html_page(title, parts)


def save_latent_page(
    path: str | os.PathLike[str], run: Run, dictionary: str, latents: Sequence[int], **options: Any
) -> Path:
    """Write `latent_page` to a file, whole or not at all, and return its path.

    Raises:
        NotFoundError: as `latent_page`, or the folder does not exist.
        InvalidInputError: as `latent_page`.
        StorageError: the file cannot be written.
    """
    return save_file(path, latent_page(run, dictionary, latents, **options).encode("utf-8"))


def save_latents_picture(
    path: str | os.PathLike[str], run: Run, dictionary: str, latents: Sequence[int]
) -> Path:
    """Write a picture of all latents' densities and of some latents' activations to a file, and return its path.

    Args:
        path: Its ending says what kind: .png, .svg or .pdf.
        run: The run to ask.
        dictionary: Name of the dictionary; the run was encoded with it and has postings.
        latents: Those with a histogram of their own; the first ten.

    Raises:
        NotFoundError: no such dictionary, codes, postings or latent, or the folder does not exist.
        InvalidInputError: no latents, or another ending.
        StorageError: the file cannot be written.
        MissingDependencyError: matplotlib is not installed.
    """
    numbers = list(dict.fromkeys(check_whole(latent, what="a latent", least=0) for latent in latents))
    numbers = numbers[:_PANELS]
    told = find_latents(run, dictionary, None, latents=numbers, order_by=None, mask_dead=False)
    labels = {row["latent"]: repr(tokens[0]) for row in told if (tokens := row["top_tokens_by_mean"])}
    title = f"Latents of {dictionary} on {run.id}"
    stats = run.codes(dictionary).stats(columns=list(FIGURE_COLUMNS))
    return save_figure(latents_figure(stats, numbers, labels=labels, title=title), path)


def _density_part(densities: pa.Table, numbers: Sequence[int]) -> str:
    picture = figure_bytes(density_plot(densities, marked=numbers), dpi=_DPI)
    alt = f"Histogram of how often latents fire. {describe_densities(densities)}."
    return html_image(picture, kind="png", alt=alt, caption="Triangles: the latents below.")


def _latent_part(
    dictionary: str, stats: pa.Table, words: Mapping[str, Any], note: str, examples: Result
) -> str:
    [row] = stats.to_pylist()
    lines = [f"<p>{escape(note)}</p>"] if note else []
    lines.append(f"<p>{escape(describe_latent(row))}</p>")
    for name, about in _TOKENS.items():
        if words[name]:
            lines.append(f"<p>{about}: {' '.join(map(_token, words[name]))}</p>")
    picture = figure_bytes(latent_histogram(stats), dpi=_DPI)
    alt = f"Histogram of the activations of {describe_latent(row)}."
    lines.append(html_image(picture, kind="png", alt=alt))
    label = latent_of(dictionary, row["latent"]).label
    mine = examples.table.filter(pc.equal(examples.table["target"], label))
    mine = mine.drop_columns([name for name in _HIDDEN if name in mine.column_names])
    lines.append(html_table(mine, title=f"{mine.num_rows} contexts", caption="", max_rows=mine.num_rows))
    return f"<section><h2>{escape(label)}</h2>{''.join(lines)}</section>"


def _token(text: str) -> str:
    return f'<code style="white-space:pre-wrap">{escape(cut(text))}</code>'
