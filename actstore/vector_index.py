"""Which indexes does a run have at a hook point, and what is in one? (FORMAT.md, section 10)

    for index in open_indexes(run, "layers.3.resid_post", metric="cosine"):
        effort = index.effort_for(0.95, k=10)
        scores, ordinals = index.shards[0].search(index.prepare(rows), 40, effort=effort)
        index.shards[0].rows_of(ordinals[0])

An index is one *generation* over some units of a run (or over some of its documents); what no generation covers is scanned. It
is cut into shards, each a FAISS file. A vector's number in its shard is its *ordinal*: the stored rows of the shard's units in
row order, counted from 0, whether they are indexed or not (rows that are not finite are not, nor rows of zeros where the metric
is the cosine).
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from actstore.codec.cache import BytesCache
from actstore.codec.layout import RowLayout
from actstore.errors import ErrorKind, FormatError, InvalidInputError
from actstore.hook_points import canonical_hook_point
from actstore.index_shard import IndexShard as IndexShard
from actstore.log.values import Collection, StoredObject, Unit
from actstore.names import check_name

if TYPE_CHECKING:
    from actstore.run import Run
    from actstore.transforms import Transform

Float32s: TypeAlias = npt.NDArray[np.float32]
Int64s: TypeAlias = npt.NDArray[np.int64]
Of: TypeAlias = Literal["tokens", "documents"]
Purpose: TypeAlias = Literal["nearest", "directions"]

KIND: Final = "index"
"""Of the collections."""

FORMAT: Final = 1
"""Of their configurations."""

PURPOSES: Final[Mapping[str, Purpose]] = {
    "flat": "nearest",
    "ivf_sq8": "nearest",
    "ivf_rabitq": "nearest",
    "scan_sq8": "directions",
}
"""Kinds of index, and what each is for."""

METRICS: Final = ("cosine", "ip", "l2")

_TRANSFORMS: BytesCache[Any] = BytesCache(512 << 20)

_BLOCK_ROWS: Final = 1024
"""Rows whose lengths are computed at once, in float64."""


def index_id(run: str, hook_point: str, of: str, purpose: str, generation: int) -> str:
    """Return the id of an index: readable, and with a hash of all its parts, so that no two have one id.

    >>> index_id("pythia", "layers.3.resid_post", "tokens", "nearest", 0)
    'pythia@layers.3.resid_post.nearest.0.3d015ef42d'
    """
    parts = json.dumps([run, hook_point, of, purpose, generation])
    ending = f".{purpose}.{generation}.{hashlib.sha256(parts.encode()).hexdigest()[:10]}"
    plain = re.sub(r"[^A-Za-z0-9_.@-]|(?<=\.)\.", "-", f"{run}@{hook_point}")[: 64 - len(ending)].rstrip(".")
    return check_name(plain + ending, what="id of an index")


def overfetch(k: int, kind: str, *, is_cut: bool = False) -> int:
    """Return how many candidates a search asks an index for, so that the best `k` are among them once they are scored exactly.

    Measured on 200,000 rows of 768 numbers: 8 bits lose a quarter of a percent without it and nothing with twice as many; one
    bit loses a fifth, and nothing with 16 times as many. An index of the first dimensions alone gives four times as many again.

    >>> overfetch(10, "flat"), overfetch(10, "ivf_sq8"), overfetch(10, "ivf_rabitq")
    (26, 52, 224)
    """
    if is_cut:
        return 4 * overfetch(k, kind)
    if kind == "flat":
        return k + 16
    if kind == "ivf_rabitq":
        return 64 + 16 * min(k, 64) + 8 * max(0, k - 64)
    return 32 + 2 * k


def open_indexes(
    run: "Run",
    hook_point: str,
    *,
    of: Of = "tokens",
    purpose: Purpose = "nearest",
    metric: str | None = None,
    transform_steps: Sequence[str] | None = None,
    pooling: str | None = None,
) -> "list[VectorIndex]":
    """Return the usable indexes of a hook point: newest first, no two over the same rows, all with one metric and transform.

    Reads nothing but the version log. None of a run opened before its store was refreshed, if it has got other units since: they
    may be of rows that it lacks.

    Args:
        run: The run.
        hook_point: One of its hook points; aliases are accepted.
        of: What the vectors stand for.
        purpose: `nearest` neighbours, or `directions`.
        metric: Only those of this metric; those of the newest one's if None.
        transform_steps: Only those of rows transformed so, `()` for as they are stored; the newest one's if None.
        pooling: Of documents: only those of these vectors; the newest one's if None.

    Raises:
        NotFoundError: the run has no such hook point.
        FormatError: the manifest's entry of an index is damaged.
    """
    taken = list[VectorIndex]()
    for index in sealed_indexes(run, hook_point, of=of, purpose=purpose) if _is_current(run) else ():
        is_asked_for = (
            metric in (None, index.metric)
            and (transform_steps is None or tuple(transform_steps) == index.transform_steps)
            and pooling in (None, index.pooling)
        )
        if is_asked_for and (not taken or taken[0].family == index.family):
            covered = index.covered()
            if not any(_overlap(covered, other.covered(), index.of) for other in taken):
                taken.append(index)
    return taken


def _is_current(run: "Run") -> bool:
    """Return whether a run has the units that it has at its store's version, which may have moved on since it was opened."""
    live = run.store.state.collections.get(("run", run.id))
    return live is run.collection or (live is not None and live.units == run.collection.units)


