"""At which rows does each latent of a dictionary fire, the strongest first? (FORMAT.md, section 8.3)

    postings = run.codes("sae").postings()
    rows, values = postings.top(12, 20)

Postings are the codes of a run, latent-major. The twenty strongest rows of a latent lie in one page of about 100 KB, all of its
rows in pages that follow each other; what is where is in one directory per segment, read once and kept.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.checks import check_whole, is_whole
from actstore.errors import ActstoreError, ErrorKind, FormatError, InvalidInputError, NotFoundError
from actstore.log.values import Collection, StoredObject, Unit
from actstore.row_requests import as_numbers
from actstore.sparse.rows import Values
from actstore.sparse.segment import Block, Segment
from actstore.storage.base import Storage

Int64s = npt.NDArray[np.int64]


class Postings:
    """The postings of a run's codes, at one version of the store; safe for use from many threads, and pickles."""

    def __init__(self, storage: Storage, collection: Collection) -> None:
        """Take complete postings; reads nothing yet.

        Args:
            storage: Where the store is.
            collection: The postings at the version to read.

        Raises:
            InvalidInputError: they are not complete.
            FormatError: the manifest's entry of the postings is damaged.
        """
        self.collection = collection
        self._storage = storage
        self._bounds = _parse_bounds(collection)
        self._segments: dict[int, Segment] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return (Postings, (self._storage, self.collection))

    def __repr__(self) -> str:
        return (
            f"<Postings {self.id}: {self.n_postings} of {self.n_latents} latents, {self.n_segments} segments>"
        )

    @property
    def id(self) -> str:
        """That of the codes."""
        return self.collection.id

    @property
    def n_latents(self) -> int:
        """Latents of the dictionary."""
        return int(self._bounds[-1])

    @property
    def n_postings(self) -> int:
        """Postings of all latents together."""
        return self.collection.rows

    @property
    def n_segments(self) -> int:
        """Objects that the latents are spread over."""
        return len(self._bounds) - 1

    def counts(self) -> Int64s:
        """Return at how many rows each latent fires, shape (n_latents,). Reads the directory of every segment."""
        return np.concatenate([self._segment(u).directory.counts for u in range(self.n_segments)])

    def count(self, latent: int) -> int:
        """Return at how many rows a latent fires. Reads one directory.

        Raises:
            NotFoundError: the dictionary has no such latent.
        """
        directory = self._of(latent).directory
        return int(directory.counts[latent - directory.first_latent])

    def latent(self, latent: int) -> tuple[Int64s, Values]:
        """Return all rows at which a latent fires, ascending, and its values there.

        Memory: 10 bytes for each, and as much again while it is read. Reads one range of one object, beside the directory.

        Raises:
            NotFoundError: the dictionary has no such latent.
            FormatError: an object is missing or damaged.
        """
        return self._of(latent).read_many([latent])[0]

    def read_many(self, latents: Sequence[int] | npt.NDArray[np.integer[Any]]) -> list[tuple[Int64s, Values]]:
        """Return rows and values as `latent` does, of several latents in the order asked; pages are read together.

        Raises:
            NotFoundError: the dictionary has no such latent.
            InvalidInputError: no list of whole numbers.
            FormatError: an object is missing or damaged.
        """
        wanted = as_numbers(latents, what="latents")
        segments = self._segments_of(wanted)
        found: list[Any] = [None] * len(wanted)
        for number in np.unique(segments).tolist():
            places = np.flatnonzero(segments == number)
            answers = self._segment(number).read_many(wanted[places].tolist())
            for place, answer in zip(places.tolist(), answers, strict=True):
                found[place] = answer
        return found

    def top(self, latent: int, n: int) -> tuple[Int64s, Values]:
        """Return rows and values of a latent's `n` strongest postings, by descending value, of equal values by row.

        Reads one page, up to 4,096 postings; fewer are returned if there are fewer.

        Raises:
            NotFoundError: the dictionary has no such latent.
            InvalidInputError: `n` is no whole number from 0 on.
            FormatError: an object is missing or damaged.
        """
        return self._of(latent).ranks(latent, 0, check_whole(n, what="n", least=0))

    def ranks(self, latent: int, start: int, stop: int) -> tuple[Int64s, Values]:
        """Return rows and values of the postings of ranks `[start, stop)` in the order of `top`; reads what they lie in."""
        start, stop = check_whole(start, what="start", least=0), check_whole(stop, what="stop", least=0)
        return self._of(latent).ranks(latent, start, stop)

    def blocks(self, latent: int) -> list[Block]:
        """Return how a latent's postings are cut, strongest first: ranks and values of each block. Reads no postings.

        Blocks have 4,096 postings, the last one fewer.

        Raises:
            NotFoundError: the dictionary has no such latent.
            FormatError: an object is missing or damaged.
        """
        return self._of(latent).blocks(latent)

    def value_range(self, latent: int, low: float, high: float = np.inf) -> tuple[Int64s, Values]:
        """Return rows and values of a latent's postings with `low <= value < high`, in the order of `top`.

        Reads the blocks that have such values.
        """
        segment = self._of(latent)
        some = [b for b in segment.blocks(latent) if b.high >= low and b.low < high]
        if not some:
            return segment.ranks(latent, 0, 0)
        rows, values = segment.ranks(latent, some[0].start, some[-1].start + some[-1].count)
        # Compared as float64: a bound need not be a number of the stored dtype.
        wide = values.astype(np.float64)
        inside = (wide >= low) & (wide < high)
        return rows[inside], values[inside]

    def values_at(self, latent: int, rows: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return a latent's value at some rows, in the order asked, 0 where it does not fire. Reads the whole latent."""
        wanted = np.asarray(rows, np.int64)
        firing, values = self.latent(latent)
        found = np.zeros(wanted.shape, np.float32)
        if len(firing):
            place = np.minimum(np.searchsorted(firing, wanted), len(firing) - 1)
            hit = firing[place] == wanted
            found[hit] = values[place[hit]]
        return found

    def objects_of(self, latents: Iterable[int] | npt.NDArray[np.integer[Any]]) -> list[StoredObject]:
        """Return the objects that the postings of some latents are in, each once, in order; reads nothing."""
        segments = np.unique(self._segments_of(as_numbers(list(latents), what="latents")))
        return [
            _segment_object(self.collection, self.collection.units[number]) for number in segments.tolist()
        ]

    def _of(self, latent: int) -> Segment:
        if not is_whole(latent):
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"a latent is a whole number from 0 to {self.n_latents - 1}, got {latent!r:.80}",
            )
        return self._segment(int(self._segments_of(np.array([latent]))[0]))

    def _segments_of(self, latents: Int64s) -> Int64s:
        bad = latents[(latents < 0) | (latents >= self.n_latents)]
        if bad.size:
            raise NotFoundError(
                ErrorKind.ROW_NOT_FOUND,
                f"latent {int(bad[0])} was asked for, the dictionary of {self.id!r} has latents [0, {self.n_latents})",
            )
        return np.searchsorted(self._bounds, latents, side="right") - 1

    def _segment(self, number: int) -> Segment:
        if number not in self._segments:
            unit = self.collection.units[number]
            latents = range(int(self._bounds[number]), int(self._bounds[number + 1]))
            self._segments[number] = Segment(
                self._storage, _segment_object(self.collection, unit), unit.meta, latents=latents
            )
        return self._segments[number]


