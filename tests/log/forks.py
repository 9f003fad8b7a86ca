"""Real processes on one local store: raced against each other, or killed again and again.

Run as a program of its own, which starts no threads and imports little, so that it may fork:

    python -m tests.log.forks race FOLDER PROCESSES COMMITS
    python -m tests.log.forks kill FOLDER KILLS SEED

It prints one JSON object: what was acknowledged, and what was found wrong.
"""

import json
import os
import random
import signal
import sys
import time
import uuid
from collections.abc import Callable

from actstore.errors import ConflictError, ErrorKind
from actstore.log import CommitLog, State, fsck
from actstore.log.values import Add, Create, Seal
from actstore.storage import LocalStorage, read_verified, write_new

WRITERS = 2
"""At once, so that the killed also race."""

KIND, ID, CONFIG = "run", "r", {"rows_per_unit": 4}


def fork(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def open_log(folder: str) -> CommitLog:
    log = CommitLog(LocalStorage(folder), checkpoint_every=16)
    state = log.create()
    if (KIND, ID) not in state.collections:
        try:
            log.commit([Create(KIND, ID, CONFIG, {})], txn=uuid.uuid4().hex)
        except ConflictError as error:
            if error.kind is not ErrorKind.ALREADY_EXISTS:
                raise
    return log


def add_unit(log: CommitLog, unit: int, acks: int) -> None:
    """Write a unit, commit it, and only then say so, in one write to the file of acknowledgements."""
    attempt = uuid.uuid4().hex
    objects = tuple(
        write_new(
            log.storage, f"runs/{ID}/part{j}/{unit:06}-{attempt}", [f"{unit}/{j}/{attempt}\n".encode() * 50]
        )
        for j in range(2)
    )
    fingerprint = log.latest().collection(KIND, ID).fingerprint
    action = Add(KIND, ID, 0, fingerprint, unit, unit + 1, 0, attempt, objects, {"u": unit})
    done = log.commit([action], txn=uuid.uuid4().hex)
    if not done.dropped:
        os.write(acks, f"{unit} {attempt} {done.version}\n".encode())


def write_forever(folder: str, acks: int, seed: int) -> None:
    """Do the first units that are missing, in an order of one's own, until killed."""
    rng = random.Random(seed)
    log = open_log(folder)
    while True:
        units = log.latest().collection(KIND, ID).units
        add_unit(log, rng.choice([u for u in range(len(units) + 4) if u not in units][:4]), acks)


def read_acks(path: str) -> dict[int, list[tuple[str, int]]]:
    acks: dict[int, list[tuple[str, int]]] = {}
    with open(path) as file:
        for line in file:
            unit, attempt, version = line.split()
            acks.setdefault(int(unit), []).append((attempt, int(version)))
    return acks


def violations(state: State, acks: dict[int, list[tuple[str, int]]]) -> list[str]:
    found = []
    units = state.collection(KIND, ID).units if (KIND, ID) in state.collections else {}
    for unit, told in acks.items():
        live = units.get(unit)
        if len(told) != 1:
            found.append(f"unit {unit} was acknowledged {len(told)} times")
        if live is None or (live.attempt, live.version) != told[0]:
            found.append(f"unit {unit} was acknowledged as {told[0]} and is {live}")
    return found


def torn(log: CommitLog, state: State) -> list[str]:
    found = []
    for unit in state.collection(KIND, ID).units.values():
        for j, obj in enumerate(unit.objects):
            if read_verified(log.storage, obj) != f"{unit.unit}/{j}/{unit.attempt}\n".encode() * 50:
                found.append(f"unit {unit.unit} has another's bytes")
    return found


def complete(log: CommitLog, acks: int) -> State:
    """Close the gaps and seal."""
    units = log.latest().collection(KIND, ID).units
    for unit in range(max(units, default=-1) + 1):
        if unit not in units:
            add_unit(log, unit, acks)
    collection = log.latest().collection(KIND, ID)
    seal = Seal(KIND, ID, 0, len(collection.units), collection.rows, (), {})
    return log.commit([seal], txn=uuid.uuid4().hex).state


def kill(folder: str, kills: int, seed: int) -> dict[str, object]:
    rng = random.Random(seed)
    store, ack_path = os.path.join(folder, "store"), os.path.join(folder, "acks")
    os.mkdir(store)
    acks = os.open(ack_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    started, killed, wrong = time.monotonic(), 0, []
    while killed < kills:
        seeds = [rng.randrange(1 << 30) for _ in range(WRITERS)]
        pids = [fork(lambda s=s: write_forever(store, acks, s)) for s in seeds]
        for pid in pids:
            time.sleep(rng.uniform(0.02, 0.3) / WRITERS)
            os.kill(pid, signal.SIGKILL)
            killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        if os.path.exists(os.path.join(store, "manifests", f"{0:020}.json")):
            wrong += violations(CommitLog(LocalStorage(store)).latest(), read_acks(ack_path))
    seconds = time.monotonic() - started
    log = open_log(store)
    state = complete(log, acks)
    told = read_acks(ack_path)
    wrong += violations(state, told) + torn(log, state)
    report = fsck(log.storage, deep=True)
    wrong += [problem.message for problem in report.problems]
    collection = state.collection(KIND, ID)
    # What an undisturbed run of as many units would hold, known from their numbers alone.
    if [(u.unit, u.rows, u.meta) for u in collection.units.values()] != [
        (n, n + 1, {"u": n}) for n in range(len(collection.units))
    ] or not collection.is_sealed:
        wrong.append("the completed store differs from an undisturbed one")
    summary = {
        "kills": killed,
        "seconds": round(seconds, 1),
        "acknowledged": len(told),
        "units": len(collection.units),
    }
    return {**summary, "versions": state.version, "orphans": report.n_orphans, "wrong": wrong}


def race(folder: str, processes: int, commits: int) -> dict[str, object]:
    store, ack_path = os.path.join(folder, "store"), os.path.join(folder, "acks")
    os.mkdir(store)
    acks = os.open(ack_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def work(process: int) -> None:
        log = open_log(store)
        for n in range(commits):
            add_unit(log, process * commits + n, acks)

    pids = [fork(lambda p=p: work(p)) for p in range(processes)]
    codes = [os.waitpid(pid, 0)[1] for pid in pids]
    log = CommitLog(LocalStorage(store))
    state = log.latest()
    told = read_acks(ack_path)
    wrong = violations(state, told) + torn(log, state)
    wrong += [f"process ended with {code}" for code in codes if code]
    wrong += [problem.message for problem in fsck(log.storage, deep=True).problems]
    return {"acknowledged": len(told), "versions": state.version, "wrong": wrong}


if __name__ == "__main__":
    command, folder, *numbers = sys.argv[1:]
    json.dump({"race": race, "kill": kill}[command](folder, *map(int, numbers)), sys.stdout)