def sealed_indexes(run: "Run", hook_point: str, *, of: Of, purpose: Purpose) -> "list[VectorIndex]":
    """Return every sealed index of a hook point, newest first, superseded ones too; raises as `open_indexes` does."""
    found = [
        VectorIndex(run, c) for c in index_collections(run, hook_point, of=of, purpose=purpose) if c.is_sealed
    ]
    return found[::-1]


def index_collections(run: "Run", hook_point: str, *, of: Of, purpose: Purpose) -> list[Collection]:
    """Return the collections of all generations of a hook point's index, oldest first, unfinished ones too."""
    run.d_model(hook_point)
    name = canonical_hook_point(hook_point)
    found = [
        collection
        for (kind, _), collection in run.store.state.collections.items()
        if kind == KIND
        and (collection.config.get("run"), collection.config.get("hook_point")) == (run.id, name)
        and collection.config.get("of") == of
        and PURPOSES.get(str(collection.config.get("kind"))) == purpose
    ]
    return sorted(found, key=_generation_of)


def _generation_of(collection: Collection) -> int:
    generation = collection.config.get("generation")
    if isinstance(generation, int):
        return generation
    raise FormatError(
        ErrorKind.INVARIANT_BROKEN,
        f"index {collection.id!r} cannot be read: its generation is {generation!r}; see fsck",
    )


@dataclass(frozen=True, slots=True)
class Measured:
    """One measurement of an index against brute force."""

    effort: int
    """Lists probed; 0 of an index without lists."""

    k: int
    share: float
    """Of the rows that were eligible, chosen at random."""

    recall: float
    """Mean share of the true `k` nearest that were among the candidates."""


