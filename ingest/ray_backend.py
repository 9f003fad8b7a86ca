"""How does a job run on Ray: one actor per worker, each with its own copy of the model, and one that commits?

Activations never enter Ray's object store: an actor writes its shards itself and returns a few hundred bytes per object. A
Ray actor here is a shell: all it does is call the plain object of the same name. Correctness does not rest on Ray: two
copies of an actor, or of a whole job, may be alive; shards are created if absent and commits carry the job's epoch.

Joining a cluster: a new local Ray (`ray_address="local"`) makes itself a token and needs nothing. A cluster that was
started with `RAY_AUTH_MODE=token` is joined only with the same token: in `RAY_AUTH_TOKEN`, or in the file that
`RAY_AUTH_TOKEN_PATH` names (`~/.ray/auth_token` if unset), on every machine and in the job's own environment.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

from actstore._lazy import lazy_import
from actstore.errors import ActstoreError, ErrorKind, InvalidInputError, StorageError
from actstore.store import Store

from .committer import CommitTarget, UnitCommitter, commit_target
from .events import JobEvents
from .flow import Completion, Pool
from .host import Job, ModelDescription, ModelHost
from .placement import actor_options, cluster_summary
from .ray_workers import Worker, Workers, remote_value
from .unit import RunPlan, WrittenUnit

IN_FLIGHT_PER_ACTOR = 2
"""One unit is computed while another is written; more would only hold memory."""

_COMMIT_TIMEOUT_S = 300.0
"""Of one call to the committer; then a new one takes over."""
_CALL_TRIES = 3


class ActorsConfig(Protocol):
    """What the actors of a job are placed by, and made from; `IngestConfig` is one. Pickles."""

    @property
    def run(self) -> str:
        """What the job works on, for messages and metrics."""

    @property
    def ray_address(self) -> str | None:
        """The cluster."""

    @property
    def workers(self) -> int:
        """Actors at most."""

    @property
    def min_workers(self) -> int:
        """Actors that must be ready before the first unit is begun."""

    @property
    def device(self) -> str:
        """`auto` and `cuda` reserve GPUs, `cpu` none."""

    @property
    def gpus_per_worker(self) -> int | None:
        """GPUs that each reserves; None for one or a share of one."""

    @property
    def start_timeout_s(self) -> float:
        """Seconds for which actors may wait for a place."""


class RayBackend:
    """A job's actors."""

    def __init__(
        self,
        config: ActorsConfig,
        store: Store,
        *,
        host: type[Any] = ModelHost,
        events: JobEvents | None = None,
    ) -> None:
        """Start or join Ray and ask for the actors; waits for none of them.

        Args:
            config: The ingest, or another job.
            store: Where it goes.
            host: Class of what an actor holds, made as `host(config, threads=...)`; has `describe` and `run_job_unit` of
                `ModelHost`.
            events: Told what happens to workers.

        Raises:
            StorageError: the cluster cannot be reached, or is this machine alone and has no place for a worker.
            InvalidInputError: a store that only this process can see.
        """
        if store.url.startswith("memory:"):
            raise InvalidInputError(
                ErrorKind.BAD_URL,
                "a memory:// store lives in one process: ingest into it with ray_address=None",
            )
        self._ray = ray = import_ray()
        self._config = config
        self._owns_ray = start_ray(ray, config.ray_address)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        options = actor_options(
            nodes, workers=config.workers, device=config.device, gpus_per_worker=config.gpus_per_worker
        )
        if self._owns_ray and config.ray_address == "local" and not _has_place(nodes, options):
            self.close_ray()
            raise StorageError(
                ErrorKind.WORKER_FAILED,
                f"a worker asks for {options.get('num_gpus', 0):g} GPUs, but Ray on this machine has {cluster_summary(nodes)}: "
                "ask for fewer gpus_per_worker or another device, or give the address of a cluster",
            )
        threads = max(1, int(options["num_cpus"]))
        # One thread more than units: a probe or a check must not wait behind two units.
        remote = ray.remote(host).options(
            max_concurrency=IN_FLIGHT_PER_ACTOR + 1, max_restarts=-1, max_task_retries=0, **options
        )
        self.workers = Workers(
            ray, lambda: remote.remote(config, threads=threads), n=config.workers, asked=options,
            timeout_s=config.start_timeout_s, events=events or JobEvents(config.run),
        )  # fmt: skip
        self._committer: Any = None
        self._make_committer: Any = None

    def describe(self) -> ModelDescription:
        """Wait for `min_workers` to load the model; the others join when they have."""
        return self.workers.wait_ready(min(self._config.min_workers, self._config.workers))

    def call(self, method: str, *args: Any) -> Any:
        """Call the first worker that is ready; another one if that goes away."""
        for tries in range(1, _CALL_TRIES + 1):
            self.workers.wait_ready(1)
            worker = self.workers.ready[0]
            try:
                return remote_value(self._ray, getattr(worker.actor, method).remote(*args))
            except self._ray.exceptions.RayActorError as error:
                self.workers.lost(worker, error)
                if tries == _CALL_TRIES:
                    raise StorageError(
                        ErrorKind.WORKER_FAILED,
                        f"{tries} workers died one after another in {method!r}: {error}",
                    ) from error
        raise AssertionError

    def start(self, store: Store, plan: RunPlan) -> Pool:
        """Return the workers as a pool for units of a run."""
        job = Job(store.url, store.version, store.storage_options, plan)
        return self.start_job(store, job, commit_target(plan))

    def start_job(self, store: Store, job: Any, target: CommitTarget) -> Pool:
        """Return the workers as a pool; each unit comes to `run_job_unit` with `job`, and is committed to `target`."""
        # Committing is idempotent, so Ray may run a call again when the actor died in it.
        remote = self._ray.remote(_CommitterActor).options(num_cpus=0, max_restarts=-1, max_task_retries=3)
        self._make_committer = lambda: remote.remote(store, target)
        self._committer = self._make_committer()
        return RayPool(self._ray, self.workers, job)

    def commit(self, units: Sequence[WrittenUnit]) -> None:
        """Commit through the committer actor; one that does not answer is replaced, and the commit can be tried again."""
        try:
            remote_value(self._ray, self._committer.commit.remote(list(units)), timeout_s=_COMMIT_TIMEOUT_S)
        except self._ray.exceptions.RayTaskError as error:
            raise StorageError(ErrorKind.WORKER_FAILED, f"the committer failed: {error}") from error
        except self._ray.exceptions.RayError as error:
            old, self._committer = self._committer, self._make_committer()
            with suppress(Exception):  # two committers do no harm
                self._ray.kill(old)
            raise StorageError(
                ErrorKind.WORKER_FAILED,
                f"the committer did not answer ({type(error).__name__}); whether it committed will be found out",
            ) from error

    def close(self) -> None:
        """Kill the actors; shut Ray down if this job started it."""
        self.workers.close()
        if self._committer is not None:
            with suppress(Exception):
                self._ray.kill(self._committer)
        self.close_ray()

    def close_ray(self) -> None:
        """Shut Ray down if this job started it."""
        if self._owns_ray:
            self._owns_ray = False
            self._ray.shutdown()


