"""What index is asked for, and can it be of this run? Checked before any work."""

from collections.abc import Iterable, Sequence
from typing import Final, NoReturn

from actstore.checks import check_whole
from actstore.errors import ErrorKind, InvalidInputError
from actstore.hook_points import canonical_hook_point
from actstore.pooled_tables import POOLINGS
from actstore.run import Run
from actstore.transforms import parse_steps
from actstore.vector_index import METRICS, PURPOSES

from .plan import Wanted

_MOST_SEED: Final = (1 << 31) - 1
"""Of FAISS's own generators."""


def check_wanted(
    run: Run,
    hook_point: str,
    *,
    kind: str,
    of: str,
    metric: str | None,
    transform: str | Sequence[str],
    first_dims: int | None,
    pooling: str,
    seed: int,
) -> Wanted:
    """Return what is asked for; arguments are those of `build_index`.

    Raises:
        NotFoundError: no such hook point.
        InvalidInputError: a value that is unknown, does not go with another, or that the run has no vectors for.
    """
    run.d_model(hook_point)
    if kind != "auto" and kind not in PURPOSES:
        _refuse("kind", kind, ["auto", *PURPOSES])
    purpose = PURPOSES.get(kind, "nearest")
    if metric is None:
        metric = "ip" if purpose == "directions" else "cosine"
    if metric not in METRICS:
        _refuse("metric", metric, METRICS)
    if of not in ("tokens", "documents"):
        _refuse("of", of, ["tokens", "documents"])
    if of == "documents":
        if pooling not in POOLINGS:
            _refuse("pooling", pooling, POOLINGS)
        run.pooled(hook_point, pooling)
    else:
        run.activations(hook_point)
    steps = parse_steps(transform)
    if first_dims is not None:
        first_dims = check_whole(first_dims, what="first_dims", least=1)
    if purpose == "directions" and (metric != "ip" or steps or first_dims or of != "tokens"):
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"an index for directions (scan_sq8) has inner products with stored rows: metric {metric!r}, transform {steps}, "
            f"first_dims {first_dims} and of {of!r} do not go with it; leave them out",
        )
    return Wanted(
        hook_point=canonical_hook_point(hook_point),
        of="documents" if of == "documents" else "tokens",
        purpose=purpose,
        pooling=pooling if of == "documents" else None,
        metric=metric,
        transform=steps,
        first_dims=first_dims,
        seed=check_whole(seed, what="seed", least=0, most=_MOST_SEED),
    )


def _refuse(what: str, value: object, known: Iterable[str]) -> NoReturn:
    raise InvalidInputError(
        ErrorKind.BAD_ARGUMENT, f"{what}={value!r:.80} is unknown: use one of {', '.join(known)}"
    )


def check_floor(recall_floor: float) -> float:
    """Return a share from 0 to 1.

    Raises:
        InvalidInputError: it is something else.
    """
    if (
        isinstance(recall_floor, (int, float))
        and not isinstance(recall_floor, bool)
        and 0 <= recall_floor <= 1
    ):
        return float(recall_floor)
    raise InvalidInputError(
        ErrorKind.BAD_ARGUMENT, f"recall_floor is a share from 0 to 1, got {recall_floor!r:.80}"
    )
