"""What fixes the codes of a run in one dictionary, and what must a worker know of them? (FORMAT.md, section 8)"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from actstore.checks import check_whole
from actstore.dictionary import Dictionary
from actstore.errors import ErrorKind, InvalidInputError
from actstore.log.values import Collection
from actstore.run import Run
from actstore.sparse.rows import VALUE_DTYPES

KIND = "codes"

POOL_TOP_M = 512
"""Latents kept of each document: a tenth of the codes' own size for documents of 500 tokens with 32 codes each."""

COMPUTE_DTYPES = ("float32", "bfloat16")
"""Dtypes in which rows may be multiplied with a dictionary."""


@dataclass(frozen=True, slots=True)
class CodesSettings:
    """What a user may choose of codes; part of their fingerprint."""

    value_dtype: str = "float16"
    """Of the codes: float16 or float32."""

    pool_top_m: int | None = POOL_TOP_M
    """Latents kept of each document in the pooled codes; None for all."""

    pool_special: bool = False
    """Whether special tokens enter pooled codes."""

    compute_dtype: str = "float32"
    """Of the product of rows and dictionary: float32, or bfloat16 on a GPU, which is faster and not exact."""

    def check(self) -> "CodesSettings":
        """Return this, if all of it can be.

        Raises:
            InvalidInputError: something cannot; the message names it.
        """
        for name, known in (("value_dtype", tuple(VALUE_DTYPES)), ("compute_dtype", COMPUTE_DTYPES)):
            value = getattr(self, name)
            if value not in known:
                raise InvalidInputError(
                    ErrorKind.BAD_ARGUMENT, f"{name} must be one of {', '.join(known)}, got {value!r:.80}"
                )
        if self.pool_top_m is not None:
            check_whole(self.pool_top_m, what="pool_top_m", least=1)
        if not isinstance(self.pool_special, bool):
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT, f"pool_special must be true or false, got {self.pool_special!r:.80}"
            )
        return self


@dataclass(frozen=True, slots=True)
class CodesPlan:
    """What a worker must know to write codes; pickles."""

    codes: str
    """Id of the codes."""
    fingerprint: str
    """Of their configuration."""
    dictionary: str
    run: str
    hook_point: str
    """The run's name of it."""
    n_latents: int
    settings: CodesSettings
    epoch: int = 0
    """Of the job, where codes are committed with the units of their run."""


def codes_config(
    dictionary: Dictionary, run: Run, hook_point: str, settings: CodesSettings, *, rows_dtype: str
) -> dict[str, Any]:
    """Return what shapes the codes, as it is stored and fingerprinted.

    Args:
        dictionary: Of the codes.
        run: Whose rows.
        hook_point: The run's name of the dictionary's hook point.
        settings: As chosen.
        rows_dtype: Of the activations that are encoded: the stored ones, or those that the model computed.
    """
    return {
        "format": 1,
        "dictionary": dictionary.id,
        "dictionary_fingerprint": dictionary.fingerprint,
        "run": run.id,
        "run_fingerprint": run.collection.fingerprint,
        "tokenization": run.collection.config["tokenization"],
        "hook_point": hook_point,
        "n_latents": dictionary.n_latents,
        "value_dtype": settings.value_dtype,
        "rows_per_unit": int(run.collection.config["rows_per_unit"]),
        "pool_top_m": settings.pool_top_m,
        "pool_special": settings.pool_special,
        "encoder": {"compute_dtype": settings.compute_dtype, "rows_dtype": rows_dtype},
    }


def codes_plan(collection: Collection, *, epoch: int = 0) -> CodesPlan:
    """Return what a worker must know of codes, from what is stored of them and nothing else."""
    config: Mapping[str, Any] = collection.config
    return CodesPlan(
        codes=collection.id,
        fingerprint=collection.fingerprint,
        dictionary=config["dictionary"],
        run=config["run"],
        hook_point=config["hook_point"],
        n_latents=int(config["n_latents"]),
        settings=CodesSettings(
            value_dtype=config["value_dtype"],
            pool_top_m=config["pool_top_m"],
            pool_special=bool(config["pool_special"]),
            compute_dtype=config["encoder"]["compute_dtype"],
        ),
        epoch=epoch,
    )


def codes_key(codes: str, unit: int, attempt: str) -> str:
    """Return the key of a unit's codes."""
    return f"codes/{codes}/units/{unit:08}-{attempt}.bin"
