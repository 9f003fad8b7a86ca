"""Is a store whole? The command line of `actstore.log.fsck`."""

import argparse
import dataclasses
import json

from actstore.log.fsck import describe, fsck
from actstore.storage import open_storage

HELP = "check every invariant of a store"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="folder or URL of the store")
    parser.add_argument("--deep", action="store_true", help="read every object and check its SHA-256")


def run(args: argparse.Namespace) -> int:
    report = fsck(open_storage(args.store), deep=args.deep)
    if args.json:
        print(json.dumps(dataclasses.asdict(report), default=str))
    else:
        print("\n".join(describe(report)))
    return 0 if report.is_clean else 6
