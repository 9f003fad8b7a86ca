"""Where do the model and the committer of a job live: in this process, or in Ray actors?

Both backends answer the same four questions, so the job itself (`job.py`) knows nothing of Ray. A Ray actor here is a
shell: all it does is call the plain object of the same name.
"""

import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Protocol

from actstore._lazy import lazy_import
from actstore.errors import ActstoreError, ErrorKind, InvalidInputError, StorageError
from actstore.store import Store

from .committer import Committer
from .config import IngestConfig
from .host import Job, ModelDescription, ModelHost
from .local_pool import LocalPool
from .scheduler import Completion, Pool
from .unit import RunPlan, WrittenUnit

_IN_FLIGHT_PER_ACTOR = 2
"""One unit is computed while another is written; more would only hold memory."""


class Backend(Protocol):
    """What a job needs from where it runs."""

    def describe(self) -> ModelDescription:
        """Load the model and say what it is and which of the asked hook points it has."""

    def call(self, method: str, *args: Any) -> Any:
        """Return what `method` of one worker's host returns: for probes and checks, which one worker does."""

    def start(self, store: Store, plan: RunPlan) -> Pool:
        """Return the workers, ready for units of this run."""

    def commit(self, units: Sequence[WrittenUnit]) -> None:
        """Commit written units of the run that was started."""

    def close(self) -> None:
        """Release the workers and whatever was started for the job."""


class LocalBackend:
    """Everything in this process."""

    def __init__(self, config: IngestConfig) -> None:
        self._host = ModelHost(config, threads=None)
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
        self._pool = LocalPool(lambda unit: self._host.run_unit(store, plan, unit))
        return self._pool

    def commit(self, units: Sequence[WrittenUnit]) -> None:
        """Commit from the calling thread."""
        assert self._committer is not None
        self._committer.commit(units)

    def close(self) -> None:
        """Wait for the units that are running."""
        if self._pool is not None:
            self._pool.close()


class RayBackend:
    """One actor per worker, each with its own copy of the model, and one committer actor.

    Activations never enter Ray's object store: an actor writes its shards itself and returns a few hundred bytes.
    """

    def __init__(self, config: IngestConfig, store: Store, *, host: type[Any] = ModelHost) -> None:
        """Start or join Ray and create the actors.

        Args:
            config: The ingest.
            store: Where it goes.
            host: Class of what an actor holds, made as `host(config, threads=...)`; has the methods of `ModelHost`.

        Raises:
            StorageError: the cluster cannot be reached.
            InvalidInputError: a store that only this process can see.
        """
        if store.url.startswith("memory:"):
            raise InvalidInputError(
                ErrorKind.BAD_URL,
                "a memory:// store lives in one process: ingest into it with ray_address=None",
            )
        self._ray = _import_ray()
        self._config = config
        self._owns_ray = _start_ray(self._ray, config.ray_address)
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        options = actor_options(nodes, workers=config.workers, device=config.device)
        threads = max(1, int(options["num_cpus"]))
        remote = self._ray.remote(host).options(
            max_concurrency=_IN_FLIGHT_PER_ACTOR, max_restarts=-1, max_task_retries=0, **options
        )
        self._actors = [remote.remote(config, threads=threads) for _ in range(config.workers)]
        self._committer: Any = None

    def describe(self) -> ModelDescription:
        """Have the first actor load the model; the others load it meanwhile."""
        refs = [actor.describe.remote() for actor in self._actors]
        descriptions: list[ModelDescription] = [_get(self._ray, ref) for ref in refs]
        for other in descriptions[1:]:
            if other != descriptions[0]:
                raise InvalidInputError(
                    ErrorKind.BAD_MODEL,
                    f"two workers loaded or compute {self._config.model!r} differently: {descriptions[0]} and {other}; pin "
                    "a revision, or use one shared folder, and workers of one kind",
                )
        return descriptions[0]

    def call(self, method: str, *args: Any) -> Any:
        """Call the first actor."""
        return _get(self._ray, getattr(self._actors[0], method).remote(*args))

    def start(self, store: Store, plan: RunPlan) -> Pool:
        """Return the actors."""
        # Committing is idempotent, so Ray may run a call again when the actor died in it.
        remote = self._ray.remote(_CommitterActor).options(num_cpus=0, max_restarts=-1, max_task_retries=3)
        self._committer = remote.remote(store, plan)
        return RayPool(self._ray, self._actors, store, plan)

    def commit(self, units: Sequence[WrittenUnit]) -> None:
        """Commit through the committer actor."""
        _get(self._ray, self._committer.commit.remote(list(units)))

    def close(self) -> None:
        """Kill the actors; shut Ray down if this job started it."""
        for actor in [*self._actors, *([self._committer] if self._committer else [])]:
            self._ray.kill(actor)
        if self._owns_ray:
            self._ray.shutdown()


