"""How is an index searched whose shards are held by Ray actors, on as many machines as it needs?

    with RayShards(open_indexes(run, hook_point)[0], ray_address="auto", actors=8) as shards:
        run.nearest(hook_point, row, shards=shards)

Every actor opens some shards from the store itself, at the index's version; what travels is queries and bitmaps to the
actors, and the best k rows of each back. Merged they are what one process finds that searches all shards, to the last bit.

An actor that has died, or does not answer in time, is an error that names the rows that were not searched, or, if that was
asked for, makes a partial answer that says so. The next search puts another actor in its place.
"""

import threading
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from actstore._lazy import lazy_import
from actstore.checks import check_whole
from actstore.errors import ActstoreError, ErrorKind, InvalidInputError, StorageError
from actstore.store import open_store
from actstore.vector_index import KIND, VectorIndex

from .answer import check_choice
from .index_search import Found, merge_found, search_shard
from .row_bits import Bits

Float32s: TypeAlias = npt.NDArray[np.float32]
Int64s: TypeAlias = npt.NDArray[np.int64]
OnLost = Literal["error", "partial"]

_CALLS = 4
"""Searches that run in an actor at a time; others wait."""

_NAMED_SHARDS = 4
"""Lost shards that an error names."""

_INLINE_BYTES = 100 << 10
"""What Ray sends with a call; what is larger is stored once for all actors."""


@dataclass(frozen=True, slots=True)
class IndexPlace:
    """Where an actor finds its index; a small value that pickles."""

    url: str
    version: int
    storage_options: Mapping[str, Any] | None = field(repr=False)
    run: str
    index: str

    @classmethod
    def of(cls, index: VectorIndex) -> "IndexPlace":
        """Return where an index is."""
        store = index.run.store
        return cls(store.url, store.version, store.storage_options, index.run.id, index.id)

    def open(self) -> VectorIndex:
        """Return the index, with a store of its own."""
        store = open_store(self.url, version=self.version, storage_options=self.storage_options)
        return VectorIndex(store.run(self.run), store.state.collection(KIND, self.index))


class ShardGroup:
    """Some shards of one index: the plain object that a Ray actor is made of. Several threads may search at once."""

    def __init__(self, place: IndexPlace, numbers: Sequence[int]) -> None:
        """Remember what to open.

        Args:
            place: Where the index is.
            numbers: Of the shards.
        """
        self._place = place
        self._numbers = list(numbers)
        self._index: VectorIndex | None = None
        self._lock = threading.Lock()

    def open(self) -> int:
        """Fetch, check and open the shards' files, so that what is wrong with one shows now; return how many there are."""
        for number in self._numbers:
            shard = self._opened().shards[number]
            if shard.n_indexed:
                shard.open()
        return len(self._numbers)

    def search(
        self, vectors_qd: Float32s, k: int, effort: int, bits: Mapping[int, Bits] | None
    ) -> tuple[Float32s, Int64s]:
        """Return scores and rows of the best `k` vectors of the shards; see `ShardSearcher.search`."""
        shards = [self._opened().shards[n] for n in self._numbers if bits is None or n in bits]
        parts = [
            search_shard(s, vectors_qd, k, effort=effort, bits=None if bits is None else bits[s.number])
            for s in shards
        ]
        found = merge_found(parts, k, n_queries=len(vectors_qd))
        return found.scores, found.rows

    def _opened(self) -> VectorIndex:
        with self._lock:
            if self._index is None:
                self._index = self._place.open()
            return self._index


@dataclass(slots=True, eq=False)
class _Holder:
    """An actor, and the shards that it holds."""

    numbers: tuple[int, ...]
    actor: Any = None
    """None: none yet, or the last one was lost."""

    opening: Any = None
    """The call in which the actor opens its shards, until that has ended."""

    @property
    def is_ready(self) -> bool:
        """Whether the actor can search."""
        return self.actor is not None and self.opening is None


