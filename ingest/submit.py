"""How is an ingest run as a Ray Job on a cluster, by somebody whose machine is not part of it?

The configuration becomes the words of the same command, each quoted for the shell that the job server starts it with, so it
can be read in Ray's dashboard and repeated by hand. The id of a submission follows from store, run and attempt: submitting
twice attaches to the job that is running, and never starts two. No credentials are sent: the cluster has its own, and a
token for the job server itself (`RAY_AUTH_MODE=token`, `RAY_AUTH_TOKEN`) is taken from the environment by Ray's client.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import actstore
from actstore._lazy import lazy_import
from actstore.errors import ErrorKind, InvalidInputError, StorageError
from actstore.storage.open import parse_location

from .config import IngestConfig
from .config_file import config_arguments

_MAX_ENTRYPOINT_BYTES = 96 << 10
"""Linux takes 128 KiB in one argument of a program; the job server adds words of its own."""

_POLL_S = 0.5
_TRIES = 5
"""Times a connection that broke is made again, and submissions that others were faster with are looked at."""

TERMINAL = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True, slots=True)
class Submission:
    """A job on a cluster."""

    submission_id: str
    entrypoint: str
    is_new: bool
    """False if such a job was running already."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended."""

    submission_id: str
    status: str
    """`SUCCEEDED`, `FAILED` or `STOPPED`."""
    exit_code: int
    """0, the command's own code where the server knows it, 1 otherwise."""
    message: str
    """The server's words about it."""


def submit_ingest(client: Any, store: str, config: IngestConfig, *, python: str = "python") -> Submission:
    """Start the ingest as a Ray Job, or find the one that is running.

    Args:
        client: Of the cluster's job server, from `open_client`.
        store: Where the store is, as the cluster sees it.
        config: The ingest; `ray_address` is the cluster itself.
        python: Program that runs it there, with actstore installed.

    Raises:
        InvalidInputError: a store or a configuration that a job cannot have, or one that runs with other settings.
        StorageError: the job server cannot be reached or refuses.
    """
    config = cluster_config(config.check())
    store = cluster_store(store)
    entrypoint = make_entrypoint(store, config, python=python)
    prefix = submission_prefix(store, config.run)
    for _ in range(_TRIES):
        jobs = {
            job.submission_id: job for job in _ask(client.list_jobs) if _attempt(prefix, job.submission_id)
        }
        running = [name for name, job in jobs.items() if _status(job) not in TERMINAL]
        if running:
            found = jobs[running[0]]
            if found.entrypoint != entrypoint:
                raise InvalidInputError(
                    ErrorKind.BAD_ARGUMENT,
                    f"job {running[0]} computes run {config.run!r} with other settings ({found.entrypoint!r}, and asked is "
                    f"{entrypoint!r}): stop it first (ray job stop {running[0]}), or give the same settings to follow it",
                )
            return Submission(running[0], entrypoint, is_new=False)
        attempt = 1 + max((_attempt(prefix, name) for name in jobs), default=0)
        submission_id = f"{prefix}{attempt}"
        try:
            client.submit_job(
                entrypoint=entrypoint,
                submission_id=submission_id,
                runtime_env={"env_vars": _ENVIRONMENT},
                metadata={"actstore_run": config.run, "actstore_version": actstore.__version__},
            )
        except _call_errors(ValueError) as error:
            # Somebody was faster with the same id: next time it is in the list.
            if "already" not in str(error):
                raise _refused(error) from error
        else:
            return Submission(submission_id, entrypoint, is_new=True)
    raise StorageError(
        ErrorKind.WORKER_FAILED,
        f"the job server kept saying that job {submission_id!r} exists and not listing it: try again",
    )


_ENVIRONMENT = {
    # Lines appear when they are printed, and Ray ships nothing of the submitter's machine.
    "PYTHONUNBUFFERED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}


def cluster_config(config: IngestConfig) -> IngestConfig:
    """Return the configuration as the job has it: on the cluster it runs on, local folders by their whole path."""
    changes = {
        name: os.path.abspath(value)
        for name in ("model", "tokenizer")
        if (value := getattr(config, name)) is not None and os.path.isdir(value)
    }
    return dataclasses.replace(config, ray_address="auto", **changes)


def cluster_store(store: str) -> str:
    """Return where the store is, a local folder by its whole path.

    Raises:
        InvalidInputError: credentials in the URL, or a store that only this process has.
    """
    location = parse_location(store)
    if location.protocol == "memory":
        raise InvalidInputError(
            ErrorKind.BAD_URL,
            "a memory:// store lives in one process: submit with a store that the cluster can reach",
        )
    return location.path if location.protocol == "file" else store


def make_entrypoint(store: str, config: IngestConfig, *, python: str) -> str:
    """Return the shell command of the job: every word quoted, so no setting can be more than a word.

    Raises:
        InvalidInputError: a configuration that is too long for a command.

    >>> make_entrypoint("/s", IngestConfig("c", "$(reboot)", ["embed"], "r", ray_address="auto"), python="python")
    "python -m actstore.cli ingest --corpus=c '--model=$(reboot)' --hook-points=embed --run=r --ray-address=auto -- /s"
    """
    words = [python, "-m", "actstore.cli", "ingest", *config_arguments(config), "--", store]
    if "\0" in "".join(words):
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT, "a setting has a zero byte, which no command can have"
        )
    entrypoint = shlex.join(words)
    if len(entrypoint.encode(errors="replace")) > _MAX_ENTRYPOINT_BYTES:
        raise InvalidInputError(
            ErrorKind.TOO_LARGE,
            f"the configuration makes a command of {len(entrypoint)} characters, and at most {_MAX_ENTRYPOINT_BYTES} can be "
            "submitted: name hook points by patterns",
        )
    return entrypoint


