"""Which words of the vocabulary does a latent promote and suppress? Its decoder direction times the unembedding.

That is the direct effect of a latent on the logits, whatever later layers make of it: "logit weights". The direction goes
through the final norm's gain (and, of a LayerNorm, loses its mean) but is not divided by the stream's length, a positive
number that is the same for all tokens of a row; biases, scales and caps of the logits are left out. Logits are computed for
some latents at a time and only the ends of them are kept.

Source: nostalgebraist (2020), "interpreting GPT: the logit lens"; Bricken et al. (2023), "Towards Monosemanticity", the
features' "logit weights".
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.latent_stats import LATENT_STATS_SCHEMA, TOP_PROMOTED

from .unembedding import Unembedding

if TYPE_CHECKING:
    import torch

BLOCK_BYTES: Final = 96 << 20
"""Of logits held at once."""

_VOCABULARY_BLOCK: Final = 8192
"""Rows of the unembedding that are widened to float32 at a time."""

_GROUP: Final = 64
"""Tokens whose largest logit is looked at first."""

_MIN_LATENTS, _MAX_LATENTS = 64, 1024
"""Latents of a block: enough that widening the matrix costs little beside the product."""


@dataclass(frozen=True, slots=True, eq=False)
class Ends:
    """The tokens with the largest, or smallest, logits of some latents, the most extreme first."""

    token_ids: npt.NDArray[np.int32]
    """Shape (n, k); of equal logits the lowest token first."""
    logits: npt.NDArray[np.float32]
    """Shape (n, k)."""


def promoted_ends(
    directions: Callable[[int, int], npt.NDArray[np.float32]],
    n_latents: int,
    unembedding: Unembedding,
    token_ids: npt.NDArray[np.integer[Any]],
    *,
    k: int = TOP_PROMOTED,
    device: str = "cpu",
    block_bytes: int = BLOCK_BYTES,
) -> tuple[Ends, Ends]:
    """Return the tokens that latents promote and suppress most.

    Memory: `block_bytes` of logits, and some MiB of the unembedding, which is mapped from its file.

    Args:
        directions: Gives the decoder rows of the latents `[start, stop)`, shape (stop - start, d_model).
        n_latents: How many there are.
        unembedding: Of the model.
        token_ids: The vocabulary. Rows of the matrix for other ids, padding, are never among the answers.
        k: Tokens of each list; fewer if there are fewer.
        device: Where products are computed.
        block_bytes: Logits held at once.
    """
    import torch
    from safetensors import safe_open

    known = np.unique(token_ids)
    known = known[(known >= 0) & (known < unembedding.n_tokens)]
    k = min(k, len(known))
    width = int(known[-1]) + 1 if k else 0
    unknown = np.ones(width, bool)
    unknown[known] = False
    holes = torch.from_numpy(np.flatnonzero(unknown)).to(device)
    per_block = max(_MIN_LATENTS, min(_MAX_LATENTS, block_bytes // max(1, 4 * width)))
    found: tuple[list[Any], list[Any]] = ([], [])
    with safe_open(unembedding.path, framework="pt") as file, torch.inference_mode():
        matrix = file.get_slice(unembedding.tensor)
        for start in range(0, n_latents if k else 0, per_block):
            stop = min(start + per_block, n_latents)
            folded = torch.from_numpy(unembedding.folded(directions(start, stop))).to(device)
            logits = _logits(folded, matrix, width)
            for side, sign in zip(found, (1, -1), strict=True):
                scores = logits if sign > 0 else logits.neg_()
                scores[:, width:] = -torch.inf
                scores[:, holes] = -torch.inf
                ids, best = _top(scores, k)
                side.append((ids.to("cpu", torch.int32).numpy(), (sign * best).to("cpu").numpy()))
    high, low = (_ends(side, k) for side in found)
    return high, low


def promoted_columns(
    ends: tuple[Ends, Ends] | None, n_latents: int, vocabulary: pa.Table
) -> dict[str, pa.Array]:
    """Return the columns `promoted` and `suppressed` of `LATENT_STATS_SCHEMA`; all null where there are no logits.

    Args:
        ends: What `promoted_ends` returned; None where there is no unembedding.
        n_latents: Rows.
        vocabulary: Columns token_id and token, of the run's tokenization.
    """
    names = ("promoted", "suppressed")
    if ends is None:
        kind = LATENT_STATS_SCHEMA.field(names[0]).type
        return {name: pa.nulls(n_latents, kind) for name in names}
    ids = vocabulary["token_id"].to_numpy()
    order = np.argsort(ids, kind="stable")
    return {
        name: _column(end, n_latents, ids, order, vocabulary["token"])
        for name, end in zip(names, ends, strict=True)
    }


def _column(
    end: Ends, n_latents: int, ids: npt.NDArray[Any], order: npt.NDArray[np.int64], tokens: pa.ChunkedArray
) -> pa.Array:
    flat = end.token_ids.ravel()
    places = order[np.searchsorted(ids, flat, sorter=order)] if len(flat) else np.zeros(0, np.int64)
    kind = LATENT_STATS_SCHEMA.field("promoted").type.value_type
    words = tokens.take(pa.array(places)).combine_chunks()
    entries = pa.StructArray.from_arrays(
        [pa.array(flat, pa.int32()), words, pa.array(end.logits.ravel(), pa.float32())], fields=list(kind)
    )
    k = end.token_ids.shape[1]
    return pa.ListArray.from_arrays(pa.array(np.arange(n_latents + 1, dtype=np.int32) * np.int32(k)), entries)


def _logits(folded: "torch.Tensor", matrix: Any, width: int) -> "torch.Tensor":
    """Return the products with the first `width` rows of the matrix, with room for whole groups behind them."""
    import torch

    padded = -(-width // _GROUP) * _GROUP
    logits = torch.empty((len(folded), padded), device=folded.device)
    for first in range(0, width, _VOCABULARY_BLOCK):
        last = min(first + _VOCABULARY_BLOCK, width)
        part = matrix[first:last].to(folded.device, torch.float32)
        logits[:, first:last] = folded @ part.T
    return logits


def _top(scores: "torch.Tensor", k: int) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Return the columns of the k largest scores of every row, largest first, and the scores; of equal ones the first column.

    Every one of them is in one of the k groups of columns with the largest maxima, of equal ones the first groups: each of
    these has a column that comes before all columns of any other group.
    """
    import torch

    n, width = scores.shape
    grouped = scores.view(n, width // _GROUP, _GROUP)
    order = torch.sort(grouped.amax(dim=2), dim=1, descending=True, stable=True).indices
    groups = torch.sort(order[:, :k], dim=1).values
    candidates = torch.gather(grouped, 1, groups[:, :, None].expand(-1, -1, _GROUP)).reshape(n, -1)
    best = torch.sort(candidates, dim=1, descending=True, stable=True)
    places = best.indices[:, :k]
    columns = torch.gather(groups, 1, places // _GROUP) * _GROUP + places % _GROUP
    return columns, best.values[:, :k]


def _ends(parts: list[Any], k: int) -> Ends:
    ids = [part[0] for part in parts] or [np.zeros((0, k), np.int32)]
    logits = [part[1] for part in parts] or [np.zeros((0, k), np.float32)]
    return Ends(np.concatenate(ids), np.concatenate(logits).astype(np.float32))