class RayShards:
    """The shards of an index, held by Ray actors; a `ShardSearcher` for `nearest` and `knn_lm`. Close it after use.

    Safe for use from many threads. The actors end with this process, if not before.
    """

    def __init__(
        self,
        index: VectorIndex,
        *,
        ray_address: str = "local",
        actors: int | None = None,
        cpus_per_actor: int = 1,
        on_lost: OnLost = "error",
        timeout_s: float = 60.0,
        start_timeout_s: float = 600.0,
    ) -> None:
        """Start or join Ray, and have actors open all shards.

        Args:
            index: What to search, from `actstore.vector_index.open_indexes`.
            ray_address: The cluster: an address, "auto" for the one of this machine, "local" for a new one that ends with
                `close`. A process that has joined one stays in it.
            actors: How many; None for one per shard. No more than there are shards.
            cpus_per_actor: Processors that each reserves, and the threads that it searches with.
            on_lost: "error": shards that do not answer are a StorageError. "partial": the answer is that of the others; it says
                so, is not exact, and has no recall.
            timeout_s: Seconds for which a search waits for an actor, and for one that takes the place of another.
            start_timeout_s: Seconds for which the first actors may wait for a place and fetch and open their shards.

        Raises:
            InvalidInputError: a bad option, or a store that only this process can see.
            StorageError: the cluster cannot be reached, or has no place for an actor.
            FormatError: a file of the index is missing or damaged.
            MissingDependencyError: Ray or FAISS is not installed.
        """
        check_choice(on_lost, OnLost, what="on_lost")
        n_shards = len(index.shards)
        n = n_shards if actors is None else check_whole(actors, what="actors", least=1)
        cpus = check_whole(cpus_per_actor, what="cpus_per_actor", least=1)
        for name, value in (("timeout_s", timeout_s), ("start_timeout_s", start_timeout_s)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
                raise InvalidInputError(
                    ErrorKind.BAD_ARGUMENT, f"{name} must be a number of seconds above 0, got {value!r:.80}"
                )
        if index.run.store.url.startswith("memory:"):
            raise InvalidInputError(
                ErrorKind.BAD_URL,
                "a memory:// store lives in one process, and actors are others: search it without RayShards",
            )
        self._index = index
        self._place = IndexPlace.of(index)
        self._on_lost = on_lost
        self._timeout_s = float(timeout_s)
        self._cpus = cpus
        backend = lazy_import("actstore.ingest.ray_backend", needed_for="RayShards", extra="ingest")
        self._value = backend.remote_value
        self._ray = ray = backend.import_ray()
        self._owns_ray = backend.start_ray(ray, ray_address)
        self._lock = threading.Lock()
        self._is_closed = False
        dealt = deal_shards([shard.n for shard in index.shards], min(n, n_shards))
        self._holders = [_Holder(numbers) for numbers in dealt if numbers]
        try:
            missing = self._place_actors(float(start_timeout_s))
            if missing:
                raise self._not_placed(missing, start_timeout_s)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RayShards":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def index(self) -> VectorIndex:
        """The generation whose shards these are."""
        return self._index

    @property
    def actors(self) -> dict[tuple[int, ...], Any]:
        """The actors that can search now, by the numbers of the shards that each holds."""
        return {holder.numbers: holder.actor for holder in self._holders if holder.is_ready}

    def search(
        self, vectors_qd: Float32s, k: int, *, effort: int, bits: Mapping[int, Bits] | None = None
    ) -> Found:
        """Return the best `k` vectors of all shards; see `ShardSearcher.search`.

        Raises:
            StorageError: shards did not answer, unless a partial answer was asked for.
            FormatError: an actor found a file of the index missing or damaged.
        """
        if self._is_closed:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"the shards of index {self._index.id!r} were closed: make other RayShards",
            )
        missing = self._place_actors(self._timeout_s)
        vectors = self._ray.put(vectors_qd) if vectors_qd.nbytes > _INLINE_BYTES else vectors_qd
        calls = {}
        for holder in self._holders:
            own = None if bits is None else {n: bits[n] for n in holder.numbers if n in bits}
            if own == {}:
                missing.pop(holder, None)  # nothing is asked of its shards
            elif holder not in missing:
                actor = holder.actor
                if actor is None:  # another thread has just given it up
                    missing[holder] = self._ray.exceptions.RayError("its actor was lost in another search")
                else:
                    calls[actor.search.remote(vectors, k, effort, own)] = holder, actor
        if calls:
            self._ray.wait(list(calls), num_returns=len(calls), timeout=self._timeout_s)
        parts = []
        for ref, (holder, actor) in calls.items():
            try:
                parts.append(self._value(self._ray, ref, timeout_s=0))
            except self._ray.exceptions.RayError as error:
                missing[holder] = error
                self._drop(holder, actor)
        lost = tuple(sorted(n for holder in missing for n in holder.numbers if bits is None or n in bits))
        if lost and self._on_lost == "error":
            raise self._lost_error(lost, next(iter(missing.values())))
        return merge_found(parts, k, n_queries=len(vectors_qd), lost=lost)

    def close(self) -> None:
        """End the actors, and Ray if this object started it."""
        with self._lock:
            self._is_closed = True
            for holder in self._holders:
                if holder.actor is not None:
                    with suppress(Exception):  # the cluster itself may be gone
                        self._ray.kill(holder.actor)
                holder.actor = holder.opening = None
            if self._owns_ray:
                self._owns_ray = False
                self._ray.shutdown()

    def _place_actors(self, timeout_s: float) -> "dict[_Holder, BaseException]":
        """Make actors for shards that none holds, and wait until they have opened them; return who could not, and why.

        One that takes longer stays, to be waited for next time.
        """
        if all(holder.is_ready for holder in self._holders):
            return {}
        missing: dict[_Holder, BaseException] = {}
        with self._lock:
            for i, holder in enumerate(self._holders):
                if holder.actor is None:
                    holder.actor = self._make_actor(i, holder.numbers)
                    holder.opening = holder.actor.open.remote()
            opening = [holder for holder in self._holders if holder.opening is not None]
            if opening:
                refs = [holder.opening for holder in opening]
                self._ray.wait(refs, num_returns=len(refs), timeout=timeout_s)
            for holder in opening:
                try:
                    self._value(self._ray, holder.opening, timeout_s=0)
                except self._ray.exceptions.GetTimeoutError as error:
                    missing[holder] = error
                except (ActstoreError, self._ray.exceptions.RayError) as error:
                    missing[holder] = error
                    with suppress(Exception):
                        self._ray.kill(holder.actor)
                    holder.actor = holder.opening = None
                else:
                    holder.opening = None
        ours = [error for error in missing.values() if isinstance(error, ActstoreError)]
        if ours:
            raise ours[0]
        return missing

    def _make_actor(self, i: int, numbers: tuple[int, ...]) -> Any:
        remote = self._ray.remote(ShardGroup).options(
            name=f"actstore-shards:{self._index.id}:{i}:{uuid.uuid4().hex[:8]}",
            num_cpus=self._cpus,
            max_concurrency=_CALLS,
            max_restarts=0,
            max_task_retries=0,
        )
        return remote.remote(self._place, numbers)

    def _drop(self, holder: _Holder, actor: Any) -> None:
        """Give up an actor that did not answer, unless another thread has put one in its place."""
        with self._lock:
            if holder.actor is actor:
                holder.actor = holder.opening = None
        with suppress(Exception):  # one that hangs would keep its processors
            self._ray.kill(actor)

    def _not_placed(self, missing: Mapping[_Holder, BaseException], timeout_s: float) -> StorageError:
        placement = lazy_import("actstore.ingest.placement", needed_for="RayShards", extra="ingest")
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        cause = next(iter(missing.values()))
        error = StorageError(
            ErrorKind.WORKER_FAILED,
            f"{len(missing)} of {len(self._holders)} actors of {self._cpus} CPUs did not open their shards of index "
            f"{self._index.id!r} within {timeout_s:g} s ({type(cause).__name__}); the cluster has "
            f"{placement.cluster_summary(nodes)}: ask for fewer actors or CPUs, or add nodes",
        )
        error.__cause__ = cause
        return error

    def _lost_error(self, lost: Sequence[int], cause: BaseException) -> StorageError:
        index = self._index
        n_rows = sum(index.shards[n].n for n in lost)
        what = "units" if index.of == "tokens" else "documents"
        held = "; ".join(
            f"shard {n} of {what} "
            + ", ".join(f"{first} to {stop - 1}" for first, stop in index.unit_ranges[n])
            for n in lost[:_NAMED_SHARDS]
        )
        more = f"; and {len(lost) - _NAMED_SHARDS} more" if len(lost) > _NAMED_SHARDS else ""
        error = StorageError(
            ErrorKind.WORKER_FAILED,
            f"{len(lost)} of {len(index.shards)} shards of index {index.id!r} did not answer ({type(cause).__name__}), and "
            f"{n_rows} {'rows' if index.of == 'tokens' else 'documents'} were not searched ({held}{more}): ask again, other "
            "actors will open them, or make RayShards with on_lost='partial' for what the others find",
        )
        error.__cause__ = cause
        return error


def deal_shards(sizes: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """Return the numbers of the shards of each of `n` actors, so that none has many more rows than another.

    >>> deal_shards([5, 9, 4, 4], 2)
    [(1, 3), (0, 2)]
    """
    loads = [0] * n
    dealt: list[list[int]] = [[] for _ in range(n)]
    for number in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        least = loads.index(min(loads))
        dealt[least].append(number)
        loads[least] += sizes[number]
    return [tuple(sorted(numbers)) for numbers in dealt]
