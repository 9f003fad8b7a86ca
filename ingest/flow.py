"""What passes between a scheduler, its workers and its committer?

Values only: the end of one try of a unit, what a pool of workers can do, what is counted, and how a job ended.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from actstore.errors import ActstoreError

from .unit import WrittenUnit


@dataclass(frozen=True, slots=True)
class Completion:
    """The end of one try of one unit."""

    unit: int
    written: WrittenUnit | None = None
    error: BaseException | None = None
    worker_lost: bool = False
    """The worker went away; the unit itself may be innocent."""


class Pool(Protocol):
    """Something that runs units, at most `capacity` tries at once."""

    @property
    def capacity(self) -> int:
        """Tries that may be in flight now: enough that no worker waits for its next; 0 while no worker is ready."""

    @property
    def n_workers(self) -> int:
        """Workers that are ready now."""

    def submit(self, unit: int) -> None:
        """Start a unit; never blocks for its result."""

    def submit_copy(self, unit: int) -> bool:
        """Start a running unit a second time, on a worker that does not run it and has room; False where there is none."""

    def wait(self, timeout_s: float) -> Sequence[Completion]:
        """Return what ended since the last call; waits up to `timeout_s` for something to end or a worker to join.

        Raises:
            StorageError: no worker is left and none comes.
        """

    def abandon(self) -> None:
        """Give up what runs: its results are not waited for."""

    def close(self) -> None:
        """Stop the workers. Units in flight may be lost; nothing committed is."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What a progress bar shows. Counts cover the whole run, units of earlier jobs included."""

    units_done: int
    units_total: int
    rows_done: int
    rows_total: int
    rows_this_job: int
    """Rows committed since this job began: divide by `elapsed_s` for tokens per second."""
    elapsed_s: float
    retries: int
    failed: int = 0
    """Units given up for good so far."""


@dataclass(slots=True)
class Counters:
    """What became of the units and token rows of a job. `imbalance` says whether it adds up.

    Every planned unit ends as exactly one of committed, failed and abandoned. Rows are the tokenization's: a run that keeps
    a sample of them stores fewer.
    """

    planned: int = 0
    written: int = 0
    """Units whose objects were stored, by the try that came first."""
    committed: int = 0
    failed: int = 0
    """Units given up for good: left out of the run if `allow_failed` lets them, else the job fails."""
    abandoned: int = 0
    """Units not run, or not committed, because the job was stopped."""
    retries: int = 0
    copies: int = 0
    """Second copies of units that took too long."""
    rows_planned: int = 0
    rows_read: int = 0
    rows_forwarded: int = 0
    rows_committed: int = 0
    rows_failed: int = 0
    rows_abandoned: int = 0
    rows_stored: int = 0
    """Rows that the committed units hold; fewer than `rows_committed` in a sampled run."""
    nbytes: int = 0
    """Stored bytes of the committed units."""

    def imbalance(self) -> str | None:
        """Return which sums do not agree, or None.

        >>> Counters(planned=3, written=2, committed=2, abandoned=1).imbalance() is None
        True
        >>> Counters(planned=3, written=2, committed=2).imbalance()
        'planned units 3, but committed + failed + abandoned 2'
        """
        sums = (
            ("planned units", self.planned, "committed + failed + abandoned",
             self.committed + self.failed + self.abandoned),
            ("planned rows", self.rows_planned, "committed + failed + abandoned",
             self.rows_committed + self.rows_failed + self.rows_abandoned),
            ("rows read", self.rows_read, "rows forwarded", self.rows_forwarded),
        )  # fmt: skip
        wrong = [f"{a} {n}, but {b} {m}" for a, n, b, m in sums if n != m]
        if self.rows_forwarded < self.rows_committed:
            wrong.append(f"rows forwarded {self.rows_forwarded}, but committed {self.rows_committed}")
        if self.written < self.committed:
            wrong.append(f"units written {self.written}, but committed {self.committed}")
        return "; ".join(wrong) or None


@dataclass(frozen=True, slots=True)
class FailedUnit:
    """A unit that was given up."""

    unit: int
    rows: int
    tries: int
    error: ActstoreError
    """Of the last try."""
    documents: tuple[str, ...] = ()
    """The first few documents in it, as `doc_id (source key)`."""
    n_documents: int = 0

    @property
    def reason(self) -> str:
        """One line for a report: class of error, what it says."""
        return f"{type(self.error).__name__}: {self.error.message:.500} [{self.error.kind}]"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job's units ended; nothing was raised."""

    counters: Counters
    failed: tuple[FailedUnit, ...]
    """The first hundred at least, all of them if they may be quarantined; `counters.failed` counts all."""
    stopped: bool
