"""How is an ingest asked for on the command line?"""

import argparse
import dataclasses
import itertools
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

import actstore
from actstore.cli import INTERRUPTED
from actstore.cli.console import visible_lines
from actstore.errors import ErrorKind, InvalidInputError
from actstore.ingest.cli.ingest_options import add_config_arguments, parse_config_arguments
from actstore.ingest.config import IngestConfig
from actstore.ingest.job import IngestReport, run_ingest
from actstore.ingest.scheduler import Progress as JobProgress
from actstore.ingest.self_check import describe_check

_SHOWN = 10
"""Units without activations that are named."""

HELP = "run a model over a corpus and store its activations"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--dry-run",
        action="store_true",
        help="say what it would cost, from a few real batches; write nothing",
    )
    instead.add_argument(
        "--submit",
        metavar="ADDRESS",
        help="run it as a Ray Job: http://head:8265 of the cluster's job server",
    )
    parser.add_argument("--no-wait", action="store_true", help="with --submit: leave the job to itself")
    parser.add_argument(
        "--entrypoint-python",
        metavar="PROGRAM",
        help="with --submit: Python on the cluster (default: python)",
    )


def run(args: argparse.Namespace) -> int:
    store, config = parse_config_arguments(args)
    if args.submit is not None:
        from actstore.ingest.cli.ingest_submit import submit

        return submit(args, store, config)
    if args.no_wait or args.entrypoint_python is not None:
        option = "--no-wait" if args.no_wait else "--entrypoint-python"
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT, f"{option} is for a job that is submitted: give --submit, or leave it out"
        )
    if args.dry_run:
        from actstore.ingest.cli.ingest_dry_run import show_dry_run

        return show_dry_run(store, config, as_json=args.json)
    report = ingest_with_bar(store, config, quiet=args.json)
    if args.json:
        print(json.dumps({**dataclasses.asdict(report), "rows_per_s": report.rows_per_s}))
    else:
        print_report(report, store)
    return 0 if report.is_complete else INTERRUPTED


def ingest_with_bar(store: str, config: IngestConfig, *, quiet: bool) -> IngestReport:
    """Run an ingest with a live bar of units and tokens per second on stderr."""
    from rich.console import Console

    opened = actstore.open(store)
    if quiet:
        return run_ingest(opened, config)
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("units · {task.fields[rate]} tokens/s · ETA"),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
    )
    task = bar.add_task(config.run, total=None, rate="-")
    with ExitStack() as stack:

        def show(p: JobProgress) -> None:
            if not bar.live.is_started:  # not before: what is refused, or complete already, draws no bar
                stack.enter_context(bar)
            rate = p.rows_this_job / p.elapsed_s if p.elapsed_s else 0.0
            bar.update(TaskID(task), completed=p.units_done, total=p.units_total, rate=f"{rate:,.0f}")

        return run_ingest(
            opened,
            config,
            progress=show,
            notice=lambda line: bar.console.print(visible_lines(line), markup=False, highlight=False),
        )


def print_report(report: IngestReport, store: str) -> None:
    """Print what an ingest did, in words."""
    for line in _lines(report, store):
        print(visible_lines(line))


def _lines(report: IngestReport, store: str) -> Iterator[str]:
    state = "complete" if report.is_complete else "stopped: run the same command again to go on"
    yield (
        f"run {report.run}: {report.n_rows:,} rows in {report.n_units} of {report.n_units_planned} units, "
        f"{report.nbytes / 1e6:,.1f} MB, {state} (version {report.version})"
    )
    if report.units_this_job:
        idle = "" if report.idle_share is None else f", models idle {report.idle_share:.0%} of the time"
        yield (
            f"this job: {report.units_this_job} units, {report.rows_per_s:,.0f} tokens/s, {report.retries} retries{idle}"
        )
    if report.nonfinite:
        yield f"{report.nonfinite:,} activations are NaN or infinite: queries leave their rows out"
    if report.quarantined:
        yield f"{len(report.quarantined)} units could not be computed, and the run is complete without them:"
        for unit, reason in itertools.islice(report.quarantined.items(), _SHOWN):
            yield f"  unit {unit}: {reason}"
        if len(report.quarantined) > _SHOWN:
            yield f"  ... and {len(report.quarantined) - _SHOWN} more"
    if report.self_check is not None:
        yield f"self-check: {describe_check(report.self_check)}"
    if report.is_complete:
        yield f"next: actstore info {shlex.quote(store)} {report.run}"
