"""How is a hook point indexed on the command line?"""

import argparse
import dataclasses
import json
import shlex

from actstore.cli import INTERRUPTED
from actstore.cli.console import visible_lines
from actstore.ingest.indexing.job import RECALL_FLOOR, SHARD_ROWS, IndexReport, build_index
from actstore.pooled_tables import POOLINGS
from actstore.transforms import STEPS
from actstore.vector_index import METRICS, PURPOSES

from .sae_encode import unit_bar

HELP = "index a hook point for nearest neighbours or directions"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="folder or URL of the store")
    parser.add_argument("run_name", metavar="RUN", help="name of a run in it")
    parser.add_argument("hook_point", metavar="HOOK_POINT", help="one of the run's hook points")
    parser.add_argument(
        "--kind", choices=["auto", *PURPOSES], default="auto",
        help="auto: by rows, width and memory; scan_sq8: for directions (default: auto)",
    )  # fmt: skip
    parser.add_argument(
        "--rows", choices=["tokens", "documents"], default="tokens",
        help="what is indexed: token rows, or pooled document vectors (default: tokens)",
    )  # fmt: skip
    parser.add_argument("--metric", choices=METRICS, help="default: cosine; ip of scan_sq8")
    parser.add_argument(
        "--transform", default="", metavar="STEPS",
        help=f"applied to rows and queries, with commas between them: {', '.join(STEPS)}",
    )  # fmt: skip
    parser.add_argument("--first-dims", type=int, metavar="N", help="index only the first N dimensions")
    parser.add_argument("--pooling", choices=POOLINGS, default="mean", help="of documents (default: mean)")
    parser.add_argument("--rebuild", action="store_true", help="index everything anew")
    _add_tuning(parser.add_argument_group("how"))
    _add_place(parser.add_argument_group("where it runs"))


def _add_tuning(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--lists", type=int, metavar="N", help="inverted lists; default: by the rows")
    group.add_argument(
        "--recall-floor", type=float, default=RECALL_FLOOR, metavar="R",
        help=f"publish only if so much of the 10 nearest is found (default: {RECALL_FLOOR})",
    )  # fmt: skip
    group.add_argument(
        "--memory-mb", type=int, metavar="N",
        help="MiB that the vectors may take on a machine that answers queries; default: a quarter of this one's",
    )  # fmt: skip
    group.add_argument(
        "--shard-rows", type=int, default=SHARD_ROWS, metavar="N", help=f"default: {SHARD_ROWS:,}"
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of samples (default: 0)")


def _add_place(group: "argparse._ArgumentGroup") -> None:
    where = group.add_mutually_exclusive_group()
    where.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="local, auto or ray://host:port; default: local if there are several workers",
    )
    where.add_argument("--no-ray", action="store_true", help="run in this process")
    group.add_argument("--workers", type=int, default=1, metavar="N", help="actors that fill shards")
    group.add_argument("--device", default="auto", help="auto, cpu or cuda (with actstore[gpu])")
    group.add_argument("--gpus-per-worker", type=int, metavar="N", help="GPUs each worker reserves")


def run(args: argparse.Namespace) -> int:
    address = args.ray_address or (None if args.no_ray or args.workers == 1 else "local")
    with unit_bar(f"{args.run_name} {args.hook_point}", quiet=args.json) as (progress, notice):
        report = build_index(
            args.store,
            args.run_name,
            args.hook_point,
            kind=args.kind,
            of=args.rows,
            metric=args.metric,
            transform=args.transform,
            first_dims=args.first_dims,
            pooling=args.pooling,
            recall_floor=args.recall_floor,
            memory_bytes=None if args.memory_mb is None else args.memory_mb << 20,
            seed=args.seed,
            shard_rows=args.shard_rows,
            rebuild=args.rebuild,
            n_lists=args.lists,
            ray_address=address,
            workers=args.workers,
            device=args.device,
            gpus_per_worker=args.gpus_per_worker,
            progress=progress,
            notice=notice,
        )
    if args.json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        _print_report(report, args)
    return 0 if report.is_complete else INTERRUPTED


def _print_report(report: IndexReport, args: argparse.Namespace) -> None:
    state = "" if report.is_complete else ", not complete: run the same command again to go on"
    print(
        visible_lines(
            f"index {report.index}: {report.kind} of {report.n_indexed:,} of {report.n_rows:,} {args.rows} in "
            f"{report.n_shards} of {report.n_shards_planned} shards, {report.nbytes / 1e6:,.1f} MB{state} "
            f"(version {report.version})"
        )
    )
    for m in report.measured:
        if m["share"] == 1.0:
            print(f"effort {m['effort']:>6}: finds {m['recall']:.4f} of the {m['k']} nearest")
    if report.is_complete and report.n_uncovered:
        print(f"{report.n_uncovered:,} {args.rows} are in no index: run the same command again")
    if report.is_complete and report.units_this_job == 0:
        print("everything is indexed: --rebuild makes a new index")
    if report.is_complete and args.kind != "scan_sq8":
        place = " ".join(map(shlex.quote, (args.store, args.run_name, args.hook_point)))
        print(f"next: actstore nearest {place} --row N")
