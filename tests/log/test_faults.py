"""Does every single storage fault leave the store whole, with everything acknowledged in it and the rest completable?"""

import itertools
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from actstore.storage import LocalStorage, Storage
from actstore.testing.faults import Fault
from tests.log import harness
from tests.log.harness import Client

# fsync takes milliseconds on a disk and nothing in memory; what it is for, power loss, is not simulated here.
_RAM = Path("/dev/shm")


@pytest.fixture
def fresh_local(tmp_path: Path) -> Iterator[Callable[[], Storage]]:
    numbers = itertools.count()
    with tempfile.TemporaryDirectory(dir=_RAM if _RAM.is_dir() else tmp_path) as folder:

        def fresh() -> Storage:
            path = Path(folder) / str(next(numbers))
            path.mkdir()
            return LocalStorage(path)

        yield fresh


@pytest.mark.parametrize("mode", list(Fault))
def test_every_operation_fails_once_in_memory(mode: Fault) -> None:
    assert list(harness.check_faults(Client(), harness.fresh_memory, [mode])) == []


_ON_DISK = {Fault.TORN, Fault.LOST_ANSWER, Fault.ERROR_AFTER, Fault.KILL_AFTER}
"""Where a disk differs most from memory; the other modes are left to the long campaign."""


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=() if mode in _ON_DISK else pytest.mark.slow) for mode in Fault]
)
def test_every_operation_fails_once_on_disk(mode: Fault, fresh_local: Callable[[], Storage]) -> None:
    assert list(harness.check_faults(Client(), fresh_local, [mode])) == []


def _two_faults(n_cases: int, seed: int) -> list[str]:
    print(f"seed {seed}")
    rng = random.Random(seed)
    n = len(harness.n_operations())
    found = []
    for _ in range(n_cases):
        first, second = rng.randrange(n), rng.randrange(n + 10)
        plan = {first: rng.choice(list(Fault)), second: rng.choice(list(Fault))}
        found += list(harness.check_plan(Client(), harness.fresh_memory(), plan))
    return found


def test_two_faults_sampled() -> None:
    assert _two_faults(250, seed=random.SystemRandom().randrange(1 << 32)) == []


@pytest.mark.slow
def test_two_faults_many() -> None:
    assert _two_faults(50_000, seed=random.SystemRandom().randrange(1 << 32)) == []


def test_answer_and_read_back_both_lost() -> None:
    assert list(harness.check_unknown_commits(Client())) == []


@pytest.mark.parametrize("check", [harness.check_races, harness.check_fencing, harness.check_tombs])
def test_another_client_acts_at_any_moment(check: Callable[[Client], Iterator[str]]) -> None:
    assert list(check(Client())) == []
