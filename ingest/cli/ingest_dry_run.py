"""How does a dry run look in a terminal?"""

import json
import sys
from collections.abc import Iterator

from rich.table import Table

import actstore
from actstore.cli.console import output_console, visible_lines
from actstore.errors import StorageError
from actstore.ingest.config import IngestConfig
from actstore.ingest.dry_run import DryRun, check_fits, dry_run
from actstore.show import visible

_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB", "EB")


def show_dry_run(store: str, config: IngestConfig, *, as_json: bool) -> int:
    """Print what an ingest would cost; an error if the disk cannot hold it."""
    opened = actstore.open(store)

    def notice(line: str) -> None:
        if not as_json:
            print(visible_lines(line), file=sys.stderr)

    found = dry_run(opened, config, notice=notice)
    problem = None
    try:
        check_fits(opened, found)
    except StorageError as error:
        problem = error
    if as_json:
        failed = {} if problem is None else {"error": {"kind": str(problem.kind), "message": problem.message}}
        print(json.dumps({**found.to_json(), **failed}))
        return 0 if problem is None else problem.exit_code
    _print(found)
    if problem is not None:
        raise problem
    return 0


def _print(found: DryRun) -> None:
    console = output_console()
    for name, text in _lines(found):
        console.print(f"{name:>16}  {visible(text)}", soft_wrap=True)
    table = Table()
    table.add_column("stored")
    for name in ("objects", "bytes"):
        table.add_column(name, justify="right")
    rows = {**found.cost.dense, **found.cost.other}
    if found.tokens.objects:
        rows["tokens"] = found.tokens
    for name, amount in rows.items():
        table.add_row(visible(name), f"{amount.objects:,}", f"{amount.nbytes:,}")
    table.add_row("total", f"{found.n_objects:,}", f"{found.nbytes:,}")
    console.print(table)
    for note in found.notes:
        console.print(f"note: {visible(note)}", soft_wrap=True)
    console.print("nothing was written")


def _lines(found: DryRun) -> Iterator[tuple[str, str]]:
    yield "run", f"{found.run} over corpus {found.corpus} (tokenization {found.tokenization})"
    yield "documents", f"{found.n_documents:,}"
    yield "tokens", f"{found.n_tokens:,} {_how(found)} in {found.n_windows:,} windows"
    done = f", {found.n_units_done:,} of them done" if found.n_units_done else ""
    yield "units", f"{found.n_units:,} of up to {found.rows_per_unit:,} tokens{done}"
    yield "writes", f"{readable_bytes(found.nbytes)} in {found.n_objects:,} objects"
    yield "requests", f"{found.puts:,} PUT, {found.gets:,} GET"
    if found.memory is not None:
        m = found.memory
        yield (
            "memory/worker",
            f"device {readable_bytes(m.parameters + m.batch)} (model {readable_bytes(m.parameters)}, batch "
            f"{readable_bytes(m.batch)}), main memory {readable_bytes(m.units)} for {m.n_units} units"
            + ("" if m.peak_device is None else f"; seen on the device: {readable_bytes(m.peak_device)}"),
        )
        yield "", m.formula
    if found.probe is not None and found.seconds is not None:
        yield "speed", f"{found.probe.rows_per_s:,.0f} tokens/s on one {found.probe.device} worker"
        of = f"{found.workers} worker{'s' if found.workers > 1 else ''}"
        rate = f" if storage takes {readable_bytes(int(found.bytes_per_s))}/s" if found.bytes_per_s else ""
        yield "time", f"about {readable_seconds(found.seconds)} with {of}{rate}"
    room = (
        "unknown for this storage"
        if found.free_bytes is None
        else f"{readable_bytes(max(0, found.free_bytes))} to give"
    )
    yield "room", room


def _how(found: DryRun) -> str:
    if found.tokens_are != "estimated":
        return "(exact)"
    return (
        "(estimated, error unknown)"
        if found.tokens_error is None
        else f"(estimated, ± {found.tokens_error:,})"
    )


def readable_bytes(n: int) -> str:
    """Return a number of bytes for people, in powers of 1,000.

    >>> readable_bytes(999), readable_bytes(1_500_000)
    ('999 bytes', '1.5 MB')
    """
    value, unit = float(n), 0
    while value >= 999.95 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{n:,} bytes" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def readable_seconds(seconds: float) -> str:
    """Return a time for people.

    >>> readable_seconds(41.2), readable_seconds(5400), readable_seconds(200_000)
    ('42 s', '1 h 30 min', '2 d 7 h')
    """
    n = max(1, int(-(-seconds // 1)))
    if n < 120:
        return f"{n} s"
    minutes = round(n / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"
