"""Into how many token rows will a corpus be cut, before it is: counted if that is quick, estimated if not?

Nothing is written. What is there already is taken as it is; a small corpus is tokenized in memory, as `tokenize_corpus` does;
of a large one, stretches of documents drawn from all over it are tokenized, and the total is the text's length times their
rows per byte, with the error that the stretches' own spread shows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from actstore.corpus import Corpus
from actstore.log import fingerprint
from actstore.log.values import Collection, Unit
from actstore.store import Store
from actstore.tokenization import Tokenization

from .corpus_texts import read_texts
from .token_encoding import TextBatch
from .token_units import Cut, Start, TokenUnit, UnitPacker
from .tokenization_plan import TokenizationPlan, plan_tokenization
from .window_sample import stratified

COUNTED_TEXT_BYTES = 16 << 20
"""Text that is tokenized whole: a few seconds."""

_STRETCHES = 16
_STRETCH_BYTES = 512 << 10
_MOST_UNITS = 10_000
"""Units that an estimate makes up: enough for the fullest of a sampled run."""

Source = Literal["stored", "counted", "estimated"]


@dataclass(frozen=True, slots=True)
class PlannedTokens:
    """A tokenization, stored or to be."""

    tokenization: Tokenization
    """As it is or would be. If it is not stored, its units have rows and `meta` and no objects; if it is estimated, they are at
    most `_MOST_UNITS` typical ones."""
    source: Source
    n_rows: int
    n_units: int
    n_windows: int
    error_rows: int | None
    """Two standard errors of `n_rows`; 0 if it is exact, None if unknown."""
    table: pa.Table
    """Tokens of one unit, all columns."""
    table_unit: int


def plan_tokens(store: Store, corpus: str, tokenizer: Any, *, seed: int, **settings: Any) -> PlannedTokens:
    """Return the tokenization that `tokenize_corpus` with these arguments makes or finds. Writes nothing.

    Args:
        store: Where the corpus is.
        corpus: Its name.
        tokenizer: As for `tokenize_corpus`.
        seed: Of what is drawn.
        settings: As for `tokenize_corpus`: `window`, `overlap`, `rows_per_unit`, `revision`.

    Raises:
        NotFoundError: no such corpus.
        InvalidInputError: a tokenizer or settings that cannot be used.
    """
    plan = plan_tokenization(store, corpus, tokenizer, **settings)
    existing = store.state.collections.get(("tokenization", plan.id))
    rng = np.random.default_rng([seed, 0x746F6B])
    if existing is not None and existing.is_sealed:
        return _stored(store.tokenization(plan.id), rng)
    if int(plan.corpus.collection.config["text_bytes"]) <= COUNTED_TEXT_BYTES:
        return _counted(plan, rng)
    return _estimated(plan, rng)


def _stored(found: Tokenization, rng: np.random.Generator) -> PlannedTokens:
    units = found.units
    # Not the last one, which may be nearly empty.
    unit = units[int(rng.integers(max(1, len(units) - 1)))].unit
    n_windows = sum(int(u.meta["n_windows"]) for u in units)
    return PlannedTokens(
        found, "stored", found.n_rows, len(units), n_windows, 0, found.unit_table(unit), unit
    )


def _counted(plan: TokenizationPlan, rng: np.random.Generator) -> PlannedTokens:
    encode = plan.encoder()
    units: dict[int, Unit] = {}
    kept: TokenUnit | None = None
    for found in _pack(plan, map(encode, read_texts(plan.corpus, 0))):
        units[found.unit] = _unit(found.unit, found.table.num_rows, found.meta)
        # Each unit with the same chance, without knowing how many there will be.
        if kept is None or rng.random() < 1 / len(units):
            kept = found
    n_windows = sum(int(u.meta["n_windows"]) for u in units.values())
    tokenization = _made_up(plan, units)
    if kept is None:
        return PlannedTokens(tokenization, "counted", 0, 0, 0, 0, _no_tokens(), 0)
    n_rows = tokenization.n_rows
    return PlannedTokens(tokenization, "counted", n_rows, len(units), n_windows, 0, kept.table, kept.unit)


def _estimated(plan: TokenizationPlan, rng: np.random.Generator) -> PlannedTokens:
    encode = plan.encoder()
    rows, windows, nbytes = [], [], []
    largest: TokenUnit | None = None
    for batch in _stretches(plan.corpus, rng):
        units = list(_pack(plan, iter([encode(batch)])))
        rows.append(sum(u.table.num_rows for u in units))
        windows.append(sum(u.meta["n_windows"] for u in units))
        nbytes.append(sum(len(text.encode()) for text in batch.texts))
        for found in units:
            if largest is None or found.table.num_rows > largest.table.num_rows:
                largest = found
    total = int(plan.corpus.collection.config["text_bytes"])
    n_rows, error = ratio_estimate(rows, nbytes, total=total)
    n_windows = round(n_rows * sum(windows) / max(1, sum(rows)))
    per_unit = int(plan.config["rows_per_unit"])
    # A unit ends where the next window does not fit: half a window short, on average.
    filled = min(per_unit, max(1, per_unit - round(n_rows / max(1, n_windows) / 2)))
    n_units = -(-n_rows // filled)
    n_documents, of_unit = plan.corpus.n_documents, plan.corpus.n_documents / max(1, n_units)
    made_up = {
        u: _unit(
            u,
            filled,
            {
                "first_doc": int(u * of_unit),
                "last_doc": min(n_documents - 1, int((u + 1) * of_unit)),
                "n_documents": round(of_unit),
                "n_windows": round(n_windows / max(1, n_units)),
            },
        )
        for u in range(min(n_units, _MOST_UNITS))
    }
    tokenization = _made_up(plan, made_up)
    table = _no_tokens() if largest is None else largest.table
    return PlannedTokens(tokenization, "estimated", n_rows, n_units, n_windows, error, table, 0)


def ratio_estimate(rows: Sequence[int], nbytes: Sequence[int], *, total: int) -> tuple[int, int | None]:
    """Return rows in `total` bytes of text, from stretches of it, and two standard errors of that.

    Source: Cochran, "Sampling Techniques", 3rd edition, section 6.17 (jackknife of a ratio).

    >>> ratio_estimate([10, 10, 10], [40, 40, 40], total=4000)
    (1000, 0)
    """
    r, b = np.array(rows, float), np.array(nbytes, float)
    if not b.sum():
        return 0, None
    estimate = r.sum() / b.sum() * total
    n = len(r)
    if n < 2:
        return round(estimate), None
    left_out = (r.sum() - r) / np.maximum(b.sum() - b, 1) * total
    variance = (n - 1) / n * ((left_out - left_out.mean()) ** 2).sum()
    return round(estimate), round(2 * float(np.sqrt(variance)))


def _stretches(corpus: Corpus, rng: np.random.Generator) -> Iterator[TextBatch]:
    """Yield texts of neighbouring documents, from all over the corpus."""
    for first in stratified(corpus.n_documents, min(_STRETCHES, corpus.n_documents), rng):
        batch = next(read_texts(corpus, first), None)
        if batch is None:
            continue
        texts: list[str] = []
        nbytes = 0
        for text in batch.texts:
            if texts and nbytes + len(text) > _STRETCH_BYTES:
                break
            texts.append(text)
            nbytes += len(text)
        yield replace(batch, texts=texts)


def _pack(plan: TokenizationPlan, encoded: Iterator[Any]) -> Iterator[TokenUnit]:
    config = plan.config
    packer = UnitPacker(
        Cut(
            template=plan.template,
            window=config["window"],
            overlap=config["overlap"],
            rows_per_unit=config["rows_per_unit"],
            special_ids=plan.tokenizer.special_ids,
        ),
        Start(),
    )
    for batch in encoded:
        yield from packer.add(batch)
    yield from packer.finish()


def _unit(unit: int, rows: int, meta: Mapping[str, Any]) -> Unit:
    return Unit(unit=unit, rows=rows, nonfinite=0, attempt="", objects=(), meta=meta, version=0)


def _made_up(plan: TokenizationPlan, units: Mapping[int, Unit]) -> Tokenization:
    collection = Collection(
        kind="tokenization",
        id=plan.id,
        config=plan.config,
        fingerprint=fingerprint(plan.config),
        info={},
        version=0,
        units=units,
        rows=sum(u.rows for u in units.values()),
    )
    return Tokenization(collection, plan.corpus, plan.corpus.objects)


def _no_tokens() -> pa.Table:
    from actstore.tokenization import TOKEN_SCHEMA

    return TOKEN_SCHEMA.empty_table()