def open_postings(storage: Storage, collection: Collection | None, codes_id: str) -> Postings:
    """Return the postings of some codes.

    Args:
        storage: Where the store is.
        collection: The postings at the version to read, None if there are none.
        codes_id: Id of the codes, for messages.

    Raises:
        NotFoundError: there are none.
        InvalidInputError: they are not complete.
    """
    if collection is None:
        raise NotFoundError(
            ErrorKind.COLLECTION_NOT_FOUND,
            f"codes {codes_id!r} have no postings at this version: build them with actstore sae encode",
        )
    return Postings(storage, collection)


def _parse_bounds(collection: Collection) -> Int64s:
    try:
        bounds = np.asarray(collection.config["boundaries"], np.int64)
        is_right = len(bounds) > 1 and bounds[0] == 0 and bool((np.diff(bounds) > 0).all())
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _broken(collection, f"its configuration has no boundaries ({error!r})") from error
    if not is_right:
        raise _broken(collection, f"its boundaries {bounds.tolist()!s:.80} do not ascend from 0")
    if not collection.is_sealed:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"postings {collection.id!r} have {len(collection.units)} of {len(bounds) - 1} segments: finish them with the same "
            "command that began them (actstore sae encode)",
        )
    if sorted(collection.units) != list(range(len(bounds) - 1)):
        raise _broken(
            collection, f"it has {len(collection.units)} segments for {len(bounds) - 1} ranges of latents"
        )
    return bounds


def _segment_object(collection: Collection, unit: Unit) -> StoredObject:
    prefix = f"postings/{collection.id}/"
    found = [o for o in unit.objects if o.key.startswith(prefix) and o.key.endswith(".bin")]
    if len(found) != 1:
        raise _broken(collection, f"unit {unit.unit} lists {len(found)} segments")
    return found[0]


def _broken(collection: Collection, found: str) -> ActstoreError:
    return FormatError(
        ErrorKind.INVARIANT_BROKEN, f"postings {collection.id!r} cannot be read: {found}; see fsck"
    )
