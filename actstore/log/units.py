"""How are a hundred thousand units opened in the time it takes to look at a few?

`UnitMap` maps a unit's number to the unit. One that came from a checkpoint or was just committed stays the line of bytes
that it is in a checkpoint until someone asks for it; only then is it taken apart and every name and key in it checked. Its
hash was checked before.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from actstore.log.canonical import parse_json_object
from actstore.log.chunked import ChunkedMap
from actstore.log.entries import entry_name, parse_unit, unit_entry
from actstore.log.values import Unit


class UnitMap(ChunkedMap[Unit]):
    """The live units of a collection, by number; immutable, in ascending order."""

    __slots__ = ()

    @classmethod
    def of_entries(cls, entries: Mapping[int, bytes]) -> "UnitMap":
        """Return a map of units given as their entries (`actstore.log.entries.unit_entry`)."""
        return cls().with_entries(entries)

    def with_entries(self, entries: Mapping[int, bytes]) -> "UnitMap":
        """Return a map that has these units too, given as their entries."""
        lazy: Any = entries
        units = self.updated(lazy)
        assert isinstance(units, UnitMap)
        return units

    def _value(self, chunk: dict[int, Unit], key: int) -> Unit:
        found: Any = chunk[key]
        if isinstance(found, bytes):
            # Two threads may both do this; they put equal units in its place.
            found = chunk[key] = parse_entry(found)
        unit: Unit = found
        return unit

    def entries(self, kind: str, id: str) -> Iterator[bytes]:
        """Yield the entry of every unit, in ascending order."""
        for chunk, key in self._places():
            found: Any = chunk[key]
            yield found if isinstance(found, bytes) else unit_entry(kind, id, found)


def parse_entry(entry: bytes) -> Unit:
    """Return the unit that an entry stands for.

    Raises:
        FormatError: it is not one that a writer writes.
    """
    plain = parse_json_object(entry)
    entry_name(plain)
    return parse_unit(plain)
