"""Is what was stored what the model computes? Some documents are run again, alone, and compared with the store.

At the end of a run a seeded sample of its documents is read back from the store and computed a second time by plain
transformers (`plain_forward.py`): one window at a time, without batches, padding or early stop. The differences are kept with
the run; if they are more than the rounding of its types explains, the run is not sealed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from actstore.errors import ErrorKind, InvalidInputError
from actstore.store import Store

from .check_rows import Difference, DocumentCheck, tolerance_of

if TYPE_CHECKING:
    from .backend import Backend

_DOCUMENTS_PER_CALL = 16
"""A worker opens the store anew for each call; more would only make progress coarser."""

_MORE_TRIES = 64
"""Documents drawn besides, where those of the sample have no token or no row that a sampled run keeps."""

FORMAT = 1
"""Of the result, as it is stored with the run."""


@dataclass(slots=True)
class _Tally:
    """Everything compared so far."""

    n_documents: int = 0
    n_rows: int = 0
    differences: dict[str, Difference] | None = None

    def add(self, checks: Sequence[DocumentCheck]) -> None:
        for check in checks:
            if not check.n_rows:
                continue
            self.n_documents += 1
            self.n_rows += check.n_rows
            self.differences = self.differences or {}
            for name, found in check.differences.items():
                self.differences[name] = (
                    found if name not in self.differences else self.differences[name] + found
                )


def check_run(
    backend: "Backend",
    store: Store,
    run_id: str,
    share: float,
    seed: int,
    notice: Callable[[str], None],
) -> dict[str, Any]:
    """Return how far stored documents are from what the model computes on them alone.

    Deterministic choice of documents; one pass over each of them on one worker, and its rows read back.

    Args:
        backend: Has the model.
        store: Has the run, all of its units committed; is moved to the newest version.
        run_id: The run.
        share: Of the corpus's documents to check; at least one is.
        seed: Of the choice.
        notice: Told what is being done.

    Returns:
        What the run's seal keeps under `self_check`: `n_documents`, `n_rows`, `tolerance`, and by hook point `max_abs`,
        `max_relative`, `mean_relative` (of a row's error to its length) and `worst_document`.

    Raises:
        InvalidInputError: SELF_TEST_FAILED: a difference is more than rounding explains.
    """
    run = store.refresh().run(run_id)
    n_documents = run.tokenization.corpus.n_documents
    wanted = max(1, round(share * n_documents))
    notice(f"checking {wanted:,} of {n_documents:,} documents against plain transformers")
    tally = _Tally()

    def check(documents: Sequence[int]) -> None:
        tally.add(backend.call("check_documents", store, run_id, documents))

    rng = np.random.default_rng([seed, 0x636865])
    for documents in _drawn(n_documents, wanted, rng):
        check(documents)
    for _ in range(_MORE_TRIES):
        if tally.n_rows:
            break
        check([int(rng.integers(n_documents))])
    result = {
        "format": FORMAT,
        "share": share,
        "seed": seed,
        "n_documents": tally.n_documents,
        "n_rows": tally.n_rows,
        "tolerance": tolerance_of(run.config),
        "hook_points": {name: _as_json(found) for name, found in (tally.differences or {}).items()},
    }
    _judge(run_id, result, tally.differences or {})
    return result


def describe_check(result: Mapping[str, Any]) -> str:
    """Return one line for people: what was compared and how far it was off.

    >>> describe_check({"n_documents": 2, "n_rows": 9, "hook_points": {"embed": {"max_relative": 1e-6}}})
    '2 documents (9 rows) run again alone: largest difference of a row 1e-06 of its length, at embed'
    """
    if not result["hook_points"]:
        return "no document had a stored row to compare"
    worst = max(result["hook_points"], key=lambda name: result["hook_points"][name]["max_relative"])
    return (
        f"{result['n_documents']:,} documents ({result['n_rows']:,} rows) run again alone: largest difference of a row "
        f"{result['hook_points'][worst]['max_relative']:.2g} of its length, at {worst}"
    )


def _drawn(n: int, k: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Yield `k` of the numbers below `n`, a few at a time, ascending; holds no more than those few."""
    for at in range(0, k, _DOCUMENTS_PER_CALL):
        stop = min(at + _DOCUMENTS_PER_CALL, k)
        yield [int(rng.integers(i * n // k, (i + 1) * n // k)) for i in range(at, stop)]


def _as_json(found: Difference) -> dict[str, Any]:
    values = asdict(found)
    return {
        "max_abs": values["max_abs"],
        "max_relative": values["max_relative"],
        "mean_relative": found.mean_relative,
        "worst_document": values["worst_document"],
    }


def _judge(run_id: str, result: Mapping[str, Any], differences: Mapping[str, Difference]) -> None:
    failed = {name: found for name, found in differences.items() if not found.excess <= 1}
    if not failed:
        return
    name, worst = max(failed.items(), key=lambda item: item[1].excess)
    raise InvalidInputError(
        ErrorKind.SELF_TEST_FAILED,
        f"run {run_id!r} was not sealed: the self-check of {result['n_documents']} documents found stored rows that are not "
        f"what the model computes, at {len(failed)} of {len(differences)} hook points. Worst is {name!r}, document "
        f"{worst.worst_document}: a row is {worst.max_relative:.3g} of its length off, and rounding explains "
        f"{result['tolerance']:.3g}. Compute in float32, try another attn_implementation or no compile under a new run name, "
        "or leave self_check out to seal the run as it is",
    )
