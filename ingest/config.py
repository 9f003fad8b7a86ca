"""What does the user ask of an ingest, and what of it shapes the stored numbers?"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from actstore.checks import check_whole
from actstore.errors import ErrorKind, InvalidInputError
from actstore.names import check_name

from .encoding.plan import POOL_TOP_M
from .encoding.postings_plan import DEFAULT_MEMORY_BYTES as POSTINGS_MEMORY_BYTES

DTYPES = {
    "fp32": "float32",
    "float32": "float32",
    "fp16": "float16",
    "float16": "float16",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
}
"""Accepted spellings of a floating-point type, to the one that is stored."""

CODE_DTYPES = ("float16", "float32")
CODECS = ("hot", "lz4", "cold")
POLICIES = ("error", "mask")
KEEPS = ("dense", "pooled", "codes")
POOLINGS = ("mean", "last", "max", "weighted_mean")


@dataclass(frozen=True, slots=True)
class IngestConfig:
    """One ingest: a model's activations over a corpus, as a run.

    >>> IngestConfig(corpus="news", model="models/tiny", hook_points=["layers.*.resid_post"], run="tiny@news").dtype
    'auto'
    """

    corpus: str
    """Name of a corpus in the store."""

    model: str
    """Local folder or hub name of a transformer with safetensors weights."""

    hook_points: Sequence[str]
    """Names, globs and ranges: `embed`, `layers.*.resid_post`, `layers.{4..8}.mlp_act`, `module:<path>`."""

    run: str
    """Name of the run, new or to be resumed."""

    revision: str | None = None
    """Branch, tag or commit of a hub model; pinned to the commit it names now."""

    tokenizer: str | None = None
    """Local folder or hub name; None for the model's own."""

    window: int | None = None
    """Tokens the model sees at once, special tokens included; None for the model's context, at most 4,096."""

    overlap: int = 0
    """Tokens that neighbouring windows of a long document share."""

    rows_per_unit: int | Literal["auto"] = "auto"
    """Row numbers per unit of work; "auto" fits it to the corpus (2,048 to 65,536)."""

    keep: Sequence[str] = ("dense",)
    """What is stored: `dense` rows, `pooled` document vectors, `codes` of the rows in dictionaries, or several of them."""

    poolings: Sequence[str] = POOLINGS
    """Which pooled vectors, of mean, last, max, weighted_mean (weights grow with the position); used where `keep` has pooled."""

    pool_special: bool = False
    """Whether special tokens enter pooled vectors and codes."""

    dictionary: Sequence[str] = ()
    """Dictionaries in the store, each of one of the hook points, whose codes `keep` asks for: rows are encoded as they come."""

    codes_dtype: str = "float16"
    """Stored type of the codes: float16 or float32."""

    pool_top_m: int = POOL_TOP_M
    """Latents whose pooled codes are kept of each document, those of the largest sums."""

    postings_memory_mb: int = POSTINGS_MEMORY_BYTES >> 20
    """MiB that each worker may take for building the codes' postings: the more, the less often all codes are read."""

    sample: float = 1.0
    """Share of the token rows that dense storage keeps, chosen by a hash of row number and `seed`."""

    seed: int = 0
    """Of `sample` and of what is drawn for `self_check`."""

    covariance: bool = False
    """Whether each hook point's full covariance is accumulated, d_model^2 numbers per unit."""

    dtype: str = "auto"
    """Stored type: float32 (fp32), float16 (fp16), bfloat16 (bf16), or int8 with a scale per row; "auto" for the one the
    model computes in."""

    compute_dtype: str = "auto"
    """Type the model computes in; "auto" for the one its weights are stored in."""

    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, `mps`; "auto" takes a GPU where there is one."""

    attn_implementation: str | None = None
    """`eager`, `sdpa`, `flash_attention_2`, ...; None for what transformers picks. Recorded."""

    compile: bool = False
    """Whether the model goes through torch.compile. Recorded: results differ in their last bits."""

    device_map: str | None = None
    """`auto`, `balanced`, ...: spreads one copy of the model over the worker's devices, for models larger than one."""

    gpus_per_worker: int | None = None
    """GPUs that each worker reserves on Ray; None for one (or a share of one) where there are GPUs."""

    batch_tokens: int = 8_192
    """Padded tokens per forward pass. Part of the fingerprint: bf16 results depend on the batch's shape."""

    codec: str = "hot"
    """`hot` (raw rows), `lz4` or `cold` (bf16 only): speed against size."""

    nonfinite: str = "error"
    """NaN or infinite activations: `error` stops the job, `mask` stores and counts them; queries leave them out."""

    workers: int = 1
    """Actors at most, each with its own copy of the model; they join as the cluster finds room for them."""

    min_workers: int = 1
    """Actors that must be ready before the first unit is begun."""

    ray_address: str | None = "local"
    """`local` starts Ray on this machine, `auto` joins the running cluster, `ray://host:port` a remote one; None runs in
    this process without Ray."""

    max_attempts: int = 3
    """Times a unit is tried on errors that may pass (a died actor, a storage failure) before the job fails."""

    allow_failed: int = 0
    """Units that may fail for good and be left out of the run (quarantined, and listed); more fail the job at its end."""

    straggler_factor: float = 4.0
    """A unit that runs this many times the median unit's time is given to a second worker too, once no other is left to
    begin; 0 never does."""

    self_check: float = 0.0
    """Share of the documents that are run again alone through plain transformers at the end, and compared; the differences
    are stored with the run."""

    commit_units: int = 64
    """Units per commit at most."""

    commit_interval_s: float = 5.0
    """Finished units wait at most this long for their commit: what a crash can cost to redo."""

    retry_s: float = 120.0
    """Seconds for which a storage that fails (commits, or all units) is tried again before the job gives up."""

    start_timeout_s: float = 900.0
    """Seconds for which Ray workers may wait for a place in the cluster; an autoscaler needs minutes."""

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> "IngestConfig":
        """Return the configuration that a TOML file holds; see `actstore.ingest.config_file`.

        Raises:
            NotFoundError: no such file.
            InvalidInputError: not TOML, an unknown key, a value of another type, or a field without default left out.
        """
        from .config_file import make_config, read_config_file

        return make_config(read_config_file(path).settings)

    def to_toml(self, *, store: str | None = None) -> str:
        """Return the TOML that `from_toml` reads as this configuration: fields that are not the default, and `store`.

        >>> print(IngestConfig("news", "gpt2", ["embed"], "gpt2@news", workers=2, ray_address=None).to_toml())
        corpus = "news"
        model = "gpt2"
        hook_points = ["embed"]
        run = "gpt2@news"
        workers = 2
        ray_address = "none"
        <BLANKLINE>
        """
        from .config_file import config_toml

        return config_toml(self, store=store)

    def check(self) -> "IngestConfig":
        """Return the configuration once all its values can work, whatever the store and the model.

        Raises:
            InvalidInputError: a value that cannot work, or two that cannot work together; the message names the field.
        """
        check_name(self.run, what="run name")
        check_name(self.corpus, what="corpus name")
        self._check_text()
        self._check_numbers()
        self._check_lists()
        self._check_together()
        return self

    def _check_text(self) -> None:
        for field, known in (
            ("dtype", ["auto", *DTYPES, "int8"]),
            ("compute_dtype", ["auto", *DTYPES]),
            ("codec", CODECS),
            ("codes_dtype", CODE_DTYPES),
            ("nonfinite", POLICIES),
        ):
            value = getattr(self, field)
            if not isinstance(value, str) or value not in known:
                raise _bad(field, value, f"one of {', '.join(known)}")
        for field in ("model", "device"):
            if not isinstance(getattr(self, field), str) or not getattr(self, field):
                raise _bad(field, getattr(self, field), "text")
        for field in ("tokenizer", "revision", "attn_implementation", "device_map", "ray_address"):
            value = getattr(self, field)
            if value is not None and (not isinstance(value, str) or not value):
                raise _bad(field, value, "text, or left out")
        for field in ("covariance", "pool_special", "compile"):
            if not isinstance(getattr(self, field), bool):
                raise _bad(field, getattr(self, field), "true or false")

    def _check_numbers(self) -> None:
        counts = "workers", "min_workers", "batch_tokens", "max_attempts", "commit_units", "pool_top_m"
        for field in (*counts, "postings_memory_mb"):
            check_whole(getattr(self, field), what=field, least=1)
        for field in ("seed", "allow_failed", "overlap"):
            check_whole(getattr(self, field), what=field, least=0)
        if self.gpus_per_worker is not None:
            check_whole(self.gpus_per_worker, what="gpus_per_worker", least=0)
        if self.window is not None:
            check_whole(self.window, what="window", least=2)
        if self.rows_per_unit != "auto":
            check_whole(self.rows_per_unit, what="rows_per_unit", least=1)
        shares = "a share above 0 and at most 1", "a share from 0 to 1"
        self._check_number("sample", shares[0], lambda x: 0 < x <= 1)
        self._check_number("self_check", shares[1], lambda x: 0 <= x <= 1)
        self._check_number("straggler_factor", "0 for never, or a number above 1", lambda x: x == 0 or x > 1)
        for field in ("commit_interval_s", "retry_s", "start_timeout_s"):
            self._check_number(field, "seconds of 0 or more", lambda x: x >= 0)

    def _check_number(self, field: str, expected: str, holds: Callable[[float], bool]) -> None:
        value = getattr(self, field)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not holds(value):
            raise _bad(field, value, expected)

    def _check_lists(self) -> None:
        lists = ("hook_points", None), ("keep", KEEPS), ("poolings", POOLINGS), ("dictionary", None)
        for field, known in lists:
            value = getattr(self, field)
            texts = not isinstance(value, str) and isinstance(value, Sequence)
            texts = texts and (len(value) > 0 or field == "dictionary")
            if not texts or not all(
                isinstance(v, str) and v and (known is None or v in known) for v in value
            ):
                names = {"hook_points": "hook points", "dictionary": "names"}
                expected = (
                    f"a non-empty list of {names[field]}"
                    if known is None
                    else f"a list of {', '.join(known)}"
                )
                raise _bad(field, value, expected)
            if field != "hook_points" and len(set(value)) < len(value):
                raise _bad(field, value, f"a list of {', '.join(known or ['names'])}, each once")

    def _check_together(self) -> None:
        if self.ray_address is None and self.workers > 1:
            raise _bad("workers", self.workers, "1 without Ray: drop --no-ray to use more")
        if self.min_workers > self.workers:
            raise _bad("min_workers", self.min_workers, f"at most workers, which is {self.workers}")
        if "pooled" not in self.keep:
            why = "left out where nothing is pooled: add pooled to keep"
            if set(self.poolings) != set(POOLINGS):
                raise _bad("poolings", self.poolings, why)
            if self.pool_special and "codes" not in self.keep:
                raise _bad("pool_special", self.pool_special, why)
        self._check_codes()
        if "dense" not in self.keep:
            for field, default in (("sample", 1.0), ("covariance", False), ("codec", "hot")):
                if getattr(self, field) != default:
                    raise _bad(
                        field,
                        getattr(self, field),
                        f"{default} where no dense rows are kept: add dense to keep",
                    )
            if self.dtype == "int8":
                raise _bad(
                    "dtype",
                    self.dtype,
                    "a floating-point type where no dense rows are kept: add dense to keep",
                )
        if self.dtype == "int8" and self.codec == "cold":
            raise _bad("codec", self.codec, "hot or lz4 with dtype int8, which zstd barely shrinks")
        if self.device_map is not None and self.device != "auto":
            raise _bad("device", self.device, "auto with device_map, which places the model itself")

    def _check_codes(self) -> None:
        if "codes" in self.keep:
            if not self.dictionary:
                raise _bad("dictionary", self.dictionary, "a list of dictionaries where keep has codes")
            if tuple(self.keep) == ("codes",) and self.self_check:
                why = "0 where only codes are kept, which are not compared: add dense or pooled to keep"
                raise _bad("self_check", self.self_check, why)
            return
        for field, default in (
            ("dictionary", ()),
            ("codes_dtype", "float16"),
            ("pool_top_m", POOL_TOP_M),
            ("postings_memory_mb", POSTINGS_MEMORY_BYTES >> 20),
        ):
            value = getattr(self, field)
            if (tuple(value) if field == "dictionary" else value) != default:
                raise _bad(field, value, "left out where no codes are kept: add codes to keep")


def _bad(field: str, value: object, expected: str) -> InvalidInputError:
    return InvalidInputError(ErrorKind.BAD_ARGUMENT, f"{field} must be {expected}, got {value!r:.80}")


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return one line per leaf that differs between two configurations, `name: old -> new`.

    >>> config_differences({"a": 1, "m": {"x": 1}}, {"a": 1, "m": {"x": 2}})
    ['m.x: 1 -> 2']
    """
    lines: list[str] = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += config_differences(a, b, f"{prefix}{name}.")
        elif a != b:
            lines.append(f"{prefix}{name}: {a!r} -> {b!r}")
    return lines
