"""Which direction of a hook point tells two kinds of documents apart, and how well?

The difference of the mean activations of the two kinds, from documents that the model was trained on, without its part
along the middle of the two means: so 0 lies between the kinds, and a positive projection reads "more like the first".
How often that is right is counted on documents that were held out.
Source: Marks and Tegmark (2023), "The Geometry of Truth", section 5 (mass-mean probing, without the covariance).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.errors import ErrorKind, InvalidInputError

from .facts import Bools, Ints, TokenFacts

Scan = Callable[[], Iterable[tuple[Ints, npt.NDArray[Any]]]]


@dataclass(frozen=True, slots=True, eq=False)
class KindDirection:
    """A direction from one kind of documents to another."""

    toward: str
    away: str
    vector: npt.NDArray[np.float64]
    """Shape (d_model,), of length 1; orthogonal to the middle of the kinds' means."""
    accuracy: float
    """Share of held-out tokens whose projection has their own kind's sign; both kinds weigh the same."""
    n_held_out: int
    """Held-out tokens that were asked."""


def separate_kinds(scan: Scan, facts: TokenFacts, *, toward: str, away: str) -> KindDirection:
    """The direction from documents of kind `away` to those of kind `toward`; two scans, memory of one batch.

    Raises:
        InvalidInputError: no trained or no held-out tokens of one of the kinds.
    """
    groups = [(kind, held_out) for kind in (toward, away) for held_out in (False, True)]
    masks = {group: _group(facts, *group) for group in groups}
    for (kind, held_out), mask in masks.items():
        if not mask.any():
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"a direction needs {'held-out' if held_out else 'trained'} tokens of kind {kind!r}, found none; "
                f"kinds are {', '.join(facts.kinds)}",
            )
    means = _means(scan(), facts, [masks[toward, False], masks[away, False]])
    vector, middle = means[0] - means[1], (means[0] + means[1]) / 2
    vector -= middle * (vector @ middle) / max(float(middle @ middle), np.finfo(np.float64).tiny)
    vector /= np.linalg.norm(vector)
    right = [0, 0]
    for rows, acts_td in scan():
        at = facts.index(rows)
        above = acts_td.astype(np.float64) @ vector > 0
        right[0] += int((above & masks[toward, True][at]).sum())
        right[1] += int((~above & masks[away, True][at]).sum())
    asked = [int(masks[toward, True].sum()), int(masks[away, True].sum())]
    accuracy = (right[0] / asked[0] + right[1] / asked[1]) / 2
    return KindDirection(toward, away, vector, accuracy, sum(asked))


def _group(facts: TokenFacts, kind: str, held_out: bool) -> Bools:
    code = facts.kinds.index(kind) if kind in facts.kinds else -1
    mask: Bools = facts.is_shown & (facts.kind_codes == code) & (facts.is_held_out == held_out)
    return mask


def _means(
    batches: Iterable[tuple[Ints, npt.NDArray[Any]]], facts: TokenFacts, masks: list[Bools]
) -> list[npt.NDArray[np.float64]]:
    sums: list[Any] = [0.0] * len(masks)
    for rows, acts_td in batches:
        at = facts.index(rows)
        for i, mask in enumerate(masks):
            sums[i] = sums[i] + acts_td[mask[at]].sum(axis=0, dtype=np.float64)
    return [np.asarray(total / mask.sum()) for total, mask in zip(sums, masks, strict=True)]
