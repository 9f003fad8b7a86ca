"""What happens, in order, when activations that somebody else harvested become a run?

The source is hashed and its tokens are read once; its documents become a corpus, its token ids a tokenization, and its
activations, unit by unit, a sealed run. Each step can be repeated: the same call again finishes what is not done and
changes nothing that is; a source that has changed meanwhile is refused.
"""

import os
import platform
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import actstore
from actstore.codec.spec import plan_spec
from actstore.corpus import Corpus
from actstore.errors import ConflictError, ErrorKind
from actstore.ingest.committer import KIND
from actstore.ingest.config import DTYPES, config_differences
from actstore.ingest.importing import import_corpus
from actstore.ingest.progress import ProgressCallback
from actstore.ingest.tokenizers import FastTokenizer, load_tokenizer, vocabulary_table
from actstore.ingest.windows import auto_rows_per_unit
from actstore.log import fingerprint
from actstore.log.values import Collection, Create
from actstore.store import Store, open_store
from actstore.tokenization import Tokenization

from .copying import copy_units
from .id_tokenizer import id_tokenizer, words_table
from .opening import open_activations
from .scan import TokenScan, scan_tokens
from .settings import Settings, bad_argument, check_settings, dtype_to_store
from .source import ActivationSource, HookPointNames
from .spelling import DecodingSpeller, IdSpeller, Speller, WordSpeller
from .tokens import TokensPlan, tokens_config, write_tokens

_BYTES_PER_TOKEN = 4
"""What `auto_rows_per_unit` takes a token of text for."""


@dataclass(frozen=True, slots=True)
class ImportRunReport:
    """What an import of activations did."""

    run: str
    version: int
    """Store version that has the whole run."""
    format: str
    corpus: str
    tokenization: str
    hook_points: tuple[str, ...]
    dtype: str
    n_documents: int
    """Contexts or requests with at least one token."""
    n_rows: int
    n_units: int
    nbytes: int
    """Stored bytes of the run."""
    nonfinite: int
    units_this_job: int
    """Units that this call stored; 0 if all was there."""
    elapsed_s: float


def import_run(
    store: Store | str | os.PathLike[str],
    run: str,
    source: str | os.PathLike[str],
    *,
    format: Literal["saelens", "vllm", "arrays"] | None = None,
    hook_points: HookPointNames = None,
    layer_ids: Sequence[int] | None = None,
    tokens: Any = None,
    tokenizer: Any = None,
    corpus: str | None = None,
    model: str | None = None,
    dtype: str | None = None,
    codec: str = "hot",
    nonfinite: str = "error",
    rows_per_unit: int | Literal["auto"] = "auto",
    special_ids: Iterable[int] = (),
    fingerprint_files: Literal["full", "sampled"] = "full",
    progress: ProgressCallback | None = None,
    notice: Callable[[str], None] | None = None,
) -> ImportRunReport:
    """Make a run of the store out of activations that another program harvested, and return what was done.

    Idempotent and resumable. Numbers are stored bit for bit as they were found. Cost: the source is read once for its hash,
    its tokens three times, its activations once. Memory: two units' rows of every hook point, one batch of tokens, and what
    the format needs per file or document (16 to 150 bytes).

    Args:
        store: The store, or where it is (made if absent).
        run: Name of the run, new or to be finished.
        source: Folder that SAELens or vLLM wrote; or a file or folder of `.npy` or safetensors arrays.
        format: Of the source; None finds out.
        hook_points: Which place each array is. SAELens: by column, needed where the column has no hook point's name, as
            `{"model.layers.1": "layers.1.resid_post"}`. vLLM: one name for each layer stored, or by its index. Arrays: by
            stem or tensor name. Aliases such as `blocks.3.hook_resid_post` are translated; a mapping also selects.
        layer_ids: Of vLLM, instead of `hook_points`: the `eagle_aux_hidden_state_layer_ids` that it was given.
        tokens: Of arrays: the table of tokens, with `doc_id` and `token_id`, and perhaps `position`, `token`, `char_start`
            and `char_end`: a Parquet, CSV or JSONL file, a table, or columns by name. None for `tokens.*` beside them.
        tokenizer: The model's: folder, hub name, or object; None if it is not known, and then tokens are called `<id>`.
        corpus: Name of the corpus made of the documents, default the run's name; a corpus that is there must be the same.
            With `char_start`, the corpus whose documents the table numbers, imported before.
        model: What to call the model; there is no way to check it.
        dtype: None stores what was found. `float32` widens or, for float64, rounds; `bfloat16` says that 16-bit integers are
            the bits of bfloat16.
        codec: As in `IngestConfig`.
        nonfinite: As in `IngestConfig`.
        rows_per_unit: Rows of one unit of work; "auto" gives a power of two that fits.
        special_ids: Token ids that are special, where no tokenizer says so.
        fingerprint_files: "full" hashes every byte of the source, "sampled" sizes, beginnings, ends and some pieces.
        progress: Called with `Progress` as documents and units are done.
        notice: Called with a line of text as each step begins.

    Raises:
        NotFoundError: nothing is at `source`, or a name is no hook point's.
        InvalidInputError: the source is damaged or its numbers do not agree, arguments that do not fit it, or numbers that
            are not finite.
        ConflictError: the store has another run or other documents under the name, or the source has changed.
        StorageError: the store cannot be written; run again to go on.

    >>> import tempfile, numpy
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     numpy.save(f"{folder}/acts.npy", numpy.eye(3, dtype=numpy.float32))
    ...     tokens = {"doc_id": [0, 0, 1], "token_id": [5, 7, 5]}
    ...     report = import_run(
    ...         "memory://doctest-import-run", "r", f"{folder}/acts.npy", hook_points="embed", tokens=tokens
    ...     )
    >>> report.n_rows, report.n_documents, report.dtype
    (3, 2, 'float32')
    """
    asked = check_settings(
        Settings(
            run=run,
            corpus=corpus if corpus is not None else run,
            model=model,
            dtype=DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype,
            codec=codec,
            nonfinite=nonfinite,
            rows_per_unit=rows_per_unit,
            full=fingerprint_files == "full",
            special_ids=tuple(sorted({int(i) for i in special_ids})),
        ),
        fingerprint_files,
    )
    opened = open_activations(
        source, format=format, hook_points=hook_points, layer_ids=layer_ids, tokens=tokens, dtype=asked.dtype
    )
    started = time.monotonic()
    store = open_store(store, create=True) if isinstance(store, str | os.PathLike) else store.refresh()
    job = _Job(store, opened, asked, tokenizer, progress, notice or (lambda _: None))
    n_new = job.run()
    return job.report(n_new, time.monotonic() - started)


