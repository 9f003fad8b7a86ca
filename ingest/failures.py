"""Is a try that failed worth another, and when is it the job that is broken and not the unit?

A unit fails for good when its error cannot pass (activations that are not finite) or after `max_attempts` tries; a try whose
worker went away counts a third, as the unit is innocent more often than not. The job is broken when tries keep failing and
none succeeds in between: errors that do not pass by themselves count by units, errors that may pass count in waves (a
storage that fails for a second fails all units in flight at once), with growing pauses between, when only one unit is tried.
"""

from collections.abc import Callable
from dataclasses import dataclass

from actstore.errors import ActstoreError, ConflictError, ErrorKind, InvalidInputError, StorageError

from .commits import may_pass
from .flow import Completion

IN_A_ROW = 8
"""Units, or waves, that fail with no success in between, after which the job gives up."""

_WEIGHT, _LOST_WEIGHT = 3, 1
_FREE_WAVES = 2
"""Waves of failures before the first pause: single failures must not slow a job down."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 10.0


def as_error(error: BaseException | None, unit: int, tries: int) -> ActstoreError:
    """Return the error of a unit that is given up as one of the tree."""
    if isinstance(error, ActstoreError):
        return error
    failure = StorageError(
        ErrorKind.WORKER_FAILED,
        f"unit {unit} failed {tries} times, the last time with {type(error).__name__}: {error}",
    )
    failure.__cause__ = error
    return failure


@dataclass(slots=True)
class _Tries:
    n: int = 0
    weight: int = 0


class Failures:
    """Remembers failed tries; its size is the number of units that failed and have not ended yet."""

    def __init__(self, *, max_attempts: int, retry_s: float, clock: Callable[[], float]) -> None:
        """Make it with nothing failed.

        Args:
            max_attempts: Tries of a unit.
            retry_s: Seconds for which a storage that fails everything is borne, pauses included; 0 makes none.
            clock: Seconds.
        """
        self._limit = max_attempts * _WEIGHT
        self._retry_s = retry_s
        self._clock = clock
        self._tries: dict[int, _Tries] = {}
        self._row: set[int] = set()
        self._waves = 0
        self._since_s = 0.0
        self._hold_until_s = 0.0
        self._last_wave_s = float("-inf")

    @property
    def hold_s(self) -> float:
        """Seconds before which no unit should be started."""
        return max(0.0, self._hold_until_s - self._clock())

    @property
    def is_probing(self) -> bool:
        """Whether so much failed that one unit at a time is enough until one succeeds."""
        return self._waves > _FREE_WAVES

    def succeeded(self, unit: int) -> None:
        """A unit was written."""
        self._tries.pop(unit, None)
        self._row.clear()
        self._waves = 0
        self._hold_until_s = 0.0

    def tries(self, unit: int) -> int:
        """Return how many tries of a unit failed."""
        found = self._tries.get(unit)
        return 0 if found is None else found.n

    def failed(self, done: Completion, started_s: float) -> bool:
        """Take a failed try in; return whether the unit should be tried again.

        Args:
            done: The try.
            started_s: When it began.
        """
        tries = self._tries.setdefault(done.unit, _Tries())
        tries.n += 1
        tries.weight += _LOST_WEIGHT if done.worker_lost else _WEIGHT
        if done.worker_lost or (done.error is not None and may_pass(done.error)):
            self._count_wave(started_s)
        else:
            self._row.add(done.unit)
        return not isinstance(done.error, InvalidInputError) and tries.weight < self._limit

    def forget(self, unit: int) -> None:
        """A unit was given up."""
        self._tries.pop(unit, None)

    def verdict(self, done: Completion) -> ActstoreError | None:
        """Return the error that ends the job at once, or None to go on."""
        error = done.error
        if isinstance(error, ConflictError):
            return error
        outlasted = self._waves >= IN_A_ROW and self._clock() - self._since_s >= self._retry_s
        if len(self._row) < IN_A_ROW and not outlasted:
            return None
        found = as_error(error, done.unit, self.tries(done.unit))
        what = (
            f"nothing has succeeded for {self._clock() - self._since_s:.0f} s and {self._waves} tries"
            if outlasted
            else f"{len(self._row)} units failed in a row"
        )
        return type(found)(
            found.kind,
            f"{what}, so the job gave up before trying the rest; the last failure was that of unit {done.unit}: {found.message}",
        )

    def _count_wave(self, started_s: float) -> None:
        now = self._clock()
        # Tries begun before the last failure say nothing new: they failed of the same cause.
        if started_s < self._last_wave_s:
            return
        if not self._waves:
            self._since_s = now
        self._waves += 1
        self._last_wave_s = now
        if self.is_probing and self._retry_s:
            pause = _FIRST_PAUSE_S * 2 ** min(self._waves - _FREE_WAVES - 1, 16)
            self._hold_until_s = now + min(pause, _LONGEST_PAUSE_S, self._retry_s)
