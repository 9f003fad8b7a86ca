"""How are documents imported on the command line?"""

import argparse
import dataclasses
import json
from typing import Any

from actstore.cli.console import visible_lines
from actstore.ingest.cli.bars import document_bar
from actstore.ingest.importing import MAX_DOCUMENT_BYTES, ImportReport, import_corpus
from actstore.ingest.sources import SOURCE_FORMATS, SourceList

HELP = "import documents as a corpus"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="folder or URL of the store; made if absent")
    parser.add_argument("corpus", metavar="CORPUS", help="name of the new corpus")
    parser.add_argument(
        "source",
        metavar="SOURCE",
        nargs="+",
        help="file, folder, quoted glob or URL of Parquet, JSONL, JSON, CSV, WebDataset tar or text files, each also "
        "compressed (.gz .bz2 .xz .zst .lz4); or a Hugging Face dataset; several are joined in this order",
    )
    parser.add_argument("--text-column", default="text", help="column that holds the text")
    parser.add_argument("--format", choices=SOURCE_FORMATS, help="format of the source; default: found out")
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
    _add_dataset_arguments(parser.add_argument_group("Hugging Face datasets"))
    _add_chat_arguments(parser.add_argument_group("conversations"))


def _add_dataset_arguments(group: Any) -> None:
    group.add_argument("--split", help="split of the dataset, such as train")
    group.add_argument(
        "--subset", "--config", metavar="NAME", help="subset (configuration) of the dataset, such as en"
    )
    group.add_argument("--revision", help="branch, tag or commit on the hub")
    group.add_argument(
        "--streaming",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read the dataset as it comes, or download and convert all of it first",
    )


def _add_chat_arguments(group: Any) -> None:
    group.add_argument(
        "--chat-template",
        metavar="TOKENIZER_OR_FILE",
        help="render conversations: tokenizer folder, hub name (NAME@REVISION) or .jinja file with the chat template",
    )
    group.add_argument(
        "--messages-column",
        metavar="COLUMN",
        help="column of messages, with role and content or from and value; default: messages",
    )
    group.add_argument(
        "--chat-tokenizer", metavar="TOKENIZER", help="where a .jinja file's special tokens come from"
    )
    group.add_argument(
        "--chat-variables",
        metavar="JSON",
        type=_json_object,
        help="the template's own switches, as a JSON object",
    )
    group.add_argument(
        "--allow-special-tokens",
        action="store_true",
        help="take messages that hold special tokens, and read these as such; default: they are bad documents",
    )


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"not a JSON object: {text}")
    return value


def run(args: argparse.Namespace) -> int:
    with document_bar(quiet=args.json) as progress:
        report = import_corpus(
            args.store,
            args.corpus,
            args.source[0] if len(args.source) == 1 else SourceList(args.source),
            text_column=args.text_column,
            source_format=args.format,
            split=args.split,
            subset=args.subset,
            revision=args.revision,
            streaming=args.streaming,
            chat_template=args.chat_template,
            messages_column=args.messages_column,
            chat_tokenizer=args.chat_tokenizer,
            chat_variables=args.chat_variables,
            allow_special_tokens=args.allow_special_tokens,
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
