"""The pauses of the retry policy, by a clock that does not tick on its own."""

import pickle
import random

from hypothesis import given
from hypothesis import strategies as st

from actstore.errors import ErrorKind, StorageError
from actstore.storage import RetryPolicy
from actstore.storage.object_errors import Meaning, meaning_of
from actstore.storage.scrub import scrub


class FakeTime:
    def __init__(self) -> None:
        self.now = 1000.0
        self.pauses: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    def clock(self) -> float:
        return self.now


@given(
    attempts=st.integers(1, 12), base=st.floats(0.01, 5), cap=st.floats(0.01, 20), seed=st.integers(0, 2**32)
)
def test_pauses_stay_below_a_doubling_bound(attempts, base, cap, seed):
    time = FakeTime()
    policy = RetryPolicy(
        attempts, base, cap, 1e9, sleep=time.sleep, clock=time.clock, rng=random.Random(seed)
    )
    assert list(policy.tries()) == list(range(attempts))
    assert len(time.pauses) == attempts - 1
    for i, pause in enumerate(time.pauses):
        assert 0 <= pause <= min(cap, base * 2**i)


def test_no_attempt_after_the_deadline():
    time = FakeTime()
    policy = RetryPolicy(1000, 1.0, 5.0, 60.0, sleep=time.sleep, clock=time.clock, rng=random.Random(1))
    n = len(list(policy.tries()))
    assert 12 < n < 60
    assert time.now <= 1060.0


def test_pauses_are_spread():
    time = FakeTime()
    list(RetryPolicy(500, 1.0, 1.0, 1e9, sleep=time.sleep, clock=time.clock, rng=random.Random(4)).tries())
    assert min(time.pauses) < 0.05
    assert max(time.pauses) > 0.95
    assert 0.4 < sum(time.pauses) / len(time.pauses) < 0.6


def test_policies_and_errors_pickle():
    assert pickle.loads(pickle.dumps(RetryPolicy(attempts=3))).attempts == 3
    err = pickle.loads(pickle.dumps(StorageError(ErrorKind.STORAGE_FULL, "no space for 'a'")))
    assert (err.kind, str(err)) == (ErrorKind.STORAGE_FULL, "no space for 'a' [storage-full]")


class HttpError(Exception):
    """Shaped like gcsfs's."""

    def __init__(self, code: int) -> None:
        super().__init__(f"HTTP {code}")
        self.code = code


class ContentLengthError(Exception):
    """Shaped like aiohttp's, which gives a client-side failure an HTTP code."""

    code = 400


def test_meanings_of_the_three_clients():
    cases = [
        (FileExistsError("x"), Meaning.EXISTS),
        (FileNotFoundError("bucket/key"), Meaning.MAYBE_ABSENT),
        (PermissionError("x"), Meaning.DENIED),
        (OSError("Forbidden: https://host/x\nno"), Meaning.DENIED),
        (TimeoutError(), Meaning.RETRY),
        (ConnectionResetError(), Meaning.RETRY),
        (OSError(5, "x"), Meaning.RETRY),
        (RuntimeError("Failed to upload block"), Meaning.RETRY),
        (ValueError("Bad Request"), Meaning.REFUSED),
        (HttpError(503), Meaning.RETRY),
        (HttpError(429), Meaning.RETRY),
        (HttpError(409), Meaning.RETRY),
        (HttpError(416), Meaning.PAST_END),
        (HttpError(400), Meaning.REFUSED),
        (HttpError(401), Meaning.DENIED),
        (ContentLengthError(), Meaning.RETRY),
    ]
    for err, meaning in cases:
        assert meaning_of(err) is meaning, err


@given(st.text(alphabet="abcdef", min_size=4, max_size=9), st.text(alphabet="xyz *", max_size=20))
def test_scrub_removes_every_secret(secret, around):
    options = {"secret": secret, "client_kwargs": {"token": secret[::-1], "region_name": "us-east-1"}, "n": 5}
    shown = scrub(f"{around}{secret}{around}{secret[::-1]}us-east-1", options)
    assert secret not in shown
    assert secret[::-1] not in shown
    assert "us-east-1" in shown
