"""How is an ingest asked for on the command line?"""

import argparse
import dataclasses
import json
import sys
from contextlib import ExitStack

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

import actstore
from actstore.cli import INTERRUPTED
from actstore.ingest.cli.bars import auto_or_int
from actstore.ingest.config import CODECS, POLICIES, IngestConfig
from actstore.ingest.job import IngestReport, run_ingest
from actstore.ingest.scheduler import Progress as JobProgress

HELP = "run a model over a corpus and store its activations"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="folder or URL of the store")
    parser.add_argument("--corpus", required=True, help="name of an imported corpus")
    parser.add_argument("--model", required=True, help="local folder or hub name; safetensors only")
    parser.add_argument(
        "--hook-points", nargs="+", required=True, metavar="GLOB", help="e.g. 'layers.*.resid_post' embed"
    )
    parser.add_argument("--run", required=True, dest="run_name", help="name of the run, new or to be resumed")
    parser.add_argument("--revision", help="branch, tag or commit of a hub model")
    parser.add_argument("--tokenizer", help="folder or hub name; default: the model's own")
    parser.add_argument("--window", type=int, help="tokens per window; default: the model's context")
    parser.add_argument("--overlap", type=int, default=0, help="tokens shared by neighbouring windows")
    parser.add_argument("--rows-per-unit", type=auto_or_int, default="auto", help="rows per unit of work")
    parser.add_argument("--dtype", default="auto", help="stored type: fp32, fp16, bf16; default: as computed")
    parser.add_argument("--compute-dtype", default="auto", help="type the model computes in")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, mps")
    parser.add_argument("--attn-implementation", help="eager, sdpa, flash_attention_2, ...")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="padded tokens per forward pass")
    parser.add_argument(
        "--codec", choices=CODECS, default="hot", help="hot: raw rows; lz4, cold: smaller, slower"
    )
    parser.add_argument("--nonfinite", choices=POLICIES, default="error", help="what NaN and infinity do")
    parser.add_argument("--workers", type=int, default=1, help="actors, each with its own model")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--ray-address", default="local", metavar="ADDRESS", help="local, auto or ray://host:port"
    )
    where.add_argument("--no-ray", action="store_true", help="run in this process")


def run(args: argparse.Namespace) -> int:
    config = IngestConfig(
        corpus=args.corpus,
        model=args.model,
        hook_points=[name for given in args.hook_points for name in _split(given)],
        run=args.run_name,
        revision=args.revision,
        tokenizer=args.tokenizer,
        window=args.window,
        overlap=args.overlap,
        rows_per_unit=args.rows_per_unit,
        dtype=args.dtype,
        compute_dtype=args.compute_dtype,
        device=args.device,
        attn_implementation=args.attn_implementation,
        batch_tokens=args.batch_tokens,
        codec=args.codec,
        nonfinite=args.nonfinite,
        workers=args.workers,
        ray_address=None if args.no_ray else args.ray_address,
    )
    report = ingest_with_bar(args.store, config, quiet=args.json)
    if args.json:
        print(json.dumps({**dataclasses.asdict(report), "rows_per_s": report.rows_per_s}))
    else:
        print_report(report, args.store)
    return 0 if report.is_complete else INTERRUPTED


def _split(text: str) -> list[str]:
    """Split at commas outside braces: `layers.{1..2}.mlp_out,embed` is two names."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c == "{") - (c == "}")
        if c == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [p for p in [*parts, text[start:]] if p]


def ingest_with_bar(store: str, config: IngestConfig, *, quiet: bool) -> IngestReport:
    """Run an ingest with a live bar of units and tokens per second on stderr."""
    from rich.console import Console

    opened = actstore.open(store)
    if quiet:
        return run_ingest(opened, config)
    bar = Progress(
        TextColumn("{task.description}"),
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
            opened, config, progress=show, notice=lambda line: bar.console.print(line, markup=False)
        )


def print_report(report: IngestReport, store: str) -> None:
    """Print what an ingest did, in words."""
    state = "complete" if report.is_complete else "stopped: run the same command again to go on"
    print(
        f"run {report.run}: {report.n_rows:,} rows in {report.n_units} of {report.n_units_planned} units, "
        f"{report.nbytes / 1e6:,.1f} MB, {state} (version {report.version})"
    )
    if report.units_this_job:
        print(
            f"this job: {report.units_this_job} units, {report.rows_per_s:,.0f} tokens/s, {report.retries} retries"
        )
    if report.nonfinite:
        print(f"{report.nonfinite:,} activations are NaN or infinite: queries leave their rows out")
    if report.is_complete:
        print(f"next: actstore info {store} {report.run}")
