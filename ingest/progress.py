"""What does a long job tell its caller while it works?"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job has come. Sent often; a callback that draws should be quick."""

    stage: str
    """What is being done: `read`, `write`, `tokenize`."""

    done: int
    """Units of `unit` finished so far."""

    total: int | None
    """Units there are, None while nobody knows."""

    unit: str
    """What is counted: `documents`."""


ProgressCallback: TypeAlias = Callable[[Progress], None]
"""Called from the job's own thread; an exception it raises stops the job."""
