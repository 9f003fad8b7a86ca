"""What does `actstore ingest --submit` print and ask? The job's own output, and at Ctrl-C whether to stop the job too."""

import argparse
import dataclasses
import json
import shlex
import sys
from typing import TextIO

from actstore.cli import INTERRUPTED
from actstore.cli.console import visible_lines
from actstore.ingest.config import IngestConfig
from actstore.ingest.submit import Outcome, follow, open_client, stop_job, submit_ingest


def submit(args: argparse.Namespace, store: str, config: IngestConfig) -> int:
    """Submit a job, follow it, and return its exit code."""
    client = open_client(args.submit)
    job = submit_ingest(client, store, config, python=args.entrypoint_python or "python")
    # What is for programs goes to stdout alone.
    out = sys.stderr if args.json else sys.stdout
    done = "submitted" if job.is_new else "found running, and attached to,"
    print(visible_lines(f"{done} job {job.submission_id}: {job.entrypoint}"), file=out, flush=True)
    if args.no_wait:
        print(visible_lines(_later(args.submit, job.submission_id)), file=out)
        if args.json:
            print(json.dumps(dataclasses.asdict(job)))
        return 0
    try:
        outcome = follow(client, job.submission_id, write=_Writer(out))
    except KeyboardInterrupt:
        if _asks_to_stop(job.submission_id):
            stop_job(client, job.submission_id)
            print(f"\njob {job.submission_id} was told to stop: finished units are kept", file=sys.stderr)
        else:
            print(visible_lines(f"\nleft running. {_later(args.submit, job.submission_id)}"), file=sys.stderr)
        return INTERRUPTED
    return _report(outcome, as_json=args.json)


class _Writer:
    """Writes a job's output to a stream, whatever it holds harmless to a terminal."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def __call__(self, text: str) -> None:
        # A bar that redraws its line would else be one long line of escapes.
        self._out.write(visible_lines(text.expandtabs().replace("\r\n", "\n").replace("\r", "\n")))
        self._out.flush()


def _asks_to_stop(submission_id: str) -> bool:
    """Return whether the user wants the job stopped; nobody who could answer means no."""
    if not (sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    print(f"\nstop job {submission_id} too? [y/N] ", end="", file=sys.stderr, flush=True)
    try:
        return sys.stdin.readline().strip().lower() in ("y", "yes")
    except KeyboardInterrupt:
        return False


def _later(address: str, submission_id: str) -> str:
    at = f"--address {shlex.quote(address)} {submission_id}"
    return f"Follow it with the same command, or: ray job logs --follow {at}; stop it: ray job stop {at}"


def _report(outcome: Outcome, *, as_json: bool) -> int:
    if as_json:
        print(json.dumps(dataclasses.asdict(outcome)))
    elif outcome.status == "SUCCEEDED":
        print(f"job {outcome.submission_id} succeeded")
    else:
        text = f"actstore: job {outcome.submission_id} {outcome.status.lower()}: {outcome.message}"
        print(visible_lines(text), file=sys.stderr)
    return outcome.exit_code