@dataclass(slots=True)
class _Job:
    store: Store
    source: ActivationSource
    asked: Settings
    tokenizer: Any
    progress: ProgressCallback | None
    say: Callable[[str], None]

    def run(self) -> int:
        """Do what is not done, and return how many units of the run that was."""
        stored = dtype_to_store(self.source, self.asked)
        self.say(f"hashing {self.source.description}")
        model = self._model()
        self._check_existing(model)
        tokenization = self._tokenization()
        collection = self._create_or_find(model, tokenization, stored)
        if collection.is_sealed:
            self.say(f"run {self.asked.run} is complete already")
            return 0
        self.say(f"copying activations into run {self.asked.run}")
        return copy_units(self.store, collection, tokenization, self.source, progress=self.progress)

    def report(self, n_new: int, elapsed_s: float) -> ImportRunReport:
        """Return what the store has now."""
        run = self.store.refresh().run(self.asked.run)
        tokenization = run.tokenization
        meta = tokenization.collection.seal.meta if tokenization.collection.seal else {}
        return ImportRunReport(
            run=run.id,
            version=self.store.version,
            format=self.source.format,
            corpus=tokenization.corpus.id,
            tokenization=tokenization.id,
            hook_points=tuple(run.hook_points),
            dtype=run.config["dtype"],
            n_documents=int(meta["n_documents"]) - int(meta["n_empty"]),
            n_rows=run.n_rows,
            n_units=run.n_units,
            nbytes=run.collection.nbytes,
            nonfinite=run.collection.nonfinite,
            units_this_job=n_new,
            elapsed_s=elapsed_s,
        )

    def _model(self) -> dict[str, Any]:
        """Return what stands for the weights in the run's configuration: the name given, and where the numbers are from."""
        arrays = {point.name: point.source for point in self.source.hook_points}
        return {
            "name": self.asked.model,
            "imported": {
                "format": self.source.format,
                "content_sha256": self.source.fingerprint(full=self.asked.full),
                "content": "full" if self.asked.full else "sampled",
                "arrays": arrays,
            },
        }

    def _check_existing(self, model: Mapping[str, Any]) -> None:
        """Refuse another source under the run's name before anything is written."""
        existing = self.store.state.collections.get((KIND, self.asked.run))
        if existing is not None and existing.config["model"] != model:
            raise _differs(self.asked.run, existing.config, {**existing.config, "model": model})

    def _tokenization(self) -> Tokenization:
        """Return the tokenization of the source's tokens, made where it is missing."""
        self.say("reading tokens")
        scan = scan_tokens(self.source)
        if self.tokenizer is not None:
            tokenizer = load_tokenizer(self.tokenizer)
            vocabulary = vocabulary_table(tokenizer)
        else:
            tokenizer = id_tokenizer(scan.words, self.asked.special_ids)
            vocabulary = words_table(scan.words)
        existing = self.store.refresh().state.collections.get(("corpus", self.asked.corpus))
        if existing is not None:
            corpus = self.store.corpus(self.asked.corpus)
            plan = TokensPlan(corpus, tokenizer, vocabulary, self._tokens_config(corpus, tokenizer, scan))
            made = self.store.state.collections.get(("tokenization", plan.id))
            if made is not None and made.is_sealed and made.fingerprint == plan.fingerprint:
                return self.store.tokenization(plan.id)
        speller = self._speller(tokenizer)
        corpus = self.store.corpus(self.asked.corpus) if speller is None else self._corpus(speller)
        plan = TokensPlan(corpus, tokenizer, vocabulary, self._tokens_config(corpus, tokenizer, scan))
        self.say(f"storing {scan.n_rows:,} tokens")
        return write_tokens(self.store, plan, self.source, speller, progress=self.progress)

    def _speller(self, tokenizer: FastTokenizer) -> Speller | None:
        """Return what finds text and characters; None where the source says which characters of a corpus its tokens are."""
        if self.source.has_spans:
            return None
        if self.tokenizer is not None:
            return DecodingSpeller(tokenizer)
        return WordSpeller() if self.source.has_words else IdSpeller()

    def _tokens_config(self, corpus: Corpus, tokenizer: FastTokenizer, scan: TokenScan) -> dict[str, Any]:
        return tokens_config(
            corpus,
            tokenizer,
            source_format=self.source.format,
            tokens_sha256=scan.sha256,
            window=scan.longest,
            rows_per_unit=self._rows_per_unit(scan),
        )

    def _corpus(self, speller: Speller) -> Corpus:
        """Return the corpus of the source's documents, imported where it is missing."""
        self.say(f"importing the documents as corpus {self.asked.corpus}")
        import_corpus(
            self.store,
            self.asked.corpus,
            _documents(self.source, speller),
            id_column="key",
            progress=self.progress,
        )
        return self.store.refresh().corpus(self.asked.corpus)

    def _rows_per_unit(self, scan: TokenScan) -> int:
        if self.asked.rows_per_unit == "auto":
            return auto_rows_per_unit(scan.n_rows * _BYTES_PER_TOKEN, window=scan.longest)
        if self.asked.rows_per_unit < scan.longest:
            raise bad_argument(
                "rows_per_unit",
                self.asked.rows_per_unit,
                f"at least the longest document, {scan.longest} tokens",
            )
        return self.asked.rows_per_unit

    def _create_or_find(
        self, model: Mapping[str, Any], tokenization: Tokenization, stored: str
    ) -> Collection:
        wanted = self._config(model, tokenization, stored)
        key = (KIND, self.asked.run)
        if key not in self.store.state.collections:
            info = {
                "model_source": self.asked.model,
                "tokenizer_source": tokenization.collection.info["tokenizer"],
                "import_source": os.path.abspath(self.source.description),
                "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "host": platform.node(),
                "actstore": actstore.__version__,
            }
            try:
                self.store.log.commit([Create(KIND, self.asked.run, wanted, info)], txn=uuid.uuid4().hex)
            except ConflictError:
                # Another process may have been first: what it made is compared below.
                if key not in self.store.refresh().state.collections:
                    raise
        existing = self.store.refresh().state.collection(*key)
        if existing.fingerprint != fingerprint(wanted):
            raise _differs(self.asked.run, existing.config, wanted)
        return existing

    def _config(self, model: Mapping[str, Any], tokenization: Tokenization, stored: str) -> dict[str, Any]:
        points = self.source.hook_points
        specs = {
            p.name: plan_spec(
                rows_per_unit=tokenization.rows_per_unit,
                d_model=p.d_model,
                dtype=stored,
                codec=self.asked.codec,
            )
            for p in points
        }
        return {
            "format": 1,
            "model": dict(model),
            "tokenization": tokenization.id,
            "tokenization_fingerprint": tokenization.collection.fingerprint,
            "rows_per_unit": tokenization.rows_per_unit,
            "hook_points": [{"name": p.name, "d_model": p.d_model} for p in points],
            "dtype": stored,
            "codec": self.asked.codec,
            "rows_per_shard": {name: spec.rows_per_shard for name, spec in specs.items()},
            "rows_per_chunk": {name: spec.rows_per_chunk for name, spec in specs.items()},
            "nonfinite": self.asked.nonfinite,
        }


def _documents(source: ActivationSource, speller: Speller) -> Iterator[dict[str, str]]:
    for batch in source.tokens():
        for key, text in zip(batch.keys, speller(batch).texts, strict=True):
            yield {"key": key, "text": text}


def _differs(run: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> ConflictError:
    lines = "\n  ".join(config_differences(old, new))
    return ConflictError(
        ErrorKind.CONFIG_DIFFERS,
        f"run {run!r} exists with another configuration or from another source (stored -> asked):\n  {lines}\n"
        "Give the same source and settings to go on with it, or another run name",
    )
