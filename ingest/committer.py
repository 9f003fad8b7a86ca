"""How do finished units become part of the store, exactly once and in few commits?

One `Committer` per job batches written units into manifests. It holds no truth: whatever it has not acknowledged is simply
committed again, by it or its successor, and units that are live already are dropped by the log. An older job that was
thought dead is fenced off by its epoch (FORMAT.md, section 5).
"""

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actstore.covariance import covariance_key, is_covariance_key, merge_covariances
from actstore.errors import ConflictError, ErrorKind, StorageError
from actstore.log import CommitLog
from actstore.log.values import Action, Add, Collection, Fence, Seal, StoredObject
from actstore.names import hook_point_folder
from actstore.objects import ObjectReader
from actstore.stats import empty_stats, is_stats_key, merge_stats, stats_from_table, stats_to_table
from actstore.storage import write_new

from .seal_objects import PooledMerge, write_array_metadata
from .unit import RunPlan, WrittenUnit, parquet_bytes

KIND = "run"
_FENCE_TRIES = 10


@dataclass(frozen=True, slots=True)
class CommitTarget:
    """The collection whose units a job commits, and at which epoch; pickles."""

    kind: str
    id: str
    fingerprint: str
    epoch: int


@dataclass(frozen=True, slots=True)
class UnitCommitter:
    """Commits the units of one collection of any kind at one epoch."""

    log: CommitLog
    target: CommitTarget

    def commit(self, units: Sequence[WrittenUnit]) -> int:
        """Make the units, and what they bring for other collections, live in one version, and return it.

        Units that are live already stay as they are.

        Raises:
            ConflictError: a newer job has fenced this one off, or tombstoned an object.
            StorageError: the storage failed; nothing is lost, commit again.
        """
        target = self.target
        adds: list[Action] = []
        for unit in units:
            own = Add(
                kind=target.kind,
                id=target.id,
                epoch=target.epoch,
                fingerprint=target.fingerprint,
                unit=unit.unit,
                rows=unit.rows,
                nonfinite=unit.nonfinite,
                attempt=unit.attempt,
                objects=unit.objects,
                meta=unit.meta,
            )
            adds += [own, *unit.also]
        return self.log.commit(adds, txn=uuid.uuid4().hex).version


