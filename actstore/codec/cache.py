"""Where are small things kept that many reads need, without growing with the store?"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

V = TypeVar("V")


class BytesCache(Generic[V]):
    """Values by key up to a total size, least recently used ones dropped first; safe for use from many threads.

    A value may be loaded twice at once. One value is kept however large it is.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._nbytes = 0
        self._values: OrderedDict[str | int, tuple[V, int]] = OrderedDict()
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Drop all values."""
        with self._lock:
            self._values.clear()
            self._nbytes = 0

    def find(self, key: str | int) -> V | None:
        """Return the value of `key` if it is kept."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def get(self, key: str | int, load: Callable[[], tuple[V, int]]) -> V:
        """Return the value of `key`, which `load` gives with its size in bytes if it is not kept.

        >>> BytesCache[str](10).get("a", lambda: ("value", 5))
        'value'
        """
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key][0]
        value, nbytes = load()
        self.put(key, value, nbytes)
        return value

    def put(self, key: str | int, value: V, nbytes: int) -> None:
        """Keep a value of some size, unless there is one of that key."""
        with self._lock:
            if key not in self._values:
                self._values[key] = (value, nbytes)
                self._nbytes += nbytes
            while self._nbytes > self._max_bytes and len(self._values) > 1:
                _, (_, dropped) = self._values.popitem(last=False)
                self._nbytes -= dropped
