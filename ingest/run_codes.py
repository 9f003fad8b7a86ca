"""What does an ingest do for the codes that it makes of rows as they come (`keep` has `codes`)?

Units of the run and of its codes are committed together, so a unit of the one is live if and only if that of the other is.
Both are fenced by the same job, sealed at its end, and followed by postings; a job that finds its run sealed does what is left.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from actstore.errors import ErrorKind, InvalidInputError
from actstore.log.values import Collection
from actstore.run import Run
from actstore.store import Store

from .committer import KIND as RUN
from .committer import take_over_together
from .config import IngestConfig
from .encoding.encode import ensure_codes, finish_codes, has_postings
from .encoding.plan import KIND, CodesSettings, codes_plan
from .host import ModelDescription
from .run_plan import make_plan
from .unit import RunPlan


def check_dictionaries(store: Store, config: IngestConfig, model: ModelDescription) -> None:
    """Raise before anything is made if a run cannot be encoded in the dictionaries that are asked for.

    Raises:
        NotFoundError: no such dictionary.
        InvalidInputError: one that fits none of the hook points, or, where nothing else is kept, a hook point without one.
    """
    if "codes" not in config.keep:
        return
    from .dictionaries.fits import fitting_hook_point

    widths = dict(model.hook_points)
    taken = {
        fitting_hook_point(store.dictionary(name), f"run {config.run!r}", widths)
        for name in config.dictionary
    }
    idle = [name for name in widths if name not in taken]
    if idle and tuple(config.keep) == ("codes",):
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"nothing would be stored of {', '.join(idle)}: only codes are kept, and no dictionary is of "
            f"{'it' if len(idle) == 1 else 'them'}; leave it out of hook_points, name a dictionary, or add dense to keep",
        )


def ensure_run_codes(store: Store, run: Run) -> list[Collection]:
    """Return the collections of a run's codes, created where there are none; idempotent. Moves `store`.

    Raises:
        ConflictError: codes of that name exist with other settings.
    """
    from .dictionaries.fits import check_fits

    asked = run_codes(run.collection)
    if not asked:
        return []
    config = run.collection.config
    settings = CodesSettings(
        value_dtype=asked["value_dtype"],
        pool_top_m=int(asked["pool_top_m"]),
        pool_special=bool(config.get("pool_special", False)),
    )
    rows_dtype = config["compute_dtype"] if config["dtype"] == "int8" else config["dtype"]
    found = []
    for name in asked["dictionaries"]:
        dictionary = store.dictionary(name)
        hook_point = check_fits(dictionary, run)
        found.append(ensure_codes(store, dictionary, run, hook_point, settings, rows_dtype=str(rows_dtype)))
    return found


def take_over_run(store: Store, run: Collection, codes: Sequence[Collection]) -> RunPlan:
    """Return the plan of a run and its codes, at epochs that fence earlier jobs off from all of them at once."""
    epochs = take_over_together(store.log, [(RUN, run.id), *((KIND, c.id) for c in codes)])
    plans = (codes_plan(c, epoch=epoch) for c, epoch in zip(codes, epochs[1:], strict=True))
    return replace(make_plan(run, epoch=epochs[0]), codes=tuple(plans))


def finish_run_codes(
    store: Store,
    codes: Sequence[Collection],
    config: IngestConfig,
    *,
    notice: Callable[[str], None],
    stop: threading.Event,
) -> None:
    """Seal the codes of a sealed run and build their postings, as far as that is not done; idempotent."""
    for collection in codes:
        if stop.is_set():
            return
        finish_codes(
            store,
            collection.id,
            ray_address=config.ray_address,
            workers=config.workers,
            memory_bytes=config.postings_memory_mb << 20,
            notice=notice,
            stop=stop,
        )


def codes_are_complete(store: Store, codes: Sequence[Collection]) -> bool:
    """Return whether all codes are sealed and have postings at the store's version."""
    sealed = (store.state.collection(KIND, c.id).is_sealed and has_postings(store, c.id) for c in codes)
    return all(sealed)


def run_codes(run: Collection) -> Mapping[str, Any]:
    """Return what a run's configuration says of codes: `dictionaries`, `value_dtype`, `pool_top_m`; nothing if it makes none."""
    found: Mapping[str, Any] = run.config.get("codes", {})
    return found
