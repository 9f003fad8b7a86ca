"""How is a corpus tokenized on the command line?"""

import argparse
import dataclasses
import json

from actstore.ingest.cli.bars import auto_or_int, document_bar
from actstore.ingest.tokenizing import tokenize_corpus

HELP = "cut a corpus into token rows"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="folder or URL of the store")
    parser.add_argument("corpus", metavar="CORPUS", help="name of an imported corpus")
    parser.add_argument("--tokenizer", required=True, help="folder, tokenizer.json or hub name")
    parser.add_argument("--revision", help="branch, tag or commit of a hub name")
    parser.add_argument(
        "--window", type=int, help="tokens per window; default: what the tokenizer says, else 1024"
    )
    parser.add_argument("--overlap", type=int, default=0, help="tokens shared by neighbouring windows")
    parser.add_argument("--rows-per-unit", type=auto_or_int, default="auto", help="rows per unit of work")
    parser.add_argument(
        "--no-special-tokens",
        action="store_true",
        help="leave out what the tokenizer puts around a text; conversations never get it",
    )
    parser.add_argument("--workers", type=int, help="processes; default: threads of this one")


def run(args: argparse.Namespace) -> int:
    with document_bar(quiet=args.json) as progress:
        report = tokenize_corpus(
            args.store,
            args.corpus,
            args.tokenizer,
            window=args.window,
            overlap=args.overlap,
            add_special_tokens=not args.no_special_tokens,
            rows_per_unit=args.rows_per_unit,
            workers=args.workers,
            revision=args.revision,
            progress=progress,
        )
    if args.json:
        print(json.dumps(dataclasses.asdict(report)))
        return 0
    print(
        f"tokenization {report.id}: {report.n_rows:,} rows of {report.n_documents:,} documents in {report.n_units:,} units "
        f"of {report.rows_per_unit:,} rows ({report.n_new_units:,} new), window {report.window}"
    )
    if report.n_empty:
        print(f"  note: {report.n_empty:,} documents have no token")
    return 0
