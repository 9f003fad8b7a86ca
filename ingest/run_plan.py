"""What of an ingest is stored with its run, and what do workers make of it?

`run_config` says what shapes the run's numbers: it is stored and fingerprinted (FORMAT.md, section 6.5). `make_plan` turns
what is stored, and nothing else, into what a worker needs, so that a run is finished as it was begun. Settings enter the
configuration only where they are not the default: runs made before a setting existed go on unchanged.
"""

from collections.abc import Mapping
from typing import Any

from actstore.codec.spec import ShardSpec, plan_spec
from actstore.errors import ConflictError, ErrorKind, InvalidInputError
from actstore.int8 import Int8Transform
from actstore.log import fingerprint
from actstore.log.values import Collection
from actstore.sampling import most_kept, plan_stored_rows
from actstore.tokenization import Tokenization

from .batches import BATCH_PLAN_VERSION
from .config import DTYPES, KEEPS, POOLINGS, IngestConfig, config_differences
from .host import ModelDescription
from .unit import RunPlan

MAX_WINDOW = 4096
"""Of models that would take more: attention's cost grows with its square."""


def dtype_to_store(config: IngestConfig, model: ModelDescription) -> str:
    """Return the dtype that rows are stored in.

    Raises:
        InvalidInputError: the codec cannot store it.
    """
    names = {"auto": model.compute_dtype, "int8": "int8", **DTYPES}
    stored = names[config.dtype]
    if config.codec == "cold" and stored != "bfloat16":
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"codec 'cold' is for bfloat16 and would barely shrink {stored}: store bf16, or use hot or lz4",
        )
    return stored


def tokenize_settings(config: IngestConfig, model: ModelDescription) -> dict[str, Any]:
    """Return how an ingest has a corpus tokenized, as arguments of `tokenize_corpus`."""
    return {
        "revision": None if config.tokenizer else config.revision,
        "window": config.window or min(model.context or 1024, MAX_WINDOW),
        "overlap": config.overlap,
        "rows_per_unit": config.rows_per_unit,
    }


def check_same_config(existing: Collection, wanted: Mapping[str, Any]) -> None:
    """Raise if a run that exists has another configuration than is asked for.

    Raises:
        ConflictError: CONFIG_DIFFERS: it has; the message lists the differences.
    """
    if existing.fingerprint != fingerprint(wanted):
        lines = "\n  ".join(config_differences(existing.config, wanted))
        raise ConflictError(
            ErrorKind.CONFIG_DIFFERS,
            f"run {existing.id!r} exists with another configuration (stored -> asked):\n  {lines}\n"
            "Give the same settings to go on with it, or another run name",
        )


def run_config(
    config: IngestConfig,
    model: ModelDescription,
    tokenization: Tokenization,
    *,
    existing: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, ShardSpec]]:
    """Return what shapes the run's numbers, as stored and fingerprinted, and the shard layout by hook point.

    Args:
        config: The ingest.
        model: The loaded model.
        tokenization: Of the corpus.
        existing: Configuration of the run if there is one already: what was planned for it is not planned anew.

    Raises:
        InvalidInputError: a dtype that the codec cannot store, or rows too wide for any layout.
    """
    stored = dtype_to_store(config, model)
    rows_per_unit, sampled = tokenization.rows_per_unit, {}
    if config.sample < 1:
        rows_per_unit = _stored_rows_per_unit(config, model, tokenization, stored, existing or {})
        sampled = {
            "sample": {"rate": float(config.sample), "seed": config.seed},
            "stored_rows_per_unit": rows_per_unit,
        }
    specs = {
        name: plan_spec(rows_per_unit=rows_per_unit, d_model=width, dtype=stored, codec=config.codec)
        for name, width in model.hook_points
    }
    return {
        "format": 1,
        "model": dict(model.fingerprint),
        "tokenization": tokenization.id,
        "tokenization_fingerprint": tokenization.collection.fingerprint,
        "rows_per_unit": tokenization.rows_per_unit,
        "hook_points": [_hook_point(name, width, model.heads.get(name)) for name, width in model.hook_points],
        "dtype": stored,
        "compute_dtype": model.compute_dtype,
        "codec": config.codec,
        "rows_per_shard": {name: spec.rows_per_shard for name, spec in specs.items()},
        "rows_per_chunk": {name: spec.rows_per_chunk for name, spec in specs.items()},
        "batch_tokens": config.batch_tokens,
        "batch_plan": BATCH_PLAN_VERSION,
        "equal_lengths": model.equal_lengths,
        "attn_implementation": model.attn_implementation,
        "nonfinite": config.nonfinite,
        **_kept(config),
        **sampled,
        **({"covariance": True} if config.covariance else {}),
        **({"compile": True} if model.compile else {}),
    }, specs


