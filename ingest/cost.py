"""How many objects and bytes will a run store, and is there room for them?

Pure but for asking a disk how full it is. Shards, sums and array metadata follow from the layout to the byte where rows are
stored as they are (codec `hot`), and so do covariances; statistics and pooled vectors are compressed, and are what a probe of
one unit measured, or a guess.
"""

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actstore.codec.metadata import zarr_json
from actstore.codec.spec import ShardSpec
from actstore.covariance import covariance_bytes
from actstore.dictionary_data import DictionarySpec
from actstore.errors import ErrorKind, StorageError
from actstore.names import hook_point_folder
from actstore.sampling import kept_offsets
from actstore.store import Store
from actstore.tokenization import Tokenization

from .seal_objects import MERGED_BYTES
from .unit import RunPlan

RESERVE = 0.05
"""Share of a disk that an ingest leaves free: a full disk stops everything else on it too."""

_STATS_BYTES = 16 << 10
"""Of a hook point's statistics in a unit, if no probe measured them."""

_COMPRESSED = 0.5
"""Size of compressed rows, if no probe measured it: smaller than any model's, so that nothing is refused that would fit."""

_CODE_BYTES = 7
"""Of a code in its unit and in the postings, and its share of the pooled codes; seen are 5 to 9, most with short documents."""

_CODES_UNIT_BYTES = 4 << 10
"""Of a unit's codes and pooled codes, if there are none."""

_LATENT_BYTES, _LATENT_CODE_BYTES, _MOST_LATENT_BYTES = 20, 1.5, 300
"""Of a latent's statistics: of one that never fires, besides for each of its codes, and at most; seen are 56 for 28 codes each
and 300 for 3,800."""

_MANIFEST_BYTES = 400
"""Of a manifest, per object that it lists."""


@dataclass(frozen=True, slots=True)
class UnitSize:
    """What of a unit decides how much is stored."""

    unit: int
    rows: int
    documents: int
    """Documents with all of their rows in it."""
    pieces: int
    """Documents that go on in other units."""
    ends: int = 0
    """Of the pieces, those that are their document's last."""


@dataclass(frozen=True, slots=True)
class Amount:
    """A number of objects and their bytes."""

    objects: int = 0
    nbytes: int = 0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(self.objects + other.objects, self.nbytes + other.nbytes)

    def times(self, factor: float) -> "Amount":
        """Return this many of them, rounded."""
        return Amount(round(self.objects * factor), round(self.nbytes * factor))


@dataclass(frozen=True, slots=True)
class Measured:
    """What a probe of a part of a unit found."""

    n_rows: int
    """Rows that it would have stored."""
    n_documents: int
    objects: Mapping[str, tuple[int, int]]
    """See `Probe.objects`."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What units will store."""

    dense: Mapping[str, Amount]
    """Shards by hook point."""
    other: Mapping[str, Amount]
    """`sums`, `stats`, `pooled`, `covariance`, `codes`, `metadata`, `manifests`; those that there are."""

    @property
    def total(self) -> Amount:
        """All together."""
        return sum([*self.dense.values(), *self.other.values()], Amount())

    def times(self, factor: float) -> "Cost":
        """Return the cost of this many times the units; metadata of arrays is there once."""
        other = {name: a if name == "metadata" else a.times(factor) for name, a in self.other.items()}
        return Cost({name: a.times(factor) for name, a in self.dense.items()}, other)


def unit_sizes(tokenization: Tokenization) -> Iterable[UnitSize]:
    """Yield every unit's size, from what the manifest says of it. Reads nothing."""
    units = tokenization.units
    for i, unit in enumerate(units):
        meta = unit.meta
        before = i > 0 and int(units[i - 1].meta["last_doc"]) == int(meta["first_doc"])
        after = i + 1 < len(units) and int(units[i + 1].meta["first_doc"]) == int(meta["last_doc"])
        present = int(meta["n_documents"]) + before
        through = before and after and meta["first_doc"] == meta["last_doc"]
        pieces = 1 if through else before + after
        yield UnitSize(unit.unit, unit.rows, present - pieces, pieces, int(before and not through))


def predict_codes(specs: Iterable[DictionarySpec], *, n_rows: int, n_units: int) -> Amount:
    """Return about what codes in some dictionaries, their postings and the latents' statistics take.

    Of dictionaries whose rows have no set number of codes only what is there in any case is counted.

    Args:
        specs: Of the dictionaries.
        n_rows: Rows that are encoded.
        n_units: Units that these lie in.
    """
    total = Amount()
    for spec in specs:
        n_codes = n_rows * (spec.k or 0)
        codes = n_codes * _CODE_BYTES + n_units * _CODES_UNIT_BYTES
        latents = spec.n_latents * _LATENT_BYTES + n_codes * _LATENT_CODE_BYTES
        # Two objects of each unit, two of the postings.
        total += Amount(2 * n_units + 2, round(codes + min(latents, spec.n_latents * _MOST_LATENT_BYTES)))
    return total


