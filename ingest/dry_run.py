"""What would an ingest cost: tokens, bytes, objects, requests, memory and time, before anything is written?

The model is loaded and a part of one unit is really computed on one worker (`probe.py`); tokens are those of the stored
tokenization, or counted or estimated (`planned_tokens.py`). Nothing is written to the store.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from actstore.dtypes import stored_dtype
from actstore.int8 import Int8Transform
from actstore.log import fingerprint
from actstore.log.values import Collection
from actstore.store import Store

from .config import IngestConfig
from .cost import (
    Amount,
    Cost,
    Measured,
    UnitSize,
    check_room,
    free_bytes,
    predict_codes,
    predict_cost,
    stored_rows,
    unit_sizes,
)
from .planned_tokens import PlannedTokens, plan_tokens
from .probe import Probe
from .run_codes import check_dictionaries
from .run_plan import check_same_config, make_plan, run_config, tokenize_settings
from .unit import RunPlan

if TYPE_CHECKING:
    from .backend import Backend
    from .host import ModelDescription

PROBE_S = 20.0
"""Seconds of probing: enough for a steady rate, little enough to wait for."""

_TOKEN_ROW_BYTES = 8
"""Of a row in a tokenization's Parquet file; seen are 3 to 8."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Most bytes that one worker holds, by what for; `formula` says how they are reckoned."""

    parameters: int
    """On the device."""
    batch: int
    """On the device: what one forward pass holds at once."""
    units: int
    """In main memory: the rows of every hook point of the units in flight."""
    peak_device: int | None
    """Most that the probe saw on the device; None where it is not counted."""
    formula: str = (
        "parameters + batch_tokens x (6 hidden + 3 intermediate + 2 x captured columns) x bytes of a number"
        " [+ batch_tokens x window x heads x 4 where attention is eager] on the device;"
        " units in flight x rows_per_unit x captured columns x bytes of a number in main memory"
    )
    n_units: int = 2
    """Units in flight: one is computed, one written; without Ray, where a CPU may compute two, 3."""