def submission_prefix(store: str, run: str) -> str:
    """Return how the ids of all submissions of a run into a store begin; what follows is the attempt.

    >>> submission_prefix("s3://bucket/s", "pythia@demo")
    'actstore-pythia-demo-48f62dea-'
    """
    slug = re.sub("[^A-Za-z0-9]+", "-", run)
    digest = hashlib.sha256(f"{store}\n{run}".encode()).hexdigest()[:8]
    return f"actstore-{slug}-{digest}-"


def open_client(address: str) -> Any:
    """Return a client of a job server.

    Raises:
        InvalidInputError: no http(s) address.
        StorageError: nobody answers there, or not as a job server that lets this user in.
    """
    parts = urlsplit(address)
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or parts.username
        or parts.query
        or parts.fragment
    ):
        raise InvalidInputError(
            ErrorKind.BAD_URL,
            f"a job server is given as http://host:8265 (https:// too), without user, query or fragment; got {parts.scheme!r} "
            f"and host {parts.hostname!r}. A token is given by RAY_AUTH_MODE=token and RAY_AUTH_TOKEN",
        )
    sdk = lazy_import("ray.job_submission", needed_for="ingest --submit", extra="ingest")
    try:
        with _only_address(address):
            return sdk.JobSubmissionClient(address)
    except _network_errors() as error:
        raise _unreachable(address, error) from error
    except (RuntimeError, ValueError) as error:
        raise _refused(error) from error


def follow(client: Any, submission_id: str, *, write: Callable[[str], None]) -> Outcome:
    """Hand a job's output to `write` as it comes, and return how the job ended. Interruptible at any time.

    A connection that breaks is made again, and what was written is not written twice.

    Raises:
        StorageError: the job server is gone, or has lost the job.
    """
    printed = _Printed(write)
    failures = 0
    while True:
        try:
            whole = asyncio.run(_tail(client, submission_id, printed))
            outcome = job_outcome(client, submission_id)
            if not whole:
                # Some proxies let no long connection live.
                printed.text(client.get_job_logs(submission_id), at=0)
            failures = 0
        except _call_errors(StorageError) as error:
            failures += 1
            if failures >= _TRIES:
                raise _refused(error) from error
            outcome = None
        if outcome is not None:
            return outcome
        time.sleep(_POLL_S)


class _Printed:
    """Writes a log that arrives in pieces, some of them again."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write, self._seen = write, 0

    def text(self, text: str, *, at: int) -> int:
        """Write what of a piece, which starts at character `at` of the log, is new; return where the piece ends."""
        if new := text[max(0, self._seen - at) :]:
            self._write(new)
        self._seen = max(self._seen, at + len(text))
        return at + len(text)


async def _tail(client: Any, submission_id: str, printed: _Printed) -> bool:
    """Write what a job prints until it ends; return False if the connection broke before."""
    position = 0
    try:
        async for text in client.tail_job_logs(submission_id):
            position = printed.text(text, at=position)
    except _call_errors():
        return False
    return True


def job_outcome(client: Any, submission_id: str) -> Outcome | None:
    """Return how a job ended, None if it has not."""
    job = _ask(client.get_job_info, submission_id)
    status = _status(job)
    if status not in TERMINAL:
        return None
    code = getattr(job, "driver_exit_code", None)
    known = {"SUCCEEDED": 0, "STOPPED": 130}.get(
        status, code if isinstance(code, int) and 0 < code < 256 else 1
    )
    return Outcome(submission_id, status, known, str(job.message or ""))


def stop_job(client: Any, submission_id: str) -> None:
    """Ask the cluster to end a job; it gets a SIGTERM, on which an ingest commits what is finished.

    Raises:
        StorageError: the job server refuses.
    """
    _ask(client.stop_job, submission_id)


def _ask(call: Callable[..., Any], *args: Any) -> Any:
    try:
        return call(*args)
    except _call_errors() as error:
        raise _refused(error) from error


def _attempt(prefix: str, submission_id: str | None) -> int:
    """Return the number of the attempt that has this id, 0 if it is another run's."""
    if submission_id is None or not submission_id.startswith(prefix):
        return 0
    rest = submission_id.removeprefix(prefix)
    return int(rest) if rest.isascii() and rest.isdigit() else 0


def _status(job: Any) -> str:
    return str(getattr(job.status, "value", job.status))


@contextlib.contextmanager
def _only_address(address: str) -> Iterator[None]:
    """Keep Ray's variables from overriding an address that was given: what is set for another cluster is not meant here."""
    name = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(name)
    os.environ[name] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _network_errors() -> tuple[type[Exception], ...]:
    import aiohttp
    import requests
    from ray.exceptions import AuthenticationError

    return (ConnectionError, requests.exceptions.RequestException, aiohttp.ClientError, AuthenticationError)


def _call_errors(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """Return what a call to the job server raises: Ray's client has RuntimeError for every answer that is not 200."""
    return (*_network_errors(), RuntimeError, *more)


def _unreachable(address: str, error: Exception) -> StorageError:
    return StorageError(
        ErrorKind.WORKER_FAILED,
        f"the job server at {address!r} cannot be used: {_first_line(error)}. Check that the cluster runs with its dashboard "
        "(ray start --head --include-dashboard=true), the port (8265), and RAY_AUTH_TOKEN if it asks for one",
    )


def _refused(error: Exception) -> StorageError:
    return StorageError(ErrorKind.WORKER_FAILED, f"the job server refused: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:500]
