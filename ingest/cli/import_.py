"""How are documents imported on the command line?"""

import argparse
import dataclasses
import json

from actstore.cli.console import visible_lines
from actstore.ingest.cli.bars import document_bar
from actstore.ingest.importing import MAX_DOCUMENT_BYTES, ImportReport, import_corpus
from actstore.ingest.sources import SOURCE_FORMATS

HELP = "import documents as a corpus"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="folder or URL of the store; made if absent")
    parser.add_argument("corpus", metavar="CORPUS", help="name of the new corpus")
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="file, folder, glob or URL of JSONL, Parquet or text; or a hub dataset",
    )
    parser.add_argument("--text-column", default="text", help="column that holds the text")
    parser.add_argument("--format", choices=SOURCE_FORMATS, help="format of the source; default: found out")
    parser.add_argument("--split", help="split of a Hugging Face dataset")
    parser.add_argument("--subset", help="subset (configuration) of a hub dataset")
    parser.add_argument("--revision", help="branch, tag or commit of a hub dataset")
    parser.add_argument("--id-column", help="column that becomes source_key; default: file and line")
    parser.add_argument("--columns", nargs="*", help="metadata columns to keep; default: all")
    parser.add_argument(
        "--stringify", nargs="+", default=[], metavar="COLUMN", help="store these columns as text"
    )
    parser.add_argument(
        "--max-document-bytes", type=int, default=MAX_DOCUMENT_BYTES, help="larger ones are bad"
    )
    parser.add_argument(
        "--on-bad-document", choices=("error", "skip"), default="error", help="what unusable documents do"
    )
    parser.add_argument(
        "--duplicates", choices=("report", "drop"), default="report", help="what repeated texts do"
    )


def run(args: argparse.Namespace) -> int:
    with document_bar(quiet=args.json) as progress:
        report = import_corpus(
            args.store,
            args.corpus,
            args.source,
            text_column=args.text_column,
            source_format=args.format,
            split=args.split,
            subset=args.subset,
            revision=args.revision,
            id_column=args.id_column,
            columns=args.columns,
            stringify=args.stringify,
            max_document_bytes=args.max_document_bytes,
            on_bad_document=args.on_bad_document,
            duplicates=args.duplicates,
            progress=progress,
        )
    if args.json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        _print_report(report)
    return 0


def _print_report(report: ImportReport) -> None:
    done = "imported" if report.is_new else "unchanged, the store has exactly this:"
    print(f"{done} {report.n_documents:,} documents, {report.n_bytes:,} bytes as corpus {report.name}")
    for source, stored in report.renamed.items():
        print(visible_lines(f"  column {source!r} is stored as {stored!r}"))
    for warning in report.warnings:
        print(visible_lines(f"  note: {warning}"))
