"""How does slow, independent work run beside the work that feeds it, in order and in bounded memory?"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_ahead(function: Callable[[T], R], items: Iterable[T], *, pool: Executor, ahead: int) -> Iterator[R]:
    """Yield `function(item)` for every item, in order, with up to `ahead` of them under way in the pool.

    No more than `ahead` items and results wait, so a slow `function` holds the producer of the items back. The first
    failure is raised when its turn comes.

    >>> from concurrent.futures import ThreadPoolExecutor
    >>> with ThreadPoolExecutor(2) as pool:
    ...     list(map_ahead(str, range(4), pool=pool, ahead=2))
    ['0', '1', '2', '3']
    """
    running: deque[Future[R]] = deque()
    try:
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) >= ahead:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for future in running:
            future.cancel()