class VectorIndex:
    """One generation of an index, at one version of the store; safe for use from many threads, and pickles."""

    def __init__(self, run: "Run", collection: Collection) -> None:
        """Take an index; reads nothing yet.

        Args:
            run: The run that it is of.
            collection: The index at the same version of the store.

        Raises:
            FormatError: the manifest's entry of the index is damaged, or of another run.
        """
        self.run = run
        """The run whose vectors it has."""
        self.collection = collection
        """The index as the version log has it."""
        config = collection.config
        if config.get("format") != FORMAT:
            raise FormatError(
                ErrorKind.FORMAT_TOO_NEW,
                f"index {collection.id!r} is of format {config.get('format')!r}, this version reads {FORMAT}: install a newer "
                "one",
            )
        try:
            self.hook_point = str(config["hook_point"])
            """Canonical name."""
            self.of: Of = config["of"]
            """`tokens`: rows of the run; `documents`: pooled vectors."""
            self.pooling: str | None = config["pooling"]
            """Which pooled vectors; None of tokens."""
            self.kind = str(config["kind"])
            """`flat`, `ivf_sq8`, `ivf_rabitq` or `scan_sq8`."""
            self.metric = str(config["metric"])
            """`cosine`, `ip` or `l2`."""
            self.transform_steps = tuple(str(step) for step in config["transform"])
            """What is done to rows before they are compared; see `actstore.transforms`."""
            self.first_dims: int | None = None if config["first_dims"] is None else int(config["first_dims"])
            """Only so many of the first dimensions are indexed; None for all."""
            self.d = int(config["d"])
            """Width of the vectors in the files."""
            self.generation = int(config["generation"])
            """Counted from 0."""
            self.params = dict(config["params"])
            """What else the kind was built with, such as `n_lists`."""
            self._ranges = [[(int(a), int(b)) for a, b in ranges] for ranges in config["shards"]]
            of_run = str(config["run"]), str(config["run_fingerprint"])
            seal = collection.seal
            table = [] if seal is None else seal.meta.get("recall", [])
            self.measured = tuple(
                Measured(int(m["effort"]), int(m["k"]), float(m["share"]), float(m["recall"])) for m in table
            )
            """Recall as it was measured when the index was built."""
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self.broken(f"its configuration does not describe an index ({error!r})") from error
        if of_run != (run.id, run.collection.fingerprint):
            raise self.broken(f"it is of run {of_run[0]!r} and another configuration than run {run.id!r} has")
        if (
            self.kind not in PURPOSES
            or self.metric not in METRICS
            or self.of not in ("tokens", "documents")
            or self.d < 1
            or self.first_dims not in (None, self.d)
            or not all(0 <= a < b for ranges in self._ranges for a, b in ranges)
            or not (self.of == "documents" or self._n_units() <= len(run.collection.units))
        ):
            raise self.broken(
                f"it is {self.kind!r} of {self.of!r} with metric {self.metric!r}, {self.d} wide (first_dims {self.first_dims})"
            )
        if collection.is_sealed and sorted(collection.units) != list(range(len(self._ranges) + 1)):
            raise self.broken(f"it has {len(collection.units)} units for {len(self._ranges)} shards")
        self.shards: tuple[IndexShard, ...] = tuple(
            IndexShard(self, number) for number in range(len(self._ranges)) if number + 1 in collection.units
        )
        """Shards that are built, all of them when it is sealed."""
        self._layout: RowLayout | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return (VectorIndex, (self.run, self.collection))

    def __repr__(self) -> str:
        state = "" if self.collection.is_sealed else ", not complete"
        return (
            f"<VectorIndex {self.id}: {self.kind} of {self.n_indexed} {self.of}, {self.d} wide, {self.metric}, "
            f"{len(self.shards)} shards{state}>"
        )

    @property
    def id(self) -> str:
        """That of the collection."""
        return self.collection.id

    @property
    def purpose(self) -> Purpose:
        """`nearest`, or `directions`."""
        return PURPOSES[self.kind]

    @property
    def family(self) -> tuple[object, ...]:
        """What indexes that answer one question together have in common."""
        made = [obj.sha256 for obj in self._trained_objects() if obj.key.endswith(".safetensors")]
        return (self.of, self.purpose, self.pooling, self.metric, self.transform_steps, *made)

    @property
    def n_rows(self) -> int:
        """Stored rows (documents with a vector) that it covers."""
        return self.collection.rows

    @property
    def n_indexed(self) -> int:
        """Vectors in it."""
        return sum(shard.n_indexed for shard in self.shards)

    @property
    def nbytes(self) -> int:
        """Stored bytes of all its objects."""
        return self.collection.nbytes

    @property
    def efforts(self) -> tuple[int, ...]:
        """Efforts that recall was measured at, ascending."""
        return tuple(sorted({m.effort for m in self.measured}))

    @property
    def unit_ranges(self) -> list[list[tuple[int, int]]]:
        """For each shard the half-open ranges of units, or of document numbers, that it has."""
        return [list(ranges) for ranges in self._ranges]

    def transform(self) -> "Transform":
        """Return what is done to rows before they are compared, as it was when the index was built.

        Raises:
            FormatError: its object is missing or damaged.
        """
        from actstore.transforms import Transform

        if not self.transform_steps:
            return Transform((), self._d_model())
        stored = self.transform_object()

        def load() -> tuple[Any, int]:
            return Transform.from_bytes(self.run.store.objects.read(stored)), stored.nbytes

        transform: Transform = _TRANSFORMS.get(stored.sha256, load)
        if transform.steps != self.transform_steps or transform.d_in != self._d_model():
            raise self.broken(f"its transform is {transform.steps} of {transform.d_in} dimensions")
        return transform

    def transform_object(self) -> StoredObject:
        """Return what holds its transform, which has steps.

        Raises:
            FormatError: there is none.
        """
        return self.one_object(self._trained_objects(), "transform-", ".safetensors")

    def covered(self) -> Int64s:
        """Return the run's units that it has, ascending; of documents half-open ranges of their numbers, shape (r, 2)."""
        ranges = sorted(pair for ranges in self._ranges for pair in ranges)
        if self.of == "documents":
            return np.array(ranges, np.int64).reshape(-1, 2)
        return np.array([unit for a, b in ranges for unit in range(a, b)], np.int64)

    def recall(self, effort: int, k: int, share: float = 1.0) -> float:
        """Return the recall that was measured at an effort: at the next larger `k` and smaller `share` that were.

        Above the largest `k` that was measured it is that one's. 0 where nothing so strict was measured.

        Args:
            effort: Lists probed; between two that were measured, the lower one's counts.
            k: Answers per query.
            share: Of the rows that are eligible.
        """
        found = [m for m in self._measured_at(k, share) if m.effort <= effort]
        return max(found, key=lambda m: m.effort).recall if found else 0.0

    def effort_for(self, recall: float, k: int, share: float = 1.0) -> int | None:
        """Return the least effort that was measured to reach a recall, as `recall` has it; None if none does."""
        reached = [m.effort for m in self._measured_at(k, share) if m.recall >= recall]
        return min(reached, default=None)

    def overfetch(self, k: int) -> int:
        """Return how many candidates are scored exactly for an answer of `k`: what its recall was measured with."""
        return overfetch(k, self.kind, is_cut=self.first_dims is not None)

    def prepare(self, rows_td: Float32s) -> Float32s:
        """Return rows as FAISS sees them: transformed, cut to the first dimensions, and of length 1 if the metric is the cosine.

        Equal rows give equal results, whatever is around them. Rows of zeros stay zeros, rows that are not finite stay so.

        Args:
            rows_td: Stored rows or queries, shape (t, d_model).

        Returns:
            Shape (t, d).

        Raises:
            InvalidInputError: another width.
        """
        rows = np.asarray(rows_td, np.float32)
        if rows.ndim != 2 or rows.shape[1] != self._d_model():
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"rows of shape {rows.shape} were given for index {self.id!r}, whose hook point is {self._d_model()} wide",
            )
        return prepare_rows(
            rows,
            self.transform() if self.transform_steps else None,
            first_dims=self.first_dims,
            metric=self.metric,
        )

    def trained_file(self) -> str:
        """Return the path of a local file that holds the trained FAISS index without vectors, checked."""
        return self.run.store.objects.file(self.one_object(self._trained_objects(), "trained-", ".faiss"))

    def shard_object(self, number: int, prefix: str, ending: str) -> StoredObject | None:
        """Return one of a shard's objects by how its name begins and ends."""
        found = _named(self.collection.units[number + 1].objects, prefix, ending)
        return found[0] if len(found) == 1 else None

    def layout(self) -> RowLayout:
        """Return which rows the run stores at the hook point."""
        if self._layout is None:
            self._layout = self.run.activations(self.hook_point).layout
        return self._layout

    def _n_units(self) -> int:
        return sum(b - a for ranges in self._ranges for a, b in ranges)

    def _measured_at(self, k: int, share: float) -> list[Measured]:
        ks = sorted({m.k for m in self.measured})
        shares = [m.share for m in self.measured if m.share <= share * (1 + 1e-9)]
        if not ks or not shares:
            return []
        at_k = next((n for n in ks if n >= k), ks[-1])
        at_share = max(shares)
        return [m for m in self.measured if m.k == at_k and m.share == at_share]

    def _trained_objects(self) -> tuple[StoredObject, ...]:
        unit: Unit | None = self.collection.units.get(0)
        return () if unit is None else unit.objects

    def one_object(self, objects: Iterable[StoredObject], prefix: str, ending: str) -> StoredObject:
        """Return the one of some objects whose name begins and ends so.

        Raises:
            FormatError: there is none, or several.
        """
        found = _named(objects, prefix, ending)
        if len(found) != 1:
            raise self.broken(f"it lists {len(found)} objects {prefix}*{ending} where there is one")
        return found[0]

    def _d_model(self) -> int:
        return self.run.d_model(self.hook_point)

    def broken(self, found: str) -> FormatError:
        """Return the error that says what is wrong with it."""
        return FormatError(
            ErrorKind.INVARIANT_BROKEN, f"index {self.collection.id!r} cannot be read: {found}; see fsck"
        )


