"""How do finished units become part of the store, exactly once and in few commits?

One `Committer` per job batches written units into manifests. It holds no truth: whatever it has not acknowledged is simply
committed again, by it or its successor, and units that are live already are dropped by the log. An older job that was
thought dead is fenced off by its epoch (FORMAT.md, section 5).
"""

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from actstore.codec.metadata import zarr_json
from actstore.errors import ConflictError, ErrorKind, StorageError
from actstore.log import CommitLog
from actstore.log.values import Action, Add, Collection, Fence, Seal, StoredObject
from actstore.names import hook_point_folder
from actstore.objects import ObjectReader
from actstore.stats import HookPointStats, is_stats_key, merge_stats, stats_from_table, stats_to_table
from actstore.storage import write_new

from .unit import RunPlan, WrittenUnit, parquet_bytes

KIND = "run"
_FENCE_TRIES = 10


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
        plan = self.plan
        adds: list[Action] = [
            Add(
                kind=KIND,
                id=plan.run,
                epoch=plan.epoch,
                fingerprint=plan.fingerprint,
                unit=unit.unit,
                rows=unit.rows,
                nonfinite=unit.nonfinite,
                attempt=unit.attempt,
                objects=unit.objects,
                meta=unit.meta,
            )
            for unit in units
        ]
        return self.log.commit(adds, txn=uuid.uuid4().hex).version

    def seal(self, *, n_units: int) -> int:
        """Declare the run complete: write each hook point's `zarr.json` and the run's statistics, then commit.

        Idempotent; a run that is sealed already stays as it is.

        Raises:
            ConflictError: units are missing, or a newer job has fenced this one off.
            FormatError: a unit's statistics are missing or damaged.
            StorageError: the storage failed; nothing is lost, seal again.
        """
        state = self.log.latest()
        run = state.collection(KIND, self.plan.run)
        if run.is_sealed:
            return state.version
        if len(run.units) != n_units:
            raise ConflictError(
                ErrorKind.COUNT_DIFFERS,
                f"cannot seal run {self.plan.run!r} with {len(run.units)} of its {n_units} units: run the same ingest again "
                "to compute the rest",
            )
        objects = [*self._write_array_metadata(n_units), self._write_stats(run)]
        seal = Seal(
            kind=KIND,
            id=self.plan.run,
            epoch=self.plan.epoch,
            units=len(run.units),
            rows=run.rows,
            objects=tuple(objects),
            meta={"nonfinite": run.nonfinite},
        )
        return self.log.commit([seal], txn=uuid.uuid4().hex).version

    def _write_array_metadata(self, n_units: int) -> Iterable[StoredObject]:
        for name, spec in self.plan.specs.items():
            attributes = {"run": self.plan.run, "hook_point": name, "fingerprint": self.plan.fingerprint}
            n_shards = n_units * (self.plan.rows_per_unit // spec.rows_per_shard)
            data = zarr_json(spec, n_shards=n_shards, attributes=attributes)
            key = f"runs/{self.plan.run}/{hook_point_folder(name)}/zarr.json"
            yield write_new(self.log.storage, key, [data])

    def _write_stats(self, run: Collection) -> StoredObject:
        totals: dict[str, HookPointStats] = {}
        for u in sorted(run.units):
            obj = next(o for o in run.units[u].objects if is_stats_key(self.plan.run, o.key))
            for name, stats in stats_from_table(self.objects.table(obj)).items():
                totals[name] = merge_stats(totals[name], stats) if name in totals else stats
        table = stats_to_table(totals[name] for name in self.plan.specs)
        key = f"runs/{self.plan.run}/stats/all-{uuid.uuid4().hex}.parquet"
        return write_new(self.log.storage, key, [parquet_bytes(table)])


def take_over(log: CommitLog, run: str) -> int:
    """Give the run a new epoch, so that no earlier job can commit to it any more, and return the epoch.

    Raises:
        ConflictError: other jobs keep doing the same.
    """
    for _ in range(_FENCE_TRIES):
        epoch = log.latest().collection(KIND, run).epoch + 1
        try:
            log.commit([Fence(kind=KIND, id=run, epoch=epoch)], txn=uuid.uuid4().hex)
        except ConflictError as error:
            if error.kind is not ErrorKind.FENCED:
                raise
        else:
            return epoch
    raise StorageError(
        ErrorKind.STORAGE_FAILED,
        f"run {run!r} was taken over by other jobs {_FENCE_TRIES} times in a row: stop the other ingest jobs of it",
    )
