"""What can be asked of one run: a model's activations over a tokenization?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actstore._lazy import lazy_import
from actstore.codec.layout import check_keeps_rows, describe_kept
from actstore.errors import ErrorKind, InvalidInputError, NotFoundError
from actstore.hook_points import canonical_hook_point
from actstore.log.values import Collection
from actstore.names import hook_point_folder
from actstore.pooled_tables import POOLINGS
from actstore.stats import HookPointStats, run_stats
from actstore.tokenization import Tokenization

if TYPE_CHECKING:
    from actstore.activations import Activations
    from actstore.codes import Codes
    from actstore.covariance import Covariance
    from actstore.pooled import Pooled
    from actstore.result import Result
    from actstore.store import Store


@dataclass(frozen=True, slots=True)
class Run:
    """One model revision over one tokenization, as of the store's version."""

    store: "Store"
    collection: Collection

    def __repr__(self) -> str:
        state = "complete" if self.is_complete else f"{self.n_units} of {len(self.tokenization.units)} units"
        return f"Run({self.id!r}, {len(self.hook_points)} hook points, {self.n_rows} rows, {state})"

    @property
    def id(self) -> str:
        """The run's name."""
        return self.collection.id

    @property
    def name(self) -> str:
        """The run's name."""
        return self.collection.id

    @property
    def config(self) -> dict[str, Any]:
        """Everything that shaped the stored numbers; its fingerprint is the run's identity."""
        return dict(self.collection.config)

    @property
    def model(self) -> dict[str, Any]:
        """The model: where it was loaded from (`source`), its revision, architecture and content hashes."""
        return {"source": self.collection.info.get("model_source"), **self.collection.config["model"]}

    @property
    def hook_points(self) -> list[str]:
        """Names of the stored hook points, in layer order."""
        return [h["name"] for h in self.collection.config["hook_points"]]

    @property
    def n_rows(self) -> int:
        """Number of token rows stored so far."""
        return self.collection.rows

    @property
    def n_units(self) -> int:
        """Number of units stored so far."""
        return len(self.collection.units)

    @property
    def is_complete(self) -> bool:
        """Whether the run is sealed: every unit of the tokenization is stored, or listed in `quarantined`."""
        return self.collection.is_sealed

    @property
    def keep(self) -> tuple[str, ...]:
        """What the run stores of its activations: `dense` rows, `pooled` document vectors, `codes`; one or several."""
        return tuple(self.collection.config.get("keep", ("dense",)))

    @property
    def poolings(self) -> tuple[str, ...]:
        """Which pooled vectors the run keeps, out of mean, last, max and weighted_mean; none if it keeps dense rows only."""
        return tuple(self.collection.config.get("poolings", POOLINGS)) if "pooled" in self.keep else ()

    @property
    def self_check(self) -> dict[str, Any] | None:
        """What running documents again alone, through plain transformers, differed by; None where that was not asked for.

        Per hook point the largest and mean difference of a row as a part of its length, and how many documents and rows were
        compared (FORMAT.md, section 6.4).
        """
        seal = self.collection.seal
        found = seal.meta.get("self_check") if seal else None
        return dict(found) if found else None

    @property
    def quarantined(self) -> dict[int, str]:
        """Units that a complete run is without, each with the reason: they failed for good, and their rows do not exist."""
        seal = self.collection.seal
        left_out = seal.meta.get("quarantined", {}) if seal is not None else {}
        return {int(unit): str(reason) for unit, reason in left_out.items()}

    @property
    def tokenization(self) -> Tokenization:
        """The token rows that this run's activations belong to."""
        return self.store.tokenization(self.collection.config["tokenization"])

    def d_model(self, hook_point: str) -> int:
        """Return the width of a hook point: the number of activations per row."""
        return int(self._hook_point_entry(hook_point)["d_model"])

    def activations(self, hook_point: str) -> "Activations":
        """Return the stored activations of a hook point, read on demand; aliases of the name are accepted.

        Raises:
            NotFoundError: the run has no such hook point; the message lists those it has.
            InvalidInputError: the run keeps no dense rows.
        """
        from actstore.activations import Activations

        name = self._hook_point_entry(hook_point)["name"]
        check_keeps_rows(self.collection)
        return Activations(self.store.storage, self.collection, name)

    def pooled(self, hook_point: str, pooling: str = "mean") -> "Pooled":
        """Return one vector per document at a hook point, read on demand; aliases of the name are accepted.

        Args:
            hook_point: One of the run's.
            pooling: `mean`, `last` (the last token), `max`, or `weighted_mean` (tokens weigh as much as their 1-based position).

        Raises:
            NotFoundError: the run has no such hook point.
            InvalidInputError: it keeps no pooled vectors, or not these; the message lists what it has.
        """
        from actstore.pooled import Pooled

        entry = self._hook_point_entry(hook_point)
        if pooling not in self.poolings:
            found = f"keeps {', '.join(self.poolings) or describe_kept(self.collection)}"
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"pooled vectors {pooling!r} of {entry['name']!r} were asked for, and run {self.id!r} {found}: "
                "ask for what there is, or ingest again with keep=['dense', 'pooled'] and poolings=[...]",
            )
        return Pooled(
            self.store.objects,
            self.collection,
            self.tokenization.units,
            hook_point=str(entry["name"]),
            d_model=int(entry["d_model"]),
            pooling=pooling,
        )

    def array_path(self, hook_point: str) -> str:
        """Return the key of the hook point's Zarr array under the store, for `zarr.open_array(store + "/" + key)`.

        Raises:
            NotFoundError: the run has no such hook point.
            InvalidInputError: the run keeps no dense rows.
        """
        name = self._hook_point_entry(hook_point)["name"]
        check_keeps_rows(self.collection)
        return f"runs/{self.id}/{hook_point_folder(name)}"

    def stats(self, hook_point: str) -> HookPointStats:
        """Return statistics of a hook point over all stored rows: moments, extremes, norms, non-finite counts.

        Of a run that keeps pooled vectors only, over all rows that they were made of. Reads one small object when the run is
        complete, one per unit before.
        """
        name = str(self._hook_point_entry(hook_point)["name"])
        return run_stats(self, [name])[name]

    def covariance(self, hook_point: str) -> "Covariance":
        """Return how the dimensions of a hook point vary together over all stored rows, of a run made with `covariance=True`.

        Reads one object when the run is complete, one per unit before.

        Raises:
            NotFoundError: the run has no such hook point.
            InvalidInputError: the run was made without covariances.
            FormatError: an object is missing or damaged.
        """
        from actstore.covariance import run_covariance

        return run_covariance(self, self._hook_point_entry(hook_point)["name"])

    def examples(self, target: Any, k: int = 20, **options: Any) -> "Result":
        """Return the contexts that most activate a neuron, direction or latent; see `actstore.query.examples.examples`."""
        module = lazy_import("actstore.query.examples", needed_for="examples()", extra="query")
        answer: Result = module.examples(self, target, k, **options)
        return answer

    def nearest(self, hook_point: str, query: Any, k: int = 20, **options: Any) -> "Result":
        """Return the stored contexts nearest to a row, a text or vectors; see `actstore.query.nearest.nearest`."""
        module = lazy_import("actstore.query.nearest", needed_for="nearest()", extra="query")
        answer: Result = module.nearest(self, hook_point, query, k, **options)
        return answer

    def knn_lm(self, query: Any, k: int = 1024, **options: Any) -> "Result":
        """Return the next tokens that the contexts nearest to a text or row vote for; see `actstore.query.knn_lm.knn_lm`."""
        module = lazy_import("actstore.query.knn_lm", needed_for="knn_lm()", extra="query")
        answer: Result = module.knn_lm(self, query, k, **options)
        return answer

    def codes(self, dictionary: str) -> "Codes":
        """Return the stored codes of this run's rows in a dictionary, read on demand.

        Raises:
            NotFoundError: the run was not encoded with that dictionary; the message lists those it was.
        """
        from actstore.codes import open_codes

        return open_codes(self, dictionary)

    def active(self, what: Any, dictionary: str, k: int = 20, **options: Any) -> "Result":
        """Return the latents that fire on a text, rows or a document; see `actstore.query.active.active`."""
        module = lazy_import("actstore.query.active", needed_for="active()", extra="query")
        answer: Result = module.active(self, what, dictionary, k, **options)
        return answer

    def match(self, pattern: Any, k: int = 20, **options: Any) -> "Result":
        """Return the contexts in which latents fire together; see `actstore.query.match.match`."""
        module = lazy_import("actstore.query.match", needed_for="match()", extra="query")
        answer: Result = module.match(self, pattern, k, **options)
        return answer

    def neighbours(self, latent: Any, k: int = 20, **options: Any) -> "Result":
        """Return the latents most like one, by decoder or by firing together; see `actstore.query.neighbours.neighbours`."""
        module = lazy_import("actstore.query.neighbours", needed_for="neighbours()", extra="query")
        answer: Result = module.neighbours(self, latent, k, **options)
        return answer

    def latents(self, dictionary: str, k: int | None = 20, **options: Any) -> "Result":
        """Return a dictionary's latents with their statistics on this run; see `actstore.query.latents.latents`."""
        module = lazy_import("actstore.query.latents", needed_for="latents()", extra="query")
        answer: Result = module.latents(self, dictionary, k, **options)
        return answer

    def encode_text(self, texts: Sequence[str], hook_point: str) -> list[Any]:
        """Return each text's tokens and activations at a hook point, through the run's own model.

        The model is loaded from where the run's was; that it is the same is checked. See
        `actstore.ingest.encode_text.encode_text`.
        """
        if isinstance(texts, str):
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"texts are a list of strings, got the one string {texts[:60]!r}: write [text]",
            )
        if "imported" in self.collection.config["model"]:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"run {self.id!r} was imported from another program's activations and has no model that texts could go "
                "through: query by a stored row or by vectors",
            )
        module = lazy_import("actstore.ingest.encode_text", needed_for="a query by text", extra="ingest")
        tokenization = self.tokenization
        answer: list[Any] = module.encode_text(
            model_source=self.collection.info["model_source"],
            expected_model=self.collection.config["model"],
            compute_dtype=self.collection.config["compute_dtype"],
            attn_implementation=self.collection.config["attn_implementation"],
            hook_point=self._hook_point_entry(hook_point)["name"],
            texts=list(texts),
            tokenizer_json=tokenization.tokenizer_json(),
            tokenizer_config=tokenization.tokenizer_config(),
            window=int(tokenization.config["window"]),
            add_special_tokens=bool(tokenization.config["add_special_tokens"]),
        )
        return answer

    def _hook_point_entry(self, hook_point: str) -> Mapping[str, Any]:
        name = canonical_hook_point(hook_point)
        for entry in self.collection.config["hook_points"]:
            if entry["name"] == name:
                found: Mapping[str, Any] = entry
                return found
        raise NotFoundError(
            ErrorKind.HOOK_POINT_NOT_FOUND,
            f"hook point {hook_point!r} is not stored in run {self.id!r}, which has: {', '.join(self.hook_points)}",
        )
