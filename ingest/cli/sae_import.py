"""How is a dictionary that another library trained imported on the command line?"""

import argparse
import dataclasses
import json

from actstore.cli.console import visible_lines
from actstore.ingest.dictionaries.importing import ImportDictionaryReport, import_dictionary
from actstore.ingest.dictionaries.locate import FORMATS

HELP = "import a sparse autoencoder or transcoder of SAELens, sparsify or dictionary_learning"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="folder or URL of the store; made if absent")
    parser.add_argument(
        "source", metavar="PATH", help="folder of one dictionary, or owner/repository[/folder] on the hub"
    )
    parser.add_argument("--name", required=True, help="what to call it")
    parser.add_argument(
        "--format", choices=FORMATS, default="auto", help="whose files they are; default: found out"
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument(
        "--hook-point", metavar="NAME", help="where its rows come from; default: what its files say"
    )
    parser.add_argument("--hook-point-out", metavar="NAME", help="where a transcoder's output belongs")
    parser.add_argument("--norm-factor", type=float, metavar="X", help="what rows are multiplied with first")
    parser.add_argument("--center", action="store_true", help="take each row's mean from it first")
    parser.add_argument("--offline", action="store_true", help="look in the hub's cache only")


def run(args: argparse.Namespace) -> int:
    report = import_dictionary(
        args.store,
        args.source,
        args.name,
        format=args.format,
        revision=args.revision,
        hook_point=args.hook_point,
        hook_point_out=args.hook_point_out,
        norm_factor=args.norm_factor,
        center=args.center,
        offline=args.offline,
    )
    if args.json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        _print_report(report, args.store)
    return 0


def _print_report(report: ImportDictionaryReport, store: str) -> None:
    done = "imported" if report.is_new else "unchanged, the store has exactly this:"
    k = "" if report.k is None else f", k {report.k:g}"
    out = f" to {report.hook_point_out or 'unknown'} ({report.d_out})" if report.kind == "transcoder" else ""
    print(
        f"{done} dictionary {report.dictionary}: {report.activation} {report.kind} of {report.n_latents:,} latents{k}, "
        f"{report.nbytes / 1e6:,.1f} MB (version {report.version})"
    )
    commit = f", commit {report.commit}" if report.commit else ""
    print(visible_lines(f"  {report.hook_point} ({report.d_in}){out}, from {report.format}{commit}"))
    for note in report.notes:
        print(visible_lines(f"  note: {note}"))
    print(f"next: actstore sae encode {store} {report.dictionary} RUN")