def prepare_rows(
    rows_td: Float32s, transform: "Transform | None", *, first_dims: int | None, metric: str
) -> Float32s:
    """Return rows as FAISS sees them; see `VectorIndex.prepare`."""
    rows = rows_td if transform is None else transform.apply(rows_td)
    if first_dims is not None:
        rows = np.ascontiguousarray(rows[:, :first_dims])
    return unit_rows(rows) if metric == "cosine" else rows


def unit_rows(rows_td: Float32s) -> Float32s:
    """Return rows divided by their lengths, computed in float64 row by row; rows of zeros stay zeros."""
    scaled = np.empty(rows_td.shape, np.float32)
    for start in range(0, len(rows_td), _BLOCK_ROWS):
        block = rows_td[start : start + _BLOCK_ROWS].astype(np.float64)
        with np.errstate(all="ignore"):
            lengths = np.sqrt((block * block).sum(axis=1))
            block /= np.where(lengths > 0, lengths, 1.0)[:, None]
        scaled[start : start + _BLOCK_ROWS] = block
    return scaled


def _overlap(a: Int64s, b: Int64s, of: str) -> bool:
    """Return whether two indexes cover something in common: ascending units, or ascending ranges of documents."""
    if of == "tokens":
        return bool(np.isin(a, b, assume_unique=True).any())
    if not len(a) or not len(b):
        return False
    place = np.searchsorted(b[:, 1], a[:, 0], side="right")  # the first range that ends after this one begins
    inside = place < len(b)
    return bool((b[place[inside], 0] < a[inside, 1]).any())


def _named(objects: Iterable[StoredObject], prefix: str, ending: str) -> list[StoredObject]:
    names = ((obj, obj.key.rsplit("/", 1)[1]) for obj in objects)
    return [obj for obj, name in names if name.startswith(prefix) and name.endswith(ending)]