class _CommitterActor:
    """The committer's shell: the one place a job's commits go through."""

    def __init__(self, store: Store, plan: RunPlan) -> None:
        self._committer = Committer(store.log, store.objects, plan)

    def commit(self, units: Sequence[WrittenUnit]) -> int:
        """Commit and return the version."""
        return self._committer.commit(units)


class RayPool:
    """Spreads units over actors, at most two on each."""

    def __init__(self, ray: Any, actors: Sequence[Any], store: Store, plan: RunPlan) -> None:
        self._ray = ray
        self._actors = actors
        self._job = ray.put(Job(store.url, store.version, store.storage_options, plan))
        self._load = [0] * len(actors)
        self._refs: dict[Any, tuple[int, int]] = {}

    @property
    def capacity(self) -> int:
        """Two units an actor."""
        return _IN_FLIGHT_PER_ACTOR * len(self._actors)

    def submit(self, unit: int) -> None:
        """Give the unit to the least loaded actor."""
        index = min(range(len(self._actors)), key=self._load.__getitem__)
        self._load[index] += 1
        self._refs[self._actors[index].run_job_unit.remote(self._job, unit)] = (unit, index)

    def wait(self, timeout_s: float) -> Sequence[Completion]:
        """Return the units that ended; one whose actor died ended with an error that may pass."""
        if not self._refs:
            return []
        ready, _ = self._ray.wait(list(self._refs), num_returns=1, timeout=timeout_s)
        completions = []
        for ref in ready:
            unit, index = self._refs.pop(ref)
            self._load[index] -= 1
            try:
                completions.append(Completion(unit, written=_get(self._ray, ref)))
            except (ActstoreError, self._ray.exceptions.RayError) as error:
                completions.append(Completion(unit, error=error))
        return completions

    def close(self) -> None:
        """Nothing of its own to release."""


def open_backend(config: IngestConfig, store: Store) -> Backend:
    """Return the backend that `config.ray_address` asks for."""
    return LocalBackend(config) if config.ray_address is None else RayBackend(config, store)


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Under `uv run` Ray would otherwise build an environment for every worker, from the network.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    return lazy_import(
        "ray", needed_for="ingest on Ray (ray_address=None, or --no-ray, does without)", extra="ingest"
    )


def _start_ray(ray: Any, address: str | None) -> bool:
    """Connect to Ray unless this process already is; return whether it is ours to shut down."""
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
    return True


def actor_options(nodes: Sequence[Mapping[str, float]], *, workers: int, device: str) -> dict[str, float]:
    """Return what each worker reserves: as much as lets all of them run at once, each on one node.

    An actor that fits on no node would wait for ever. With GPUs, workers go where the GPUs are, each to one GPU or a share
    of it.

    Args:
        nodes: Resources of every node, as Ray names them.
        workers: Actors to place.
        device: Of the ingest; GPUs are used for `auto` and `cuda`.

    >>> actor_options([{"CPU": 4.0}, {"CPU": 4.0}], workers=1, device="auto")
    {'num_cpus': 4.0}
    >>> actor_options([{"CPU": 8.0, "GPU": 3.0}], workers=4, device="auto")
    {'num_cpus': 2.0, 'num_gpus': 0.5}
    """
    with_gpu = [n for n in nodes if n.get("GPU", 0.0) >= 1] if device in ("auto", "cuda") else []
    slots = [workers] * len(nodes)
    options = {}
    if with_gpu:
        nodes = with_gpu
        share = next(s for s in _shares(1, workers) if sum(_fitting(n, "GPU", s) for n in nodes) >= workers)
        slots = [_fitting(n, "GPU", share) for n in nodes]
        options["num_gpus"] = _rounded(share)
    most = max((int(n.get("CPU", 0.0)) for n in nodes), default=0)
    if not most:
        return {"num_cpus": 1.0, **options}  # no node that may work yet: an autoscaler answers to this
    for share in _shares(most, workers):
        if sum(min(_fitting(n, "CPU", share), s) for n, s in zip(nodes, slots, strict=True)) >= workers:
            return {"num_cpus": _rounded(share), **options}
    return {"num_cpus": 0.0, **options}


def _shares(most: int, workers: int) -> list[Fraction]:
    """Return the amounts that a worker might get, largest first: whole ones, then parts of one."""
    return [*map(Fraction, range(most, 0, -1)), *(Fraction(1, n) for n in range(2, workers + 1))]


def _fitting(node: Mapping[str, float], resource: str, share: Fraction) -> int:
    return int(Fraction(node.get(resource, 0.0)) / share)


def _rounded(share: Fraction) -> float:
    """Ray counts in ten-thousandths: rounded down, or the last worker would find no place."""
    return int(share * 10_000) / 10_000


def _get(ray: Any, ref: Any) -> Any:
    """Return a remote call's value, raising the error of ours that it raised, not Ray's wrapping of it."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ActstoreError):
            raise error.cause from error
        raise