class _CommitterActor:
    """The committer's shell: the one place a job's commits go through."""

    def __init__(self, store: Store, target: CommitTarget) -> None:
        self._committer = UnitCommitter(store.log, target)

    def commit(self, units: Sequence[WrittenUnit]) -> int:
        """Commit and return the version."""
        return self._committer.commit(units)


class RayPool:
    """Spreads units over the workers that are ready, at most two on each."""

    def __init__(self, ray: Any, workers: Workers, job: Any) -> None:
        self._ray = ray
        self._workers = workers
        self._job = ray.put(job)
        self._tries: dict[Any, tuple[int, Worker]] = {}

    @property
    def capacity(self) -> int:
        """Two units a worker."""
        return IN_FLIGHT_PER_ACTOR * self.n_workers

    @property
    def n_workers(self) -> int:
        """Workers that are ready."""
        return len(self._workers.ready)

    def submit(self, unit: int) -> None:
        """Give the unit to the least loaded worker."""
        self._give(min(self._workers.ready, key=lambda w: w.load), unit)

    def submit_copy(self, unit: int) -> bool:
        """Give a running unit to another worker too."""
        running = {id(worker) for u, worker in self._tries.values() if u == unit}
        others = [w for w in self._workers.ready if id(w) not in running and w.load < IN_FLIGHT_PER_ACTOR]
        if not others:
            return False
        self._give(min(others, key=lambda w: w.load), unit)
        return True

    def wait(self, timeout_s: float) -> Sequence[Completion]:
        """Return the units that ended; one whose worker died ended with an error that may pass."""
        return [self._completion(ref) for ref in self._workers.poll(timeout_s, list(self._tries))]

    def abandon(self) -> None:
        """Nothing: the workers are killed when the backend is closed."""

    def close(self) -> None:
        """Nothing of its own to release."""

    def _give(self, worker: Worker, unit: int) -> None:
        worker.load += 1
        self._tries[worker.actor.run_job_unit.remote(self._job, unit)] = (unit, worker)

    def _completion(self, ref: Any) -> Completion:
        unit, worker = self._tries.pop(ref)
        worker.load -= 1
        exceptions = self._ray.exceptions
        try:
            return Completion(unit, written=remote_value(self._ray, ref))
        except (exceptions.RayActorError, exceptions.NodeDiedError) as error:
            self._workers.lost(worker, error)
            return Completion(unit, error=error, worker_lost=True)
        except (ActstoreError, exceptions.RayError) as error:
            return Completion(unit, error=error)


def import_ray() -> Any:
    """Return the module, with its reports home and its own environments switched off."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Under `uv run` Ray would otherwise build an environment for every worker, from the network.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    return lazy_import(
        "ray", needed_for="ingest on Ray (ray_address=None, or --no-ray, does without)", extra="ingest"
    )


def start_ray(ray: Any, address: str | None) -> bool:
    """Connect to Ray unless this process already is; return whether it is ours to shut down.

    Raises:
        StorageError: there is no cluster, or it does not let this process in.
    """
    if ray.is_initialized():
        return False
    try:
        if address == "local":
            ray.init(address="local", include_dashboard=False, log_to_driver=False)
        else:
            ray.init(address=address, log_to_driver=False)
    except (ConnectionError, RuntimeError, OSError, ValueError) as error:
        raise StorageError(
            ErrorKind.WORKER_FAILED,
            f"cannot reach Ray at {address!r}: {error}. Start a cluster (`ray start --head`), give its address, "
            "or use --ray-address local or --no-ray",
        ) from error
    except ray.exceptions.AuthenticationError as error:
        raise StorageError(
            ErrorKind.WORKER_FAILED,
            f"Ray at {address!r} asks for a token that this process does not have: set RAY_AUTH_MODE=token, and "
            f"RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, to those of the cluster ({error.message})",
        ) from error
    return True


def _has_place(nodes: Sequence[Any], options: Any) -> bool:
    return any(node.get("GPU", 0.0) >= options.get("num_gpus", 0.0) for node in nodes)