def make_plan(run: Collection, *, epoch: int) -> RunPlan:
    """Return what a worker must know of a run, from what is stored of it.

    Args:
        run: The run's collection.
        epoch: Of the job.
    """
    config = run.config
    sample = config.get("sample", {})
    int8 = {name: Int8Transform.from_json(t) for name, t in run.info.get("int8", {}).items()}
    return RunPlan(
        run=run.id,
        fingerprint=run.fingerprint,
        epoch=epoch,
        tokenization=config["tokenization"],
        specs=stored_specs(config),
        rows_per_unit=int(config["rows_per_unit"]),
        nonfinite=config["nonfinite"],
        keep=tuple(config.get("keep", ("dense",))),
        poolings=tuple(config.get("poolings", ())),
        pool_special=bool(config.get("pool_special", False)),
        sample=float(sample.get("rate", 1.0)),
        seed=int(sample.get("seed", 0)),
        int8=int8 or None,
        covariance=bool(config.get("covariance", False)),
        compute_dtype=config["compute_dtype"],
        stored_rows_per_unit=config.get("stored_rows_per_unit"),
    )


def stored_specs(config: Mapping[str, Any]) -> dict[str, ShardSpec]:
    """Return the shard layout by hook point that a run's configuration fixes, in stored order."""
    return {
        h["name"]: ShardSpec(
            rows_per_shard=int(config["rows_per_shard"][h["name"]]),
            rows_per_chunk=int(config["rows_per_chunk"][h["name"]]),
            d_model=int(h["d_model"]),
            dtype=config["dtype"],
            codec=config["codec"],
        )
        for h in config["hook_points"]
    }


def _hook_point(name: str, width: int, n_heads: int | None) -> dict[str, Any]:
    return {"name": name, "d_model": width, **({} if n_heads is None else {"n_heads": n_heads})}


def _kept(config: IngestConfig) -> dict[str, Any]:
    if tuple(config.keep) == ("dense",):
        return {}
    pooled = {"poolings": [p for p in POOLINGS if p in config.poolings]}
    codes = {
        "dictionaries": sorted(config.dictionary),
        "value_dtype": config.codes_dtype,
        "pool_top_m": config.pool_top_m,
    }
    return {
        "keep": [k for k in KEEPS if k in config.keep],
        **(pooled if "pooled" in config.keep else {}),
        **({"codes": codes} if "codes" in config.keep else {}),
        **({"pool_special": True} if config.pool_special else {}),
    }


def _stored_rows_per_unit(
    config: IngestConfig,
    model: ModelDescription,
    tokenization: Tokenization,
    dtype: str,
    existing: Mapping[str, Any],
) -> int:
    if "stored_rows_per_unit" in existing:
        return int(existing["stored_rows_per_unit"])
    units = tokenization.collection.units
    most = most_kept(
        ((u, units[u].rows) for u in units),
        rows_per_unit=tokenization.rows_per_unit,
        rate=config.sample,
        seed=config.seed,
    )
    widths = [width for _, width in model.hook_points]
    return plan_stored_rows(most, widths=widths, dtype=dtype, codec=config.codec)