@dataclass(frozen=True, slots=True)
class DryRun:
    """What an ingest would do and cost."""

    run: str
    corpus: str
    tokenization: str
    n_documents: int
    n_tokens: int
    tokens_are: str
    """`stored`, `counted` (tokenized in memory now) or `estimated`."""
    tokens_error: int | None
    """Two standard errors of `n_tokens`; 0 if exact, None if unknown."""
    n_windows: int
    n_units: int
    n_units_done: int
    """Units that the run has already."""
    rows_per_unit: int
    cost: Cost
    """Of the units that are missing."""
    tokens: Amount
    """Objects of the tokenization that have to be written first."""
    puts: int
    """Objects created, manifests included."""
    gets: int
    """Objects read: tokens, and statistics at the end. Opening the store is not in it."""
    memory: Memory | None
    """None without a probe."""
    probe: Probe | None
    seconds: float | None
    """Time of all workers on the missing units; loading the model and tokenizing are not in it."""
    workers: int
    free_bytes: int | None
    """What the store's disk can take and keep 5 % free; None where storage is not a disk of this machine."""
    notes: tuple[str, ...] = field(default=())

    @property
    def nbytes(self) -> int:
        """Bytes that will be written."""
        return self.cost.total.nbytes + self.tokens.nbytes

    @property
    def n_objects(self) -> int:
        """Objects that will be written."""
        return self.cost.total.objects + self.tokens.objects

    @property
    def fits(self) -> bool | None:
        """Whether the disk can hold it; None where that is unknown."""
        return None if self.free_bytes is None else self.nbytes <= self.free_bytes

    @property
    def bytes_per_s(self) -> float | None:
        """What the storage must take for the estimated time to hold."""
        return self.cost.total.nbytes / self.seconds if self.seconds else None

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON."""
        return {
            **asdict(self),
            "nbytes": self.nbytes,
            "n_objects": self.n_objects,
            "fits": self.fits,
            "bytes_per_s": self.bytes_per_s,
            "rows_per_s": None if self.probe is None else self.probe.rows_per_s,
        }


def dry_run(
    store: Store,
    config: IngestConfig,
    backend: "Backend | None" = None,
    *,
    probe_s: float = PROBE_S,
    notice: Callable[[str], None] | None = None,
) -> DryRun:
    """Return what `run_ingest` with these arguments would do. Writes nothing to the store.

    Cost: loads the model; reads one unit's tokens, or up to 16 MiB of text; computes for about `probe_s` seconds.

    Args:
        store: The store; is moved to its newest version.
        config: What would be done.
        backend: Where the model runs, closed at the end; None for what `config.ray_address` says.
        probe_s: Seconds of real batches on one worker; 0 for none, and no time or memory is said.
        notice: Called with a line of text as each step begins.

    Raises:
        NotFoundError, InvalidInputError, ConflictError: what `run_ingest` would raise before its first unit, but for a full
            disk, which `check_fits` tells.
    """
    from .backend import open_backend

    config, say = config.check(), notice or (lambda _: None)
    store.refresh().corpus(config.corpus)
    say(f"loading {config.model}")
    backend = backend or open_backend(config, store)
    try:
        model = backend.describe()
        check_dictionaries(store, config, model)
        say(f"counting tokens of {config.corpus}")
        planned = plan_tokens(
            store,
            config.corpus,
            config.tokenizer or config.model,
            seed=config.seed,
            **tokenize_settings(config, model),
        )
        plan = _plan(store, config, model, planned)
        probe = None
        if probe_s > 0 and planned.table.num_rows and not _is_complete(store, config):
            say(f"computing a part of unit {planned.table_unit} for about {probe_s:.0f} s")
            probe = backend.call(
                "probe", plan, dict(planned.tokenization.config), planned.table, float(probe_s)
            )
    finally:
        backend.close()
    return _describe(store, config, model, planned, plan, probe)


def _is_complete(store: Store, config: IngestConfig) -> bool:
    existing = store.state.collections.get(("run", config.run))
    return existing is not None and existing.is_sealed


def check_fits(store: Store, found: DryRun) -> None:
    """Raise if the store's disk cannot hold what was found.

    Raises:
        StorageError: STORAGE_FULL.
    """
    check_room(store, found.nbytes, what=f"run {found.run!r}")


def _plan(store: Store, config: IngestConfig, model: "ModelDescription", planned: PlannedTokens) -> RunPlan:
    """Return the plan that a job would make, were the tokenization stored."""
    existing = store.state.collections.get(("run", config.run))
    wanted, _ = run_config(
        config, model, planned.tokenization, existing=None if existing is None else existing.config
    )
    if existing is not None:
        check_same_config(existing, wanted)
        return make_plan(existing, epoch=existing.epoch)
    info: dict[str, Any] = {}
    if config.dtype == "int8":
        # What rows are centred and scaled by changes nothing of their size.
        none = {w: Int8Transform(np.zeros(w, np.float32), np.zeros(w, np.int8)) for _, w in model.hook_points}
        info["int8"] = {name: none[width].to_json() for name, width in model.hook_points}
    return make_plan(
        Collection(
            kind="run", id=config.run, config=wanted, fingerprint=fingerprint(wanted), info=info, version=0
        ),
        epoch=0,
    )


def _describe(
    store: Store,
    config: IngestConfig,
    model: "ModelDescription",
    planned: PlannedTokens,
    plan: RunPlan,
    probe: Probe | None,
) -> DryRun:
    existing = store.state.collections.get(("run", config.run))
    done = {} if existing is None else existing.units
    # A complete run is left as it is, units in quarantine too.
    is_complete = _is_complete(store, config)
    sizes = [size for size in unit_sizes(planned.tokenization) if size.unit not in done]
    pending_rows = planned.n_rows - sum(planned.tokenization.collection.units[u].rows for u in done)
    n_pending = planned.n_units - len(done)
    seconds = pending_rows / probe.rows_per_s / config.workers if probe and probe.rows_per_s else None
    commits = _commits(config, n_pending, seconds)
    measured = None if probe is None else _measured(plan, probe)
    cost = predict_cost(plan, sizes, n_units=planned.n_units, commits=commits, measured=measured)
    if len(sizes) < n_pending:
        cost = cost.times(n_pending / max(1, len(sizes)))
    if config.dictionary:
        specs = [store.dictionary(name).spec for name in config.dictionary]
        codes = predict_codes(specs, n_rows=round(pending_rows * plan.sample), n_units=n_pending)
        cost = replace(cost, other={**cost.other, "codes": codes})
    if is_complete:
        cost = Cost({}, {})
    tokens = Amount()
    if planned.source != "stored":
        tokens = Amount(planned.n_units + 2, planned.n_rows * _TOKEN_ROW_BYTES)
    return DryRun(
        run=config.run,
        corpus=config.corpus,
        tokenization=planned.tokenization.id,
        n_documents=planned.tokenization.corpus.n_documents,
        n_tokens=planned.n_rows,
        tokens_are=planned.source,
        tokens_error=planned.error_rows,
        n_windows=planned.n_windows,
        n_units=planned.n_units,
        n_units_done=len(done),
        rows_per_unit=plan.rows_per_unit,
        cost=cost,
        tokens=tokens,
        puts=cost.total.objects + tokens.objects,
        gets=0 if is_complete else n_pending + planned.n_units,
        memory=None if probe is None else _memory(config, model, planned, plan, probe),
        probe=probe,
        seconds=seconds,
        workers=config.workers,
        free_bytes=free_bytes(store),
        notes=("the run is complete: nothing is left to do",)
        if is_complete
        else _notes(config, planned, probe),
    )


def _commits(config: IngestConfig, n_units: int, seconds: float | None) -> int:
    """Return how many manifests a job writes: its creation, epoch and seal, and the commits between."""
    by_size = math.ceil(n_units / config.commit_units)
    by_time = 0 if seconds is None else int(seconds / max(config.commit_interval_s, 0.05))
    return 3 + min(n_units, max(by_size, by_time))


def _measured(plan: RunPlan, probe: Probe) -> Measured:
    stored = stored_rows(plan, UnitSize(0, probe.n_tokens, 0, 0))
    return Measured(stored, probe.n_documents, probe.objects)


def _memory(
    config: IngestConfig, model: "ModelDescription", planned: PlannedTokens, plan: RunPlan, probe: Probe
) -> Memory:
    from .backend import STREAMS

    number = stored_dtype(model.compute_dtype).itemsize
    columns = sum(spec.d_model for spec in plan.specs.values())
    hidden = probe.context.get("hidden_size", 0)
    batch = config.batch_tokens * (
        6 * hidden + 3 * probe.context.get("intermediate_size", 4 * hidden) + 2 * columns
    )
    window = int(planned.tokenization.config["window"])
    eager = model.attn_implementation == "eager"
    scores = config.batch_tokens * window * probe.context.get("num_attention_heads", 0) * 4 if eager else 0
    unit_rows = min(plan.rows_per_unit, planned.n_rows)
    captured = stored_dtype(plan.capture_dtype).itemsize
    streams = STREAMS if config.ray_address is None and probe.peak_device_bytes is None else 1
    return Memory(
        parameters=probe.parameter_bytes,
        batch=streams * (batch * number + scores),
        units=(streams + 1) * unit_rows * columns * captured,
        peak_device=probe.peak_device_bytes,
        n_units=streams + 1,
    )


def _notes(config: IngestConfig, planned: PlannedTokens, probe: Probe | None) -> tuple[str, ...]:
    notes = []
    if planned.source == "estimated":
        notes.append("tokens are estimated from stretches of the corpus; tokenize it for exact numbers")
    if config.dictionary:
        notes.append(
            "size of codes and postings is that of the k codes of a row where the dictionary sets k, and without them "
            "elsewhere; time and memory of encoding are not in it"
        )
    if config.codec != "hot":
        notes.append(f"size of {config.codec} shards is what the probe's rows compressed to")
    if probe is not None:
        notes.append(
            f"time is that of {probe.n_tokens:,} tokens on one worker, times the rest"
            + (f", over {config.workers} workers that are as fast" if config.workers > 1 else "")
            + "; the storage's speed was not measured"
        )
    if config.self_check:
        notes.append(
            f"the self-check runs about {config.self_check:.2%} of the documents a second time, one by one"
        )
    return tuple(notes)
