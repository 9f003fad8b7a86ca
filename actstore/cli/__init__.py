"""What does `actstore COMMAND ...` run? The commands live in one file each, with the part of the code they call.

Only the module of the command that is asked for is imported. Exit codes: 0 done, 1 an error of the program, 2 bad input,
3 not found, 4 conflict, 5 storage, 6 damaged or too new, 7 a package is missing, 130 interrupted.
"""

import argparse
import contextlib
import importlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import NoReturn

from actstore.errors import ActstoreError, ErrorKind, StorageError

INTERRUPTED = 130

COMMANDS = {
    "demo": (
        "actstore.ingest.cli.demo",
        "train two tiny models and a sparse autoencoder, ingest, encode, ask everything",
    ),
    "import": ("actstore.ingest.cli.import_", "import documents as a corpus"),
    "tokenize": ("actstore.ingest.cli.tokenize_", "cut a corpus into token rows"),
    "ingest": ("actstore.ingest.cli.ingest", "run a model over a corpus and store its activations"),
    "import-run": (
        "actstore.ingest.cli.import_run",
        "import activations that SAELens, vLLM or another program harvested",
    ),
    "sae": (
        "actstore.ingest.cli.sae",
        "train or import a sparse autoencoder, encode a run with one",
    ),
    "index": (
        "actstore.ingest.cli.index",
        "build or list indexes for nearest neighbours and directions",
    ),
    "runs": ("actstore.cli.runs", "list the runs of a store"),
    "info": ("actstore.cli.info", "show one run"),
    "sql": ("actstore.query.cli.sql_", "run one SELECT over the store's views"),
    "examples": (
        "actstore.query.cli.examples_",
        "find the contexts that most activate a neuron, a direction or a latent",
    ),
    "nearest": ("actstore.query.cli.nearest_", "find the stored contexts nearest to a row, text or vector"),
    "knn-lm": ("actstore.query.cli.knn_lm", "predict the next token from the nearest stored contexts"),
    "latents": ("actstore.query.cli.latents", "search a dictionary's latents by statistics and top tokens"),
    "active": ("actstore.query.cli.active", "list the latents that fire on a text, rows or a document"),
    "match": ("actstore.query.cli.match", "find contexts in which latents fire together"),
    "neighbours": (
        "actstore.query.cli.neighbours",
        "find the latents most like one, by decoder or by firing together",
    ),
    "fsck": ("actstore.cli.fsck", "check every invariant of a store"),
}
"""Command: the module with `add_arguments(parser)` and `run(args) -> int`, and its line in the overview."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; errors of the tree become one line on stderr."""
    from actstore.cli.console import prepare_streams

    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in arguments
    try:
        prepare_streams()
        with _sigterm_interrupts():
            args = _parser(arguments).parse_args(arguments)
            code: int = args.run(args)
            sys.stdout.flush()
    except ActstoreError as error:
        try:
            code = _print_error(error, as_json=as_json)
            sys.stdout.flush()
        except BrokenPipeError:
            _discard_output()
            code = error.exit_code
    except KeyboardInterrupt:
        print(
            "interrupted: everything committed is safe; run the same command again to go on", file=sys.stderr
        )
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has gone: not an error, and nothing more can be printed.
        _discard_output()
        return 0
    except OSError as error:
        # Such as a full disk under the file that stdout is; what a store's storage raises is one of the errors above.
        _discard_output()
        return _print_error(StorageError(ErrorKind.STORAGE_FAILED, _describe(error)), as_json=False)
    return code


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Make SIGTERM end a command as Ctrl-C does, cleaning up on the way."""

    def interrupt(_number: int, _frame: object) -> NoReturn:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _discard_output() -> None:
    """Let what is still buffered go nowhere, or the interpreter would fail on it again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _describe(error: OSError) -> str:
    what = "input or output" if error.filename is None else f"reading or writing {error.filename!r}"
    return f"{what} failed: {error.strerror or error}; make it possible and run the command again"


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    from actstore import __version__

    parser = argparse.ArgumentParser(
        prog="actstore", description="A datastore for language-model activations."
    )
    parser.add_argument("--version", action="version", version=f"actstore {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    asked = next((a for a in arguments if not a.startswith("-")), None)
    for name, (module, line) in COMMANDS.items():
        command = commands.add_parser(name, help=line, description=line)
        command.add_argument("--json", action="store_true", help="print machine-readable JSON")
        if name == asked:
            implementation = importlib.import_module(module)
            implementation.add_arguments(command)
            command.set_defaults(run=implementation.run)
    return parser


def _print_error(error: ActstoreError, *, as_json: bool) -> int:
    from actstore.cli.console import visible_lines

    if as_json:
        print(json.dumps({"error": {"kind": str(error.kind), "message": error.message}}))
    else:
        print(visible_lines(f"actstore: {error.message} [{error.kind}]"), file=sys.stderr)
    return error.exit_code