@dataclass(slots=True)
class Committer:
    """Commits the units of one run at one epoch."""

    log: CommitLog
    objects: ObjectReader
    plan: RunPlan

    def commit(self, units: Sequence[WrittenUnit]) -> int:
        """Make the units live and return the version; those that are live already stay as they are.

        Raises:
            ConflictError: a newer job has fenced this one off, or tombstoned an object.
            StorageError: the storage failed; nothing is lost, commit again.
        """
        return UnitCommitter(self.log, commit_target(self.plan)).commit(units)

    def seal(
        self,
        *,
        n_units: int,
        quarantined: Mapping[int, str] | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> int:
        """Declare the run complete: write what belongs to the whole of it, then commit.

        That is each hook point's `zarr.json` (if dense rows are kept), the run's statistics, and the merged vectors of documents
        that lie in several units. Idempotent; a run that is sealed already stays as it is. Reads the small objects of one unit at
        a time.

        Args:
            n_units: Units of the tokenization.
            quarantined: Those that are left out for good, each with the reason.
            meta: What else the seal is to say of the run; JSON values.

        Raises:
            ConflictError: units are missing that are not quarantined, or a newer job has fenced this one off.
            FormatError: a unit's statistics or pooled vectors are missing or damaged.
            StorageError: the storage failed; nothing is lost, seal again.
        """
        state = self.log.latest()
        run = state.collection(KIND, self.plan.run)
        if run.is_sealed:
            return state.version
        left_out = {u: reason for u, reason in sorted((quarantined or {}).items()) if u not in run.units}
        if len(run.units) + len(left_out) != n_units:
            besides = f", besides {len(left_out)} that are left out," if left_out else ""
            raise ConflictError(
                ErrorKind.COUNT_DIFFERS,
                f"cannot seal run {self.plan.run!r} with {len(run.units)} of its {n_units} units{besides}: run the same ingest "
                "again to compute the rest",
            )
        objects = list(self._write_array_metadata(n_units, sorted(left_out)))
        objects.append(self._write_stats(run))
        objects += self._write_covariances(run)
        said: dict[str, Any] = {**(meta or {}), "nonfinite": run.nonfinite}
        if left_out:
            said["quarantined"] = {str(u): reason for u, reason in left_out.items()}
        if "pooled" in self.plan.keep:
            tokenization = state.collection("tokenization", self.plan.tokenization)
            units = [tokenization.units[u] for u in sorted(tokenization.units)]
            merged = PooledMerge(self.log.storage, self.objects, self.plan)
            objects += merged.write(run, units)
            said["pooled"] = {"documents": merged.n_documents, "incomplete": merged.n_incomplete}
        seal = Seal(
            kind=KIND,
            id=self.plan.run,
            epoch=self.plan.epoch,
            units=len(run.units),
            rows=run.rows,
            objects=tuple(objects),
            meta=said,
        )
        return self.log.commit([seal], txn=uuid.uuid4().hex).version

    def _write_array_metadata(self, n_units: int, left_out: Sequence[int]) -> Iterable[StoredObject]:
        for name, spec in self.plan.specs.items() if "dense" in self.plan.keep else ():
            attributes = {"run": self.plan.run, "hook_point": name, "fingerprint": self.plan.fingerprint}
            key = f"runs/{self.plan.run}/{hook_point_folder(name)}/zarr.json"
            n_shards = n_units * self.plan.shards_per_unit(name)
            yield write_array_metadata(
                self.log.storage, key, spec, n_shards=n_shards, attributes=attributes, left_out=left_out
            )

    def _write_stats(self, run: Collection) -> StoredObject:
        totals = {name: empty_stats(name, spec.d_model) for name, spec in self.plan.specs.items()}
        for u in sorted(run.units):
            obj = next(o for o in run.units[u].objects if is_stats_key(self.plan.run, o.key))
            for name, stats in stats_from_table(self.objects.table(obj), list(totals)).items():
                totals[name] = merge_stats(totals[name], stats)
        table = stats_to_table(totals.values())
        key = f"runs/{self.plan.run}/stats/all-{uuid.uuid4().hex}.parquet"
        return write_new(self.log.storage, key, [parquet_bytes(table)])

    def _write_covariances(self, run: Collection) -> Iterable[StoredObject]:
        if not self.plan.covariance:
            return
        for name in self.plan.specs:
            found = (o for u in sorted(run.units) for o in run.units[u].objects)
            parts = [o for o in found if is_covariance_key(self.plan.run, name, o.key)]
            if parts:
                merged = merge_covariances(self.objects.read(o) for o in parts)
                key = covariance_key(self.plan.run, name, f"all-{uuid.uuid4().hex}")
                yield write_new(self.log.storage, key, [merged])


def commit_target(plan: RunPlan) -> CommitTarget:
    """Return the collection that a run's units go to."""
    return CommitTarget(kind=KIND, id=plan.run, fingerprint=plan.fingerprint, epoch=plan.epoch)


def take_over(log: CommitLog, id: str, *, kind: str = KIND) -> int:
    """Give the collection a new epoch, so that no earlier job can commit to it any more, and return the epoch.

    Raises:
        StorageError: other jobs keep doing the same.
    """
    return take_over_together(log, [(kind, id)])[0]


def take_over_together(log: CommitLog, collections: Sequence[tuple[str, str]]) -> list[int]:
    """Do the same with collections, by kind and id, whose units are committed together, and return their epochs.

    All are fenced in one commit: of two jobs that do this at once one comes last for all of them, and can go on. Fenced one after
    the other, each job could shut the other out of another collection, and neither could commit.

    Raises:
        StorageError: other jobs keep doing the same.
    """
    for _ in range(_FENCE_TRIES):
        state = log.latest()
        fences = [Fence(kind, id, state.collection(kind, id).epoch + 1) for kind, id in collections]
        try:
            log.commit(fences, txn=uuid.uuid4().hex)
        except ConflictError as error:
            if error.kind is not ErrorKind.FENCED:
                raise
        else:
            return [fence.epoch for fence in fences]
    kind, id = collections[0]
    raise StorageError(
        ErrorKind.STORAGE_FAILED,
        f"{kind} {id!r} was taken over by other jobs {_FENCE_TRIES} times in a row: stop the other jobs of it",
    )