def predict_cost(
    plan: RunPlan, units: Iterable[UnitSize], *, n_units: int, commits: int, measured: Measured | None = None
) -> Cost:
    """Return what these units of a run, and its seal, store.

    Args:
        plan: The run.
        units: Those to be computed.
        n_units: Of the whole run.
        commits: Manifests that will be written.
        measured: What a probe found; None for guesses.
    """
    is_dense, is_pooled = "dense" in plan.keep, "pooled" in plan.keep
    dense = dict.fromkeys(plan.specs, Amount()) if is_dense else {}
    sums = stats = covariance = pooled = Amount()
    merged = 0
    one_pooled = _pooled_bytes(plan, measured)
    one_stats = Amount(1, _measured_bytes(measured, "stats", _STATS_BYTES * len(plan.specs)))
    widths = [spec.d_model for spec in plan.specs.values()]
    one_covariance = Amount(len(widths), sum(covariance_bytes(d) for d in widths))
    for size in units:
        stored = stored_rows(plan, size)
        if is_dense and stored:
            n_sums = 0
            for name, spec in plan.specs.items():
                dense[name] += _shards(spec, stored, _ratio(name, spec, measured))
                n_sums += sum(spec.n_sums_of(n) for n in _pieces(spec, stored))
            sums += Amount(1, 4 * n_sums)
        stats += one_stats
        covariance += one_covariance
        if is_pooled:
            objects = (size.documents > 0) + (size.pieces > 0)
            pooled += Amount(objects, round((size.documents + 2 * size.pieces) * one_pooled))
            # A document's last piece has it merged.
            merged += size.ends
    # The seal keeps what all units' come to.
    other = {"stats": stats + one_stats}
    if is_dense:
        other["sums"] = sums
        other["metadata"] = _metadata(plan, n_units)
    if is_pooled:
        other["pooled"] = pooled + Amount(
            -(-round(merged * one_pooled) // MERGED_BYTES), round(merged * one_pooled)
        )
    if plan.covariance:
        other["covariance"] = covariance + one_covariance
    listed = sum((a.objects for a in [*dense.values(), *other.values()]), 0)
    other["manifests"] = Amount(commits, _MANIFEST_BYTES * (listed + commits))
    return Cost(dense, other)


def check_room(store: Store, nbytes: int, *, what: str) -> None:
    """Raise if a local store's disk cannot take `nbytes` more and keep its reserve. Other storages are not asked.

    Raises:
        StorageError: STORAGE_FULL: it cannot; the message has the numbers.
    """
    room = free_bytes(store)
    if room is None or nbytes <= room:
        return
    raise StorageError(
        ErrorKind.STORAGE_FULL,
        f"{what} needs {nbytes:,} bytes in {store.url!r}, and its disk has {max(0, room):,} to give ({RESERVE:.0%} of it stay "
        "free): make room, use another store, or store less (int8, fewer hook points, a sample, pooled vectors only)",
    )


def check_run_room(store: Store, plan: RunPlan, tokenization: Tokenization, units: Sequence[int]) -> None:
    """Raise if a local store's disk cannot take what these units of a run store; for a job, before its first unit.

    Compressed rows count as half, so what is refused would not fit; what is not may fail later.

    Raises:
        StorageError: STORAGE_FULL.
    """
    if not units or free_bytes(store) is None:
        return
    pending = set(units)
    sizes = (size for size in unit_sizes(tokenization) if size.unit in pending)
    cost = predict_cost(plan, sizes, n_units=len(tokenization.units), commits=1)
    # Of the compressed parts only rows are certain.
    certain = sum(a.nbytes for a in cost.dense.values()) + cost.other.get("sums", Amount()).nbytes
    check_room(store, certain, what=f"run {plan.run!r}")


def free_bytes(store: Store) -> int | None:
    """Return how much a local store's disk can take and keep its reserve, which may be less than 0; None elsewhere."""
    path = store.storage.local_path("manifests")
    if path is None:
        return None
    while path and not os.path.exists(path):
        path = os.path.dirname(path)
    usage = shutil.disk_usage(path)
    return usage.free - int(usage.total * RESERVE)


def stored_rows(plan: RunPlan, size: UnitSize) -> int:
    """Return how many of a unit's rows a run stores."""
    if plan.sample >= 1:
        return size.rows
    kept = kept_offsets(
        size.unit, size.rows, rows_per_unit=plan.rows_per_unit, rate=plan.sample, seed=plan.seed
    )
    return len(kept)


def _pieces(spec: ShardSpec, n_rows: int) -> Iterable[int]:
    return (min(spec.rows_per_shard, n_rows - at) for at in range(0, n_rows, spec.rows_per_shard))


def _shards(spec: ShardSpec, n_rows: int, ratio: float) -> Amount:
    total = Amount()
    for n in _pieces(spec, n_rows):
        chunks = spec.n_chunks_of(n)
        total += Amount(1, round(chunks * spec.chunk_bytes * ratio) + 4 * chunks + spec.index_bytes)
    return total


def _ratio(name: str, spec: ShardSpec, measured: Measured | None) -> float:
    """Return compressed to plain size of a hook point's rows."""
    if spec.codec == "hot":
        return 1.0
    if measured is None:
        return _COMPRESSED
    _, nbytes = measured.objects.get(hook_point_folder(name), (0, 0))
    plain = sum(spec.n_chunks_of(n) * spec.chunk_bytes for n in _pieces(spec, measured.n_rows))
    return nbytes / plain if plain and nbytes else _COMPRESSED


def _measured_bytes(measured: Measured | None, folder: str, guess: int) -> int:
    return guess if measured is None or folder not in measured.objects else measured.objects[folder][1]


def _pooled_bytes(plan: RunPlan, measured: Measured | None) -> float:
    """Return the bytes of one document's vectors."""
    guess = 4.0 * len(plan.poolings) * sum(spec.d_model for spec in plan.specs.values()) + 8
    if measured is None or not measured.n_documents or "pooled" not in measured.objects:
        return guess
    return measured.objects["pooled"][1] / measured.n_documents


def _metadata(plan: RunPlan, n_units: int) -> Amount:
    total = Amount()
    for name, spec in plan.specs.items():
        attributes: dict[str, Any] = {"run": plan.run, "hook_point": name, "fingerprint": "0" * 64}
        total += Amount(
            1, len(zarr_json(spec, n_shards=n_units * plan.shards_per_unit(name), attributes=attributes))
        )
    return total
