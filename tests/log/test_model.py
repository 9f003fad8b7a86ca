"""Does the log behave like a dictionary, whatever two clients, reopening, faults and lost checkpoints do to it?"""

import contextlib
import uuid

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from actstore.errors import ConflictError, ErrorKind, InvalidInputError, NotFoundError, StorageError
from actstore.log import CommitLog, fingerprint, fsck
from actstore.log.values import Add, Create, Fence, Seal, StoredObject, Tomb
from actstore.testing.faults import Fault, FaultStorage, Killed
from tests.log.harness import fresh_memory, new_log

clients = st.integers(0, 1)
names = st.sampled_from(["a", "b"])
unit_numbers = st.integers(0, 5)


class LogMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.storage = fresh_memory()
        self.faulty = [FaultStorage(self.storage, {}) for _ in range(2)]
        self.logs = [new_log(storage) for storage in self.faulty]
        new_log(self.storage).create()
        # The model: id to (config, epoch, {unit: (attempt, rows, version)}, sealed); and what each version was.
        self.model = {}
        self.tombs = set()
        self.version = 0
        self.past = {0: {}}
        self.last = {}

    def note(self):
        self.version += 1
        self.past[self.version] = {
            n: (c["epoch"], dict(c["units"]), c["sealed"]) for n, c in self.model.items()
        }

    def commit(self, client, actions, *, txn=None, expect=None):
        """Commit, and compare the answer with what the model says: an error kind, or None for success."""
        txn = txn or uuid.uuid4().hex
        try:
            done = self.logs[client].commit(actions, txn=txn)
        except (ConflictError, NotFoundError, InvalidInputError) as error:
            if error.kind is not expect:
                raise
            return None
        assert expect is None
        if len(done.dropped) < len(
            actions
        ):  # otherwise no version was made, and the transaction is not known
            self.last[client] = (actions, txn, done)
        return done

    @rule(client=clients, name=names, size=st.integers(0, 1))
    def create(self, client, name, size):
        config = {"size": size}
        known = self.model.get(name)
        if known is not None:
            same = known["config"] == config
            expect = ErrorKind.ALREADY_EXISTS if same else ErrorKind.CONFIG_DIFFERS
            self.commit(client, [Create("run", name, config, {})], expect=expect)
            return
        self.model[name] = {"config": config, "epoch": 0, "units": {}, "sealed": False}
        done = self.commit(client, [Create("run", name, config, {})])
        self.note()
        assert done.version == self.version

    def add_action(self, name, unit, epoch, rows):
        attempt = uuid.uuid4().hex
        key = f"runs/{name}/{unit}-{attempt}"
        self.storage.put_new(key, [b"12345"])
        config = self.model[name]["config"] if name in self.model else {}
        return Add(
            "run",
            name,
            epoch,
            fingerprint(config),
            unit,
            rows,
            0,
            attempt,
            (StoredObject(key, 5, "0" * 64),),
            {},
        )

    @rule(
        client=clients,
        name=names,
        units=st.lists(unit_numbers, min_size=1, max_size=3),
        behind=st.integers(0, 1),
    )
    def add(self, client, name, units, behind):
        known = self.model.get(name)
        epoch = max(0, known["epoch"] - behind) if known else 0
        actions = [self.add_action(name, unit, epoch, rows=10 + unit) for unit in units]
        fresh, dropped = {}, []
        for action in actions:
            if known and (action.unit in known["units"] or action.unit in fresh):
                dropped.append(action)
            else:
                fresh[action.unit] = action
        if known is None:
            expect = ErrorKind.COLLECTION_NOT_FOUND
        elif epoch < known["epoch"]:
            expect = ErrorKind.FENCED
        elif known["sealed"] and fresh:
            expect = ErrorKind.SEALED
        else:
            expect = None
        done = self.commit(client, actions, expect=expect)
        if done is None:
            return
        assert list(done.dropped) == dropped
        for unit, action in fresh.items():
            known["units"][unit] = (action.attempt, action.rows, self.version + 1)
        if fresh:
            self.note()
        assert done.version == self.version

    @precondition(lambda self: self.last)
    @rule(data=st.data())
    def retry(self, data):
        """The same transaction again, from either client, changes nothing and gives the same answer."""
        owner = data.draw(st.sampled_from(sorted(self.last)))
        actions, txn, first = self.last[owner]
        again = self.logs[data.draw(clients)].commit(actions, txn=txn)
        assert (again.version, again.dropped) == (first.version, first.dropped)
        assert again.state.version == self.version

    @rule(client=clients, name=names, step=st.integers(0, 2))
    def fence(self, client, name, step):
        known = self.model.get(name)
        if known is None:
            self.commit(client, [Fence("run", name, step)], expect=ErrorKind.COLLECTION_NOT_FOUND)
            return
        epoch = known["epoch"] + step
        if self.commit(client, [Fence("run", name, epoch)], expect=ErrorKind.FENCED if step == 0 else None):
            known["epoch"] = epoch
            self.note()

    @rule(client=clients, name=names, wrong=st.sampled_from([0, 0, 1]))
    def seal(self, client, name, wrong):
        known = self.model.get(name)
        if known is None:
            return
        rows = sum(rows for _, rows, _ in known["units"].values()) + wrong
        action = Seal("run", name, known["epoch"], len(known["units"]), rows, (), {})
        expect = ErrorKind.SEALED if known["sealed"] else ErrorKind.COUNT_DIFFERS if wrong else None
        if self.commit(client, [action], expect=expect):
            known["sealed"] = True
            self.note()

    @rule(client=clients)
    def vacuum(self, client):
        live = {obj.key for obj in new_log(self.storage).latest().objects()}
        orphans = [key for key in self.storage.list("runs/") if key not in live]
        if not orphans:
            return
        assert self.commit(client, [Tomb(tuple(orphans), "2026-01-01T00:00:00Z")])
        self.note()
        self.tombs.update(orphans)
        for key in orphans:
            self.storage.delete(key)

    @rule(client=clients)
    def reopen(self, client):
        self.faulty[client] = FaultStorage(self.storage, {})
        self.logs[client] = new_log(self.faulty[client])

    @rule(
        client=clients,
        after=st.integers(0, 8),
        mode=st.sampled_from(list(Fault)),
        epoch_step=st.integers(1, 2),
    )
    def fence_with_a_fault(self, client, after, mode, epoch_step):
        """A commit that meets a fault has happened or not; run again, it has happened exactly once."""
        if not self.model:
            return
        name = sorted(self.model)[0]
        epoch = self.model[name]["epoch"] + epoch_step
        action, txn = Fence("run", name, epoch), uuid.uuid4().hex
        with contextlib.suppress(StorageError, Killed):
            new_log(FaultStorage(self.storage, {after: mode})).commit([action], txn=txn)
        done = self.logs[client].commit([action], txn=txn)
        self.model[name]["epoch"] = epoch
        self.note()
        assert done.version == self.version

    @rule(data=st.data())
    def lose_derived_objects(self, data):
        keys = [*self.storage.list("checkpoints/"), "_hint"]
        for key in data.draw(st.lists(st.sampled_from(keys), max_size=3, unique=True)):
            self.storage.delete(key)

    @rule(client=clients, data=st.data())
    def travel(self, client, data):
        version = data.draw(st.integers(0, self.version))
        self.compare(self.logs[client].at(version), self.past[version])

    def compare(self, state, expected):
        found = {
            id: (c.epoch, {u.unit: (u.attempt, u.rows, u.version) for u in c.units.values()}, c.is_sealed)
            for (_, id), c in state.collections.items()
        }
        assert found == expected

    @invariant()
    def equals_the_model(self):
        state = CommitLog(self.storage).latest()
        assert state.version == self.version
        self.compare(state, self.past[self.version])
        assert set(state.tombs) == self.tombs
        assert state.n_rows == sum(rows for c in self.model.values() for _, rows, _ in c["units"].values())

    def teardown(self):
        assert [p.message for p in fsck(self.storage, deep=False).problems] == []


QUICK = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
LONG = settings(
    max_examples=1000, stateful_step_count=100, deadline=None, suppress_health_check=list(HealthCheck)
)


class TestModel(LogMachine.TestCase):
    settings = QUICK


@pytest.mark.slow
@pytest.mark.timeout(7200)
class TestModelLong(LogMachine.TestCase):
    settings = LONG
