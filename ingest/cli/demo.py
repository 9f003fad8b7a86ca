"""What does `actstore demo` do? The command line of `actstore.ingest.demo.tour`."""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

from actstore._lazy import lazy_import
from actstore.ingest.demo.tour import TourConfig, run_tour

HELP = "train two tiny models and a sparse autoencoder, ingest, encode, ask everything"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store",
        default="./demo.store",
        metavar="PATH",
        help="folder of the store; models go to PATH.models, pictures to PATH.latents.png and .html",
    )
    parser.add_argument("--no-ray", action="store_true", help="ingest in this process")


def run(args: argparse.Namespace) -> int:
    transformers = lazy_import("transformers", needed_for="the demo", extra="ingest")
    transformers.utils.logging.disable_progress_bar()
    # Where nobody's terminal says how wide it is (a log of CI), 120 columns hold the contexts.
    console = Console(quiet=args.json, width=None if sys.stdout.isatty() else 120)
    config = TourConfig(ray_address=None if args.no_ray else "local")
    summary = run_tour(Path(args.store), config, console)
    if args.json:
        print(json.dumps(summary))
    else:
        console.print(f"\nDone in {summary['seconds']:.0f} s.", highlight=False)
    return 0
