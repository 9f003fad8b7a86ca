"""What can be asked of one run: a model's activations over a tokenization?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actstore._lazy import lazy_import
from actstore.errors import ErrorKind, InvalidInputError, NotFoundError
from actstore.hook_points import canonical_hook_point
from actstore.log.values import Collection
from actstore.names import hook_point_folder
from actstore.stats import HookPointStats, empty_stats, is_stats_key, merge_stats, stats_from_table
from actstore.tokenization import Tokenization

if TYPE_CHECKING:
    from actstore.activations import Activations
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
        """Whether every unit of the tokenization is stored and the run is sealed."""
        return self.collection.is_sealed

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
        """
        from actstore.activations import Activations

        name = self._hook_point_entry(hook_point)["name"]
        return Activations(self.store.storage, self.collection, name)

    def array_path(self, hook_point: str) -> str:
        """Return the key of the hook point's Zarr array under the store, for `zarr.open_array(store + "/" + key)`."""
        return f"runs/{self.id}/{hook_point_folder(self._hook_point_entry(hook_point)['name'])}"

    def stats(self, hook_point: str) -> HookPointStats:
        """Return statistics of a hook point over all stored rows: moments, extremes, norms, non-finite counts.

        Reads one small object when the run is complete, one per unit before.
        """
        entry = self._hook_point_entry(hook_point)
        name = entry["name"]
        seal, units = self.collection.seal, self.collection.units.values()
        objects = seal.objects if seal is not None else (o for u in units for o in u.objects)
        total = empty_stats(name, int(entry["d_model"]))
        for obj in objects:
            if not is_stats_key(self.id, obj.key):
                continue
            total = merge_stats(total, stats_from_table(self.store.objects.table(obj))[name])
        return total

    def examples(self, target: Any, k: int = 20, **options: Any) -> "Result":
        """Return the contexts that most activate a neuron or direction; see `actstore.query.examples.examples`."""
        module = lazy_import("actstore.query.examples", needed_for="examples()", extra="query")
        answer: Result = module.examples(self, target, k, **options)
        return answer

    def nearest(self, hook_point: str, query: Any, k: int = 20, **options: Any) -> "Result":
        """Return the stored contexts nearest to a row, a text or vectors; see `actstore.query.nearest.nearest`."""
        module = lazy_import("actstore.query.nearest", needed_for="nearest()", extra="query")
        answer: Result = module.nearest(self, hook_point, query, k, **options)
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
