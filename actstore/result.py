"""What does a question get back? An Arrow table, and what must be known to trust and repeat it."""

import base64
import datetime as dt
import importlib
import io
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import pyarrow as pa

from actstore._lazy import missing
from actstore.save_file import save_file

# What shows an answer is imported where it is shown: a program that only reads answers starts sooner.
if TYPE_CHECKING:
    import pandas as pd
    import polars as pl
    from rich.console import Console, ConsoleOptions, RenderResult


PAGE_ROWS = 1000
"""Rows of an answer that a page of its own shows by default: a few megabytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meta:
    """Where an answer comes from, how exact it is, and what was left out of it."""

    version: int
    """The store version that answered; `store.at(version)` answers the same again."""

    exact: bool = True
    """Whether this is the true answer, or an index's approximation of it."""

    recall: float | None = None
    """Share of the true answer that is in this one, measured against brute force; 1.0 when exact; None: no such notion."""

    n_requested: int | None = None
    """Rows asked for; None when the question sets no number."""

    n_returned: int = 0
    """Rows of the table."""

    n_eligible: int | None = None
    """Stored rows that could have been in the answer, after all masks; None when the question has no such notion."""

    bytes_read: int = 0
    """Bytes of stored objects that this answer was computed from, as stored, whether they came from a cache or not."""

    request: Mapping[str, Any] = field(default_factory=dict)
    """The question with every default spelled out."""

    mask: Mapping[str, Any] = field(default_factory=dict)
    """What kept rows out, and how many it kept out; a row is counted at the first mask that removes it."""

    seed: int | None = None
    """Seed of whatever was random; None when nothing was."""

    index: Mapping[str, Any] | None = None
    """The index that the answer was found with, and what was done with it; None when no index was used."""

    budget: Mapping[str, Any] | None = None
    """Limits on memory, time or size that were in force."""

    warnings: tuple[str, ...] = ()
    """What a careful reader of the answer should know."""

    elapsed_s: float = 0.0
    """Wall-clock seconds."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Result:
    """An answer: rows, and `meta` about them. `len()` counts rows, iteration gives dictionaries.

    >>> result = Result(pa.table({"row": [3], "value": [0.5]}), Meta(version=7, n_returned=1))
    >>> result.to_dicts(), result.meta.version
    ([{'row': 3, 'value': 0.5}], 7)
    """

    table: pa.Table
    meta: Meta

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.table.to_batches(max_chunksize=1024):
            yield from batch.to_pylist()

    def to_arrow(self) -> pa.Table:
        """Return the rows as an Arrow table; no copy."""
        return self.table

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the rows as dictionaries."""
        rows: list[dict[str, Any]] = self.table.to_pylist()
        return rows

    def to_pandas(self) -> "pd.DataFrame":
        """Return the rows as a pandas data frame.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ModuleNotFoundError as error:
            raise missing("pandas", needed_for="to_pandas()", extra="query") from error
        frame: pd.DataFrame = self.table.to_pandas()
        return frame

    def to_polars(self) -> "pl.DataFrame":
        """Return the rows as a polars data frame.

        Raises:
            MissingDependencyError: polars is not installed.
        """
        try:
            import polars as pl
        except ModuleNotFoundError as error:
            raise missing("polars", needed_for="to_polars()", extra="query") from error
        frame = pl.from_arrow(self.table)
        return frame if isinstance(frame, pl.DataFrame) else frame.to_frame()

    def to_json(self, *, indent: int | None = None) -> str:
        """Return `{"columns", "rows", "nonfinite", "meta"}` as strict, ASCII JSON.

        JSON has no NaN and no infinity: they become null, `nonfinite` counts them and a warning in `meta` says so.
        Timestamps are ISO 8601, binary values Base64, decimals integers when whole and text when not.
        """
        encoder = _JsonValues()
        rows = [encoder.convert(row) for row in self]
        meta = encoder.convert(self.meta.to_dict())
        if encoder.nonfinite:
            meta["warnings"].append(
                f"{encoder.nonfinite} values are NaN or infinite and are written as null here"
            )
        answer = {
            "columns": self.table.column_names,
            "rows": rows,
            "nonfinite": encoder.nonfinite,
            "meta": meta,
        }
        return json.dumps(answer, indent=indent, allow_nan=False)

    def show(
        self, *, width: int | None = None, colour: bool | None = None, file: TextIO | None = None
    ) -> None:
        """Show the answer where it is asked for: a table in a terminal, in a notebook one of HTML.

        Tokens of contexts are shaded by their values; hidden characters are written as escapes, so that nothing in the
        corpus acts on the terminal or the page. The first 50 rows, and of long contexts the tokens around the hit.

        Args:
            width: Columns; default: the terminal's, or 120 where there is none.
            colour: Whether to use colours; default: whether there is a terminal that has them and `NO_COLOR` is not set.
            file: Where to write text, a notebook too; default: stdout.
        """
        if file is None and width is None and colour is None and _show_in_notebook(self):
            return
        out = sys.stdout if file is None else file
        from rich.console import Console

        console = Console(
            file=out,
            width=width or (None if out.isatty() else shutil.get_terminal_size((120, 24)).columns),
            force_terminal=colour,
            force_jupyter=False,
            color_system="truecolor" if colour else "auto",
            no_color=None if colour is None else not colour,
            highlight=False,
        )
        console.print(self)

    def to_html(
        self, path: str | os.PathLike[str], *, title: str | None = None, max_rows: int = PAGE_ROWS
    ) -> Path:
        """Write the answer, the question and the store's version as one HTML file, and return its path.

        Everything from the corpus is escaped; the file loads nothing and allows no scripts. It is whole or not there.

        Args:
            path: The file; one that is there is replaced.
            title: Heading of the page; default: what was asked.
            max_rows: Rows shown; the page says how many there are.

        Raises:
            NotFoundError: the folder of `path` does not exist.
            StorageError: the file cannot be written.
        """
        from actstore.show_html import html_details, html_page, html_table

        table = html_table(
            self.table, title=self._title(), caption=self._caption(max_rows), max_rows=max_rows
        )
        question = html_details("Question, masks and version", self.meta.to_dict())
        page = html_page(title or self._title(), [table, question])
        return save_file(path, page.encode("utf-8"))

    def __repr__(self) -> str:
        from rich.console import Console

        width = max(80, shutil.get_terminal_size((120, 24)).columns)
        console = Console(file=io.StringIO(), width=width, no_color=True, legacy_windows=False)
        console.print(self)
        assert isinstance(console.file, io.StringIO)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).rstrip()

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.text import Text

        from actstore.show import SHOWN_ROWS, terminal_table, visible

        colour = console.color_system is not None and not console.no_color
        yield Text(visible(self._title()), style="bold")
        yield terminal_table(self.table, width=options.max_width, colour=colour)
        yield Text(visible(self._caption(SHOWN_ROWS)), style="dim")

    def _repr_html_(self) -> str:
        from actstore.show import SHOWN_ROWS
        from actstore.show_html import html_table

        return html_table(self.table, title=self._title(), caption=self._caption(SHOWN_ROWS))

    def _title(self) -> str:
        verb = self.meta.request.get("verb", "result")
        return f"{verb}: {len(self)} rows, store version {self.meta.version}"

    def _caption(self, shown: int) -> str:
        meta = self.meta
        parts = []
        if len(self) > shown:
            parts.append(f"{shown} of {len(self)} rows shown")
        if meta.n_eligible is not None:
            parts.append(f"{meta.n_eligible} rows eligible")
        if meta.recall is not None:
            parts.append("exact" if meta.exact else f"approximate, recall {meta.recall:.3f}")
        parts.append(f"{meta.bytes_read / 1e6:.1f} MB read in {meta.elapsed_s:.2f} s")
        parts += [f"warning: {w}" for w in meta.warnings]
        return "; ".join(parts)


def _show_in_notebook(result: Result) -> bool:
    """Display the answer if this is a notebook, and return whether it is; nothing of Jupyter is imported to find out."""
    python = sys.modules.get("IPython")
    shell = python.get_ipython() if python is not None else None
    if shell is None or not hasattr(shell, "kernel"):
        return False
    importlib.import_module("IPython.display").display(result)
    return True


class _JsonValues:
    """Turns values of Arrow tables into values of strict JSON, counting what JSON cannot say."""

    def __init__(self) -> None:
        self.nonfinite = 0

    def convert(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, float):
            if math.isfinite(value):
                return value
            self.nonfinite += 1
            return None
        if isinstance(value, Mapping):
            return {str(k): self.convert(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.convert(v) for v in value]
        if isinstance(value, Decimal):
            return int(value) if value == value.to_integral_value() else str(value)
        if isinstance(value, (dt.date, dt.time)):
            return value.isoformat()
        if isinstance(value, (bytes, bytearray, memoryview)):
            return base64.b64encode(value).decode("ascii")
        return str(value)
