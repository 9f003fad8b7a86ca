"""How does a long job over documents look in a terminal?"""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from actstore.ingest.progress import Progress, ProgressCallback


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
