"""Where do the model and the committer of a job live: in this process, or in Ray actors?

Both backends answer the same questions, so the job itself (`job.py`) knows nothing of Ray.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from actstore.store import Store

from .committer import Committer
from .config import IngestConfig
from .events import JobEvents
from .flow import Pool
from .host import ModelDescription, ModelHost
from .local_pool import LocalPool
from .unit import RunPlan, WrittenUnit

STREAMS = 2
"""Units computed at once on a CPU: one more is written meanwhile."""


class Backend(Protocol):
    """What a job needs from where it runs."""

    def describe(self) -> ModelDescription:
        """Load the model and say what it is and which of the asked hook points it has."""

    def call(self, method: str, *args: Any) -> Any:
        """Return what `method` of one worker's host returns: for probes and checks, which one worker does."""

    def start(self, store: Store, plan: RunPlan) -> Pool:
        """Return the workers, ready for units of this run."""

    def commit(self, units: Sequence[WrittenUnit]) -> None:
        """Commit written units of the run that was started; called from one thread at a time, not always the same."""

    def close(self) -> None:
        """Release the workers and whatever was started for the job."""


class LocalBackend:
    """Everything in this process."""

    def __init__(self, config: IngestConfig) -> None:
        self._host = ModelHost(config, threads=None, streams=STREAMS)
        self._pool: LocalPool | None = None
        self._committer: Committer | None = None

    def describe(self) -> ModelDescription:
        """Load the model here."""
        return self._host.describe()

    def call(self, method: str, *args: Any) -> Any:
        """Call the one host."""
        return getattr(self._host, method)(*args)

    def start(self, store: Store, plan: RunPlan) -> Pool:
        """Return two threads around the one model."""
        self._committer = Committer(store.log, store.objects, plan)
        self._host.resume()
        self._pool = LocalPool(
            lambda unit: self._host.run_unit(store, plan, unit),
            threads=self._host.in_flight,
            interrupt=self._host.stop,
        )
        return self._pool

    def commit(self, units: Sequence[WrittenUnit]) -> None:
        """Commit from the calling thread."""
        assert self._committer is not None
        self._committer.commit(units)

    def close(self) -> None:
        """Interrupt the units that run, if any, and wait for them to end."""
        if self._pool is not None:
            self._pool.close()
        self._host.close()


def open_backend(config: IngestConfig, store: Store, *, events: JobEvents | None = None) -> Backend:
    """Return the backend that `config.ray_address` asks for."""
    if config.ray_address is None:
        return LocalBackend(config)
    from .ray_backend import RayBackend

    return RayBackend(config, store, events=events)
