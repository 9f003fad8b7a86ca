"""Would the checks notice if the log were wrong? Each planted bug must be caught by the checks that the real client passes."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence

import pytest

from actstore.errors import ConflictError, ErrorKind, StorageError
from actstore.log import CommitLog, State
from actstore.log.fold import Fold
from actstore.log.manifest import manifest_key
from actstore.log.values import Add, Seal, StoredObject
from actstore.storage import PutOutcome, Storage
from actstore.storage.base import Buffer
from actstore.testing.faults import FaultStorage
from tests.log import harness
from tests.log.harness import Client


class Log(CommitLog):
    """The real log with the settings of the harness, for bugs to be planted in."""

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage, sleep=lambda seconds: None, checkpoint_every=2)


class Through(FaultStorage):
    """A storage that passes everything through, for bugs to be planted in."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner, {})


class SkipsReadBack(Log):
    def _publish(self, version: int, body: bytes) -> bool:
        return self.storage.put_new(manifest_key(version), [body]) is not PutOutcome.EXISTS


class TakesExistsForLoss(Log):
    def _publish(self, version: int, body: bytes) -> bool:
        for _ in range(3):
            outcome = self.storage.put_new(manifest_key(version), [body])
            if outcome is PutOutcome.CREATED:
                return True
            if outcome is PutOutcome.EXISTS:
                raise ConflictError(ErrorKind.COMMIT_CONTENTION, "another writer was first")
        raise StorageError(ErrorKind.OUTCOME_UNKNOWN, "no answer")


class TakesUnknownForFailure(Log):
    def _publish(self, version: int, body: bytes) -> bool:
        outcome = self.storage.put_new(manifest_key(version), [body])
        if outcome is PutOutcome.UNKNOWN:
            raise StorageError(ErrorKind.STORAGE_FAILED, "not committed")
        return outcome is PutOutcome.CREATED


class OverwritesTakenVersion(Through):
    def put_new(self, key: str, data: Sequence[Buffer]) -> PutOutcome:
        outcome = super().put_new(key, data)
        if outcome is PutOutcome.EXISTS and key.startswith("manifests/"):
            self.delete(key)
            return super().put_new(key, data)
        return outcome


class CollectsOldManifests(Log):
    def _after_commit(self, position: object) -> None:
        super()._after_commit(position)  # type: ignore[arg-type]
        version = self.latest().version
        if version > 2:
            self.storage.delete(manifest_key(version - 2))


class KeepsLastAttempt(Fold):
    def _add(self, action: Add) -> bool:
        if not super()._add(action):
            change = self._change(action.kind, action.id)
            rows = change.base.units[action.unit].rows
            change.base = change.base.__class__(
                **{
                    n: getattr(change.base, n)
                    for n in change.base.__dataclass_fields__
                    if n not in ("units", "rows")
                },
                units={k: v for k, v in change.base.units.items() if k != action.unit},
                rows=change.base.rows - rows,
            )
            return super()._add(action)
        return True


class ChecksNoTombs(Fold):
    def _check_not_tombstoned(self, objects: object, what: str) -> None:
        pass


class ChecksNoEpoch(Fold):
    def _check_epoch(self, action: Add | Seal, change: object) -> None:
        pass


class AcceptsTrailingBytes(Through):
    """What a reader that stops at the end of the second line would see."""

    def get(self, key: str) -> bytes | None:
        data = super().get(key)
        if data is None or not key.startswith("manifests/"):
            return data
        return b"".join(line + b"\n" for line in data.split(b"\n")[:2])


class CachesWhatItRead(Through):
    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self._seen: dict[str, bytes | None] = {}

    def get(self, key: str) -> bytes | None:
        if key not in self._seen:
            self._seen[key] = super().get(key)
        return self._seen[key]


class IgnoresHint(Through):
    def get(self, key: str) -> bytes | None:
        return None if key == "_hint" else super().get(key)


class VerifiesNothing(Log):
    def _verify(self, actions: object, verified: set[StoredObject]) -> None:
        pass


class ForgetsTransactions(Log):
    def _latest(self):  # type: ignore[no-untyped-def]
        import dataclasses

        from actstore.log.txns import RecentTxns

        position = super()._latest()
        return dataclasses.replace(position, state=dataclasses.replace(position.state, txns=RecentTxns()))


class AcknowledgesBeforeItPublishes(Log):
    def _publish(self, version: int, body: bytes) -> bool:
        with contextlib.suppress(StorageError):
            super()._publish(version, body)
        return True


def _with_fold(fold: type[Fold]) -> type[CommitLog]:
    class Planted(Log):
        def _fold(self, state: State) -> Fold:
            return fold(state)

    return Planted


_same_attempt = itertools.repeat("0" * 32)

BUGS = [
    Client("skips the read-back", log=SkipsReadBack),
    Client("takes a 412 for a loss", log=TakesExistsForLoss),
    Client("takes an unknown outcome for a failure", log=TakesUnknownForFailure),
    Client("overwrites on retry", wrap=OverwritesTakenVersion),
    Client("collects manifests", log=CollectsOldManifests),
    Client("last attempt wins", log=_with_fold(KeepsLastAttempt)),
    Client("skips the tombstone check", log=_with_fold(ChecksNoTombs)),
    Client("ignores the epoch", log=_with_fold(ChecksNoEpoch)),
    Client("accepts trailing bytes", wrap=AcceptsTrailingBytes),
    Client("reuses the attempt id", attempt=lambda: next(_same_attempt)),
    Client("caches what it read", wrap=CachesWhatItRead),
    Client("drops the hint alarm", wrap=IgnoresHint),
    Client("publishes before the data", log=VerifiesNothing, publish_first=True),
    Client("removes its objects when unsure", drop_on_unknown=True),
    Client("forgets its transactions", log=ForgetsTransactions),
    Client("acknowledges before it publishes", log=AcknowledgesBeforeItPublishes),
]


def violations(client: Client) -> Iterator[str]:
    for check in harness.ALL_CHECKS:
        yield from check(client)


@pytest.mark.parametrize("client", BUGS, ids=lambda client: client.name.replace(" ", "-"))
def test_planted_bug_is_caught(client: Client) -> None:
    caught = next(violations(client), None)
    print(f"{client.name}: {caught}")
    assert caught is not None


def test_real_client_passes_the_same_checks() -> None:
    assert list(violations(Client())) == []
