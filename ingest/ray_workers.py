"""Which of a job's Ray actors can take units right now?

Actors are placed when the cluster has room, load the model, die and come back. A worker is ready once the process that is
there now has described its model and the description equals that of the others. Only ready workers are given units: a
call to an actor that waits for its place would wait with it. Everything here is driven by `poll`; no thread runs.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from actstore.errors import ActstoreError, ErrorKind, InvalidInputError, StorageError

from .events import JobEvents
from .host import ModelDescription
from .placement import cluster_summary

_PROBE_AGAIN_S = 0.5
"""Between two questions to an actor that Ray is restarting: such calls fail at once, they do not wait."""
_NOTICE_FIRST_S, _NOTICE_EVERY_S = 10.0, 60.0
_DEATHS = 5
"""Times a worker may die while it loads before it is given up."""


class Stage(Enum):
    """How far a worker is."""

    PLACING = auto()
    """Its process does not run (again) yet."""
    LOADING = auto()
    READY = auto()
    GONE = auto()
    """Given up."""


@dataclass(slots=True, eq=False)
class Worker:
    """One actor, and the one that took its place."""

    actor: Any
    number: int
    stage: Stage = Stage.PLACING
    load: int = 0
    """Units it was given and that have not ended."""
    deaths: int = 0
    """Since it was ready."""
    probe_at_s: float | None = 0.0
    """When to ask it next; None while a question is open, or none is to be asked."""


def remote_value(ray: Any, ref: Any, *, timeout_s: float | None = None) -> Any:
    """Return a remote call's value, raising the error of ours that it raised, not Ray's wrapping of it."""
    try:
        return ray.get(ref, timeout=timeout_s)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ActstoreError):
            raise error.cause from error
        raise


class Workers:
    """The actors of a job. Not safe for threads."""

    def __init__(
        self,
        ray: Any,
        make: Callable[[], Any],
        *,
        n: int,
        asked: Mapping[str, Any],
        timeout_s: float,
        events: JobEvents,
    ) -> None:
        """Ask the cluster for the actors.

        Args:
            ray: The module.
            make: Makes an actor with the methods of `ModelHost`.
            n: Actors.
            asked: What each reserves, for messages.
            timeout_s: Seconds that a job waits for its workers to be placed.
            events: Told of workers that join and leave.
        """
        self._ray = ray
        self._make = make
        self._asked = asked
        self._timeout_s = timeout_s
        self._events = events
        self._workers = [Worker(make(), i) for i in range(n)]
        self._probes: dict[Any, Worker] = {}
        self._description: ModelDescription | None = None
        self._last_error: BaseException | None = None
        self._enough_s = time.monotonic()
        """When enough workers were placed last."""
        self._notice_s = self._enough_s + _NOTICE_FIRST_S

    @property
    def ready(self) -> list[Worker]:
        """Workers that may be given units."""
        return [w for w in self._workers if w.stage is Stage.READY]

    @property
    def actors(self) -> list[Any]:
        """The actors that are not given up."""
        return [w.actor for w in self._workers if w.stage is not Stage.GONE]

    def wait_ready(self, least: int) -> ModelDescription:
        """Return the model's description once `least` workers are ready.

        Raises:
            NotFoundError: no such model or hook point.
            InvalidInputError: the model cannot be used, or two workers loaded different ones.
            StorageError: the workers find no place, or die while they load.
        """
        while len(self.ready) < least:
            self.poll(1.0, least=least)
        assert self._description is not None
        return self._description

    def poll(self, timeout_s: float, refs: Sequence[Any] = (), *, least: int = 1) -> list[Any]:
        """Wait until one of `refs` or a worker moves on, at most `timeout_s`; return those of `refs` that are there.

        Raises:
            StorageError: fewer than `least` workers have been placed for too long.
            ActstoreError: as `wait_ready`, before any worker is ready.
        """
        self._check(least)
        self._ask()
        next_s = min((w.probe_at_s for w in self._workers if w.probe_at_s is not None), default=float("inf"))
        timeout_s = max(0.01, min(timeout_s, next_s - time.monotonic()))
        watched = [*refs, *self._probes]
        if not watched:
            time.sleep(timeout_s)
            return []
        first, _ = self._ray.wait(watched, num_returns=1, timeout=timeout_s)
        if not first:
            return []
        there, _ = self._ray.wait(watched, num_returns=len(watched), timeout=0)
        for ref in [ref for ref in there if ref in self._probes]:
            self._answered(self._probes.pop(ref), ref)
        known = set(refs)
        return [ref for ref in there if ref in known]

    def lost(self, worker: Worker, error: BaseException) -> None:
        """A call found the worker's process gone: it gets no unit until its successor has proved itself."""
        if worker.stage is Stage.READY:
            worker.stage, worker.probe_at_s = Stage.PLACING, 0.0
            self._events.log("worker_lost", worker=worker.number, error=type(error).__name__)

    def close(self) -> None:
        """Kill the actors."""
        for actor in self.actors:
            with suppress(Exception):  # the cluster itself may be gone; there is nothing more to release
                self._ray.kill(actor)

    def _ask(self) -> None:
        now = time.monotonic()
        for worker in self._workers:
            if worker.probe_at_s is not None and worker.probe_at_s <= now and worker.stage is not Stage.GONE:
                method = "__ray_ready__" if worker.stage is Stage.PLACING else "describe"
                worker.probe_at_s = None
                self._probes[getattr(worker.actor, method).remote()] = worker

    def _answered(self, worker: Worker, ref: Any) -> None:
        exceptions = self._ray.exceptions
        try:
            value = remote_value(self._ray, ref)
        except exceptions.ActorUnavailableError as error:
            self._died(worker, error, replace=False)
        except exceptions.RayTaskError as error:
            self._failed(worker, StorageError(ErrorKind.WORKER_FAILED, f"a worker failed to load: {error}"))
        except exceptions.RayError as error:
            self._died(worker, error, replace=True)
        except ActstoreError as error:
            self._failed(worker, error)
        else:
            if worker.stage is Stage.PLACING:
                worker.stage, worker.probe_at_s = Stage.LOADING, 0.0
                self._events.log("worker_placed", worker=worker.number)
            else:
                self._described(worker, value)

    def _described(self, worker: Worker, description: ModelDescription) -> None:
        known = self._description
        if known is not None and description != known:
            error = InvalidInputError(
                ErrorKind.BAD_MODEL,
                f"two workers loaded or compute the model differently: {known} and {description}; pin a revision, or use one "
                "shared folder, and workers of one kind",
            )
            self._give_up(worker, error)
            return
        self._description = description
        worker.stage, worker.deaths = Stage.READY, 0
        self._events.log("worker_ready", worker=worker.number, ready=len(self.ready))

    def _died(self, worker: Worker, error: BaseException, *, replace: bool) -> None:
        """Wait for Ray's restart of the process, or put another actor in the place of one that Ray has given up."""
        self._last_error = error
        if worker.stage is Stage.LOADING or replace:
            worker.deaths += 1
        worker.stage = Stage.PLACING
        worker.probe_at_s = time.monotonic() + _PROBE_AGAIN_S * 2**worker.deaths
        if worker.deaths >= _DEATHS:
            cause = StorageError(
                ErrorKind.WORKER_FAILED,
                f"worker {worker.number} died {worker.deaths} times while it loaded the model ({type(error).__name__}: "
                f"{error!s:.300}): is there memory for {len(self._workers)} copies of it?",
            )
            self._give_up(worker, cause)
        elif replace:
            with suppress(Exception):  # should it live after all, there must not be two
                self._ray.kill(worker.actor)
            worker.actor = self._make()
            self._events.log("worker_replaced", worker=worker.number)

    def _failed(self, worker: Worker, error: ActstoreError) -> None:
        """Loading raised: before any worker is ready that is the job's error, later it is this worker's."""
        if self._description is None:
            raise error
        worker.deaths += 1
        worker.probe_at_s = time.monotonic() + _PROBE_AGAIN_S * 4**worker.deaths
        self._events.log("worker_failed_to_load", worker=worker.number, error=error)
        if worker.deaths >= _DEATHS:
            self._give_up(worker, error)

    def _give_up(self, worker: Worker, error: ActstoreError) -> None:
        worker.stage, worker.probe_at_s = Stage.GONE, None
        with suppress(Exception):
            self._ray.kill(worker.actor)
        self._events.log("worker_given_up", worker=worker.number, error=error)
        self._events.say(f"worker {worker.number} is left out: {error}")
        if not any(w.stage is Stage.READY for w in self._workers):
            raise error

    def _check(self, least: int) -> None:
        """Say that the job waits for workers; raise when that took too long."""
        now = time.monotonic()
        stages = [w.stage for w in self._workers]
        n_ready, n_loading = stages.count(Stage.READY), stages.count(Stage.LOADING)
        if n_ready + n_loading >= least:
            self._enough_s = now
        if n_ready >= least:
            self._notice_s = now + _NOTICE_FIRST_S
        elif now >= self._notice_s:
            self._notice_s = now + _NOTICE_EVERY_S
            self._events.say(f"waiting for workers: {self._situation(least)}")
        if now - self._enough_s > self._timeout_s:
            raise StorageError(
                ErrorKind.WORKER_FAILED,
                f"no place for the workers after {self._timeout_s:.0f} s: {self._situation(least)}. Add nodes, or ask for less "
                "(fewer workers, gpus_per_worker, another device)",
            ) from self._last_error

    def _situation(self, least: int) -> str:
        stages = [w.stage for w in self._workers]
        asked = ", ".join(
            f"{name[4:-1].upper()} {n:g}" for name, n in self._asked.items() if name.startswith("num_")
        )
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return (
            f"{stages.count(Stage.READY)} ready, {stages.count(Stage.LOADING)} loading, {stages.count(Stage.PLACING)} not "
            f"placed, needed to begin: {least}; each asks for {asked}; the cluster has {cluster_summary(nodes)}"
        )
