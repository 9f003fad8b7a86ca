"""How are activations that another program harvested imported on the command line?"""

import argparse
import dataclasses
import json

from actstore.cli.console import visible_lines
from actstore.ingest.cli.bars import auto_or_int, document_bar
from actstore.ingest.config import CODECS, POLICIES
from actstore.ingest.foreign import ImportRunReport, import_run
from actstore.ingest.foreign.opening import FORMATS
from actstore.ingest.foreign.settings import DTYPES_KEPT
from actstore.ingest.foreign.source import HookPointNames

HELP = "import activations that SAELens, vLLM or another program harvested, as a run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="folder or URL of the store; made if absent")
    parser.add_argument("run_name", metavar="RUN", help="name of the run, new or to be finished")
    parser.add_argument(
        "source", metavar="SOURCE", help="folder of SAELens or vLLM, or file or folder of .npy or safetensors"
    )
    parser.add_argument("--format", choices=FORMATS, help="format of the source; default: found out")
    parser.add_argument(
        "--hook-point",
        dest="hook_points",
        action="append",
        metavar="[ARRAY=]NAME",
        help="place in the model of the array (or of each layer, in order); with ARRAY= for the array of that name",
    )
    parser.add_argument(
        "--layer-ids", nargs="+", type=int, metavar="ID", help="vLLM's eagle_aux_hidden_state_layer_ids"
    )
    parser.add_argument("--tokens", metavar="FILE", help="table of tokens of .npy or safetensors arrays")
    parser.add_argument("--tokenizer", help="folder or hub name; default: unknown, tokens are called <id>")
    parser.add_argument("--corpus", help="name of the corpus made of the documents; default: the run's")
    parser.add_argument("--model", help="what to call the model")
    parser.add_argument("--dtype", choices=DTYPES_KEPT, help="default: as found; float32 converts")
    parser.add_argument(
        "--codec", choices=CODECS, default="hot", help="hot: raw rows; lz4, cold: smaller, slower"
    )
    parser.add_argument("--nonfinite", choices=POLICIES, default="error", help="what NaN and infinity do")
    parser.add_argument("--rows-per-unit", type=auto_or_int, default="auto", help="rows per unit of work")
    parser.add_argument(
        "--special-ids",
        nargs="+",
        type=int,
        default=(),
        metavar="ID",
        help="special tokens, without a tokenizer",
    )
    parser.add_argument(
        "--fingerprint",
        choices=("full", "sampled"),
        default="full",
        help="full: hash every byte of the source; sampled: only parts of large files",
    )


def run(args: argparse.Namespace) -> int:
    with document_bar(quiet=args.json) as progress:
        report = import_run(
            args.store,
            args.run_name,
            args.source,
            format=args.format,
            hook_points=_named(args.hook_points),
            layer_ids=args.layer_ids,
            tokens=args.tokens,
            tokenizer=args.tokenizer,
            corpus=args.corpus,
            model=args.model,
            dtype=args.dtype,
            codec=args.codec,
            nonfinite=args.nonfinite,
            rows_per_unit=args.rows_per_unit,
            special_ids=args.special_ids,
            fingerprint_files=args.fingerprint,
            progress=progress,
        )
    if args.json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        _print_report(report, args.store)
    return 0


def _named(given: list[str] | None) -> HookPointNames:
    """Return names in order, or by array if any is given so."""
    if given is None or not any("=" in text for text in given):
        return given
    pairs = (text.rpartition("=") for text in given)
    return {array if is_pair else name: name for array, is_pair, name in pairs}


def _print_report(report: ImportRunReport, store: str) -> None:
    done = "imported" if report.units_this_job else "unchanged, the store has exactly this:"
    print(
        f"{done} run {report.run}: {report.n_rows:,} rows of {report.n_documents:,} documents, {report.dtype}, "
        f"{report.nbytes / 1e6:,.1f} MB in {report.n_units} units (version {report.version})"
    )
    print(f"  hook points: {', '.join(report.hook_points)}")
    print(visible_lines(f"  corpus {report.corpus}, tokenization {report.tokenization}"))
    if report.nonfinite:
        print(f"  {report.nonfinite:,} activations are NaN or infinite: queries leave their rows out")
    print(f"next: actstore info {store} {report.run}")
