"""How is a run encoded in a dictionary on the command line?"""

import argparse
import dataclasses
import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from actstore.cli import INTERRUPTED
from actstore.cli.console import visible_lines
from actstore.ingest.encoding.encode import DEFAULT_MEMORY_BYTES, EncodeReport, encode
from actstore.ingest.encoding.plan import COMPUTE_DTYPES, POOL_TOP_M
from actstore.ingest.encoding.postings_plan import DEFAULT_MEMORY_BYTES as POSTINGS_MEMORY_BYTES
from actstore.ingest.flow import Progress
from actstore.sparse.rows import VALUE_DTYPES

HELP = "encode a run's rows with a dictionary; makes codes, postings and latent statistics"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="folder or URL of the store")
    parser.add_argument("dictionary", metavar="DICTIONARY", help="name of a dictionary in it")
    parser.add_argument(
        "run_name", metavar="RUN", help="run that keeps dense rows of the dictionary's hook point"
    )
    parser.add_argument(
        "--value-dtype", choices=list(VALUE_DTYPES), default="float16", help="stored type of the codes"
    )
    parser.add_argument(
        "--pool-top-m", type=_all_or_int, default=POOL_TOP_M, metavar="M",
        help=f"latents kept of each document; all: every one (default: {POOL_TOP_M})",
    )  # fmt: skip
    parser.add_argument(
        "--pool-special", action="store_true", help="special tokens enter the documents' codes"
    )
    parser.add_argument(
        "--compute-dtype",
        choices=COMPUTE_DTYPES,
        default="float32",
        help="type of the product; bfloat16: for GPUs, not exact",
    )
    parser.add_argument("--no-postings", action="store_true", help="leave out postings and latent statistics")
    parser.add_argument(
        "--no-promoted",
        action="store_true",
        help="latent statistics without the vocabulary that each latent promotes",
    )
    _add_place_arguments(parser.add_argument_group("where it runs"))


def _add_place_arguments(group: "argparse._ArgumentGroup") -> None:
    where = group.add_mutually_exclusive_group()
    where.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="local, auto or ray://host:port; default: local if there are several workers",
    )
    where.add_argument("--no-ray", action="store_true", help="run in this process")
    group.add_argument(
        "--workers", type=int, default=1, metavar="N", help="actors, each with its own dictionary"
    )
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, mps")
    group.add_argument("--gpus-per-worker", type=int, metavar="N", help="GPUs each worker reserves")
    group.add_argument(
        "--memory-mb", type=int, default=DEFAULT_MEMORY_BYTES >> 20, metavar="N",
        help=f"MiB of rows on their way (default: {DEFAULT_MEMORY_BYTES >> 20})",
    )  # fmt: skip
    group.add_argument(
        "--postings-memory-mb", type=int, default=POSTINGS_MEMORY_BYTES >> 20, metavar="N",
        help=f"MiB for building postings (default: {POSTINGS_MEMORY_BYTES >> 20})",
    )  # fmt: skip


def _all_or_int(text: str) -> int | None:
    try:
        return None if text == "all" else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be all or a whole number, got {text!r}") from error


def run(args: argparse.Namespace) -> int:
    address = args.ray_address or (None if args.no_ray or args.workers == 1 else "local")
    with unit_bar(f"{args.dictionary}@{args.run_name}", quiet=args.json) as (progress, notice):
        report = encode(
            args.store,
            args.dictionary,
            args.run_name,
            value_dtype=args.value_dtype,
            pool_top_m=args.pool_top_m,
            pool_special=args.pool_special,
            compute_dtype=args.compute_dtype,
            postings=not args.no_postings,
            promoted=False if args.no_promoted else None,
            ray_address=address,
            workers=args.workers,
            device=args.device,
            gpus_per_worker=args.gpus_per_worker,
            memory_bytes=args.memory_mb << 20,
            postings_memory_bytes=args.postings_memory_mb << 20,
            progress=progress,
            notice=notice,
        )
    if args.json:
        print(json.dumps({**dataclasses.asdict(report), "rows_per_s": report.rows_per_s}))
    else:
        _print_report(report, args.store)
    return 0 if report.is_complete else INTERRUPTED


@contextmanager
def unit_bar(
    what: str, *, quiet: bool
) -> Iterator[tuple[Callable[[Progress], None] | None, Callable[[str], None] | None]]:
    """Yield callbacks that draw units and rows per second on stderr, and print lines above; None when quiet."""
    if quiet:
        yield None, None
        return
    bar = Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("units · {task.fields[rate]} rows/s · ETA"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    task = bar.add_task(what, total=None, rate="-")
    with ExitStack() as stack:

        def show(p: Progress) -> None:
            if not bar.live.is_started:  # not before: what is refused, or complete already, draws no bar
                stack.enter_context(bar)
            rate = p.rows_this_job / p.elapsed_s if p.elapsed_s else 0.0
            bar.update(TaskID(task), completed=p.units_done, total=p.units_total, rate=f"{rate:,.0f}")

        yield show, lambda line: bar.console.print(visible_lines(line), markup=False, highlight=False)


def _print_report(report: EncodeReport, store: str) -> None:
    per_row = report.n_codes / report.n_rows if report.n_rows else 0.0
    state = "complete" if report.is_complete else "not complete: run the same command again to go on"
    print(
        visible_lines(
            f"codes {report.codes}: {report.n_codes:,} codes of {report.n_rows:,} rows ({per_row:.1f} each) in {report.n_units} "
            f"of {report.n_units_planned} units, {report.nbytes / 1e6:,.1f} MB, {state} (version {report.version})"
        )
    )
    if report.units_this_job:
        print(
            f"this job: {report.units_this_job} units, {report.rows_per_s:,.0f} rows/s, {report.retries} retries"
        )
    if report.is_complete:
        where = shlex.quote(store)
        print(f"next: actstore latents {where} {report.run} {report.dictionary}")
