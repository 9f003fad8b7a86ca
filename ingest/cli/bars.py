"""What do the writing commands share: how a long job looks in a terminal, and options of the same form?"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from actstore.ingest.progress import Progress, ProgressCallback


def auto_or_int(text: str) -> int | Literal["auto"]:
    """Return the value of an option that is a whole number or `auto`."""
    try:
        return "auto" if text == "auto" else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be auto or a whole number, got {text!r}") from error


@contextmanager
def document_bar(*, quiet: bool) -> Iterator[ProgressCallback | None]:
    """Yield a callback that draws one bar per stage on stderr; None when nothing is to be drawn."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=console) as bars:
        tasks = {}

        def show(progress: Progress) -> None:
            if progress.stage not in tasks:
                tasks[progress.stage] = bars.add_task(
                    f"{progress.stage} {progress.unit}", total=progress.total
                )
            bars.update(tasks[progress.stage], completed=progress.done, total=progress.total)

        yield show
