"""How often, and after which pauses, is a request tried again?

One policy for all of actstore: the clients underneath (s3fs, botocore) are told not to retry on their own, because two
layers of retries multiply, and a hidden second attempt turns a writer's own success into "already exists". The pauses
are exponential with full jitter: uniform between nothing and a bound that doubles.

Source: M. Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015 ("full jitter").
"""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How many attempts, how far apart. Values are shared by all threads; only `rng` has state, and it is thread-safe."""

    attempts: int = 7
    """Attempts in all, the first included; at least 1. Seven span about 6 s on average, enough for an S3 "SlowDown"."""

    base_s: float = 0.1
    """Upper bound of the first pause, in seconds; doubles from pause to pause."""

    cap_s: float = 10.0
    """Upper bound of every pause, in seconds."""

    deadline_s: float = 120.0
    """No further attempt starts this many seconds after the first one did."""

    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)
    rng: random.Random = field(default_factory=random.Random, repr=False)

    def tries(self) -> Iterator[int]:
        """Yield 0, 1, ... once per allowed attempt, pausing before every one but the first.

        >>> policy = RetryPolicy(attempts=3, sleep=lambda seconds: None)
        >>> list(policy.tries())
        [0, 1, 2]
        """
        start = self.clock()
        for attempt in range(max(self.attempts, 1)):
            if attempt:
                pause = self.rng.uniform(0.0, min(self.cap_s, self.base_s * 2.0 ** (attempt - 1)))
                if self.clock() + pause - start > self.deadline_s:
                    return
                self.sleep(pause)
            yield attempt


DEFAULT_RETRY = RetryPolicy()
"""What everything uses that is not told otherwise."""
