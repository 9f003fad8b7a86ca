"""Real stores without a model: a corpus of words, a tokenization with windows, and runs of random numbers.

Everything that a test needs to work out an answer on its own is kept beside the store, as plain Python and numpy values.
"""

import io
import uuid
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import actstore
from actstore.codec.encode import encode_shard
from actstore.codec.layout import shard_key, sums_key
from actstore.codec.metadata import zarr_json
from actstore.codec.spec import plan_spec
from actstore.codec.sums import pack_sums
from actstore.dtypes import to_float32, to_stored
from actstore.int8 import Int8Transform, fit_int8, quantise
from actstore.log.values import Add, Create, Seal
from actstore.names import hook_point_folder
from actstore.sampling import Sample
from actstore.stats import RowTokens, block_stats, merge_stats, stats_to_table
from actstore.storage import write_new
from actstore.store import Store
from actstore.tokenization import TOKEN_SCHEMA

BOS = 0
WORDS = [
    "<bos>",
    "the",
    "cat",
    "sat",
    "on",
    "naïve",
    "漢字",
    "🙂",
    "mat",
    "dog",
    "<b>bold</b>",
    "\u202eevil",
    "\x1b[31mred",
    "a",
]
WORDS += [f"w{i}" for i in range(30)]


@dataclass
class Token:
    """One token row, as a test sees it."""

    row: int
    doc_id: int
    position: int
    token_id: int
    char_start: int
    char_end: int
    is_special: bool
    window: int
    window_position: int


@dataclass
class Made:
    """A store and what is in it."""

    store: Store
    url: str
    texts: list[str]
    metadata: list[dict]
    tokens: list[Token]
    acts: dict[tuple[str, str], dict[int, np.ndarray]] = field(default_factory=dict)
    """For each run and hook point, the stored row of every row number, as float32."""

    tokenization: str = ""

    def run(self, name: str = "run"):
        return self.store.run(name)

    def matrix(self, hook_point: str, run: str = "run") -> tuple[np.ndarray, np.ndarray]:
        """Row numbers and float64 activations, in row order."""
        rows = np.array(sorted(self.acts[run, hook_point]))
        return rows, np.stack([self.acts[run, hook_point][r] for r in rows]).astype(np.float64)

    @property
    def by_row(self) -> dict[int, Token]:
        return {t.row: t for t in self.tokens}


def parquet(table: pa.Table, row_group_size: int | None = None) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True, row_group_size=row_group_size)
    return sink.getvalue()


def write(store: Store, key: str, data: bytes):
    return write_new(store.storage, key, [data])


def commit(store: Store, *actions) -> None:
    store.log.commit(list(actions), txn=uuid.uuid4().hex)
    store.refresh()


def fingerprint(store: Store, kind: str, name: str) -> str:
    return store.state.collection(kind, name).fingerprint


def make_documents(
    rng: np.random.Generator, n_documents: int
) -> tuple[list[list[int]], list[str], list[dict]]:
    ids, texts, metadata = [], [], []
    for i in range(n_documents):
        words = rng.integers(1, len(WORDS), int(rng.integers(1, 40))).tolist()
        if i % 4 == 3:  # near-duplicates: contexts that repeat between documents
            words = ids[i - 1][:] + words[:2]
        ids.append(words)
        texts.append(" ".join(WORDS[w] for w in words))
        metadata.append(
            {"source": ["web", "book", "code"][i % 3], "n": i, "score": None if i % 5 == 0 else i / 2}
        )
    return ids, texts, metadata


def add_corpus(
    store: Store, name: str, texts: list[str], columns: dict[str, list], docs_per_part: int = 7
) -> None:
    table = pa.table({
        "doc_id": pa.array(range(len(texts)), pa.int64()),
        "text": pa.array(texts, pa.large_string()),
        "source_key": pa.array([f"key{i}" for i in range(len(texts))], pa.string()),
        **columns,
    })  # fmt: skip
    config = {
        "content_sha256": uuid.uuid4().hex * 2, "n_documents": len(texts), "text_bytes": sum(len(t.encode()) for t in texts),
        "columns": {f.name: str(f.type) for f in table.schema},
    }  # fmt: skip
    commit(store, Create("corpus", name, config, {}))
    actions, mark = [], fingerprint(store, "corpus", name)
    for part, first in enumerate(range(0, len(texts), docs_per_part)):
        piece = table.slice(first, docs_per_part)
        attempt = uuid.uuid4().hex
        obj = write(
            store, f"corpora/{name}/documents/{part:06}-{attempt}.parquet", parquet(piece, row_group_size=3)
        )
        meta = {"first_doc": first, "text_bytes": 1}
        actions.append(Add("corpus", name, 0, mark, part, len(piece), 0, attempt, (obj,), meta))
    commit(store, *actions, Seal("corpus", name, 0, len(actions), len(texts), ()))


def cut_windows(
    ids: list[list[int]], texts: list[str], window: int, overlap: int, bos: bool
) -> list[list[Token]]:
    """Windows of all documents; every window is a list of tokens without row numbers yet."""
    windows = []
    for doc_id, (words, text) in enumerate(zip(ids, texts, strict=True)):
        spans, at = [], 0
        for w in words:
            end = at + len(WORDS[w])
            spans.append((at - (at > 0), end))  # the space before a word belongs to it
            at = end + 1
        assert (spans[-1][1] if spans else 0) == len(text)
        body = window - bos
        for number, first in enumerate(range(0, max(1, len(words) - overlap), body - overlap)):
            made = [Token(-1, doc_id, first, BOS, 0, 0, True, number, 0)] if bos else []
            for p in range(first, min(first + body, len(words))):
                made.append(Token(-1, doc_id, p + bos, words[p], *spans[p], False, number, len(made)))
            windows.append(made)
    return windows


def add_tokenization(
    store: Store, corpus: str, ids, texts, *, window: int, overlap: int, bos: bool, rows_per_unit: int
) -> tuple[str, list[Token]]:
    units: list[list[Token]] = [[]]
    for made in cut_windows(ids, texts, window, overlap, bos):
        if len(units[-1]) + len(made) > rows_per_unit:
            units.append([])
        units[-1] += made
    config = {
        "corpus": corpus, "corpus_fingerprint": fingerprint(store, "corpus", corpus), "tokenizer_sha256": "00" * 32,
        "window": window, "overlap": overlap, "add_special_tokens": bos, "rows_per_unit": rows_per_unit, "format": 1,
    }  # fmt: skip
    name = f"{corpus}.{uuid.uuid4().hex[:10]}"
    commit(store, Create("tokenization", name, config, {}))
    mark, actions = fingerprint(store, "tokenization", name), []
    for u, tokens in enumerate(units):
        for offset, token in enumerate(tokens):
            token.row = u * rows_per_unit + offset
        table = pa.table(
            {f.name: [getattr(t, f.name) for t in tokens] for f in TOKEN_SCHEMA}, schema=TOKEN_SCHEMA
        )
        attempt = uuid.uuid4().hex
        obj = write(
            store, f"tokenizations/{name}/tokens/{u:08}-{attempt}.parquet", parquet(table, row_group_size=37)
        )
        meta = {"first_doc": tokens[0].doc_id, "last_doc": tokens[-1].doc_id, "n_windows": 1}
        actions.append(Add("tokenization", name, 0, mark, u, len(tokens), 0, attempt, (obj,), meta))
    attempt = uuid.uuid4().hex
    vocabulary = pa.table({"token_id": pa.array(range(len(WORDS)), pa.int32()), "token": WORDS})
    sealed = (
        write(store, f"tokenizations/{name}/tokenizer-{attempt}.json", b"{}"),
        write(store, f"tokenizations/{name}/vocabulary-{attempt}.parquet", parquet(vocabulary)),
    )
    meta = {"n_documents": len(texts), "n_empty": 0, "n_windows": 1, "tokenizer_config": {}}
    n_rows = sum(map(len, units))
    commit(store, *actions, Seal("tokenization", name, 0, len(units), n_rows, sealed, meta))
    return name, [t for tokens in units for t in tokens]


def by_unit(made: Made) -> dict[int, list[Token]]:
    """The tokens of every unit."""
    tokenization = made.store.tokenization(made.tokenization)
    units = {unit.unit: [] for unit in tokenization.units}
    for token in made.tokens:
        units[token.row // tokenization.rows_per_unit].append(token)
    return units


def is_kept(row: int, sample: Sample) -> bool:
    """Whether a sampled run keeps a row, by Python's own integers (FORMAT.md, section 6.8)."""
    mask = (1 << 64) - 1

    def mixed(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    gamma = 0x9E3779B97F4A7C15
    key = mixed((sample.seed + gamma) & mask)
    return mixed((key + (row + 1) * gamma) & mask) < Fraction(sample.rate) * (1 << 64)


def row_tokens(tokens: list[Token]) -> RowTokens:
    """What the statistics are told of the rows."""
    return RowTokens(
        np.array([t.row for t in tokens], np.int64),
        np.array([t.token_id for t in tokens], np.int32),
        np.array([t.window_position for t in tokens], np.int32),
    )


def moments(values, hook_point: str, made: Made) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of all finite rows."""
    rows = np.concatenate([values(hook_point, tokens) for tokens in by_unit(made).values()])
    rows = rows[np.isfinite(rows).all(axis=1)].astype(np.float64)
    return rows.mean(axis=0), rows.std(axis=0)


def naive_numbers(stored: np.ndarray, transform: Int8Transform) -> np.ndarray:
    """What int8 rows stand for (FORMAT.md, section 6.7), every step in float64 and then rounded to float32."""
    scales = np.frombuffer(stored[:, -4:].tobytes(), "<f4").astype(np.float64)
    steps = (stored[:, :-4] * scales[:, None]).astype(np.float32).astype(np.float64)
    grown = (steps * 2.0 ** transform.exponent.astype(np.float64)).astype(np.float32)
    return (grown.astype(np.float64) + transform.mean.astype(np.float64)).astype(np.float32)


def add_run(
    made: Made, name: str, hook_points: dict[str, int], values, *, dtype: str = "float32", codec: str = "hot",
    skip_units: tuple[int, ...] = (), seal: bool = True, sample: Sample | None = None, names_sinks: bool = False,
) -> None:  # fmt: skip
    """Write a run; `values(hook_point, tokens)` gives float32 rows. What int8 makes of them is read here in float64.

    Its statistics name the rows of largest norm if `names_sinks`.
    """
    store = made.store
    tokenization = store.tokenization(made.tokenization)
    rows_per_unit = tokenization.rows_per_unit
    places, sampled, info = rows_per_unit, {}, {"model_source": "synthetic/model"}
    if sample is not None:
        places = max(sum(is_kept(t.row, sample) for t in unit) for unit in by_unit(made).values())
        sampled = {"sample": sample.to_json(), "stored_rows_per_unit": places}
    transforms = {h: fit_int8(*moments(values, h, made)) for h in hook_points} if dtype == "int8" else {}
    if transforms:
        info["int8"] = {h: transform.to_json() for h, transform in transforms.items()}
    specs = {
        h: plan_spec(rows_per_unit=places, d_model=d, dtype=dtype, codec=codec)
        for h, d in hook_points.items()
    }
    config = {
        "model": {"architecture": "Synthetic", "revision": None}, "tokenization": tokenization.id,
        "tokenization_fingerprint": tokenization.collection.fingerprint, "rows_per_unit": rows_per_unit,
        "hook_points": [{"name": h, "d_model": d} for h, d in hook_points.items()], "dtype": dtype, "compute_dtype": "float32",
        "codec": codec, "rows_per_shard": {h: s.rows_per_shard for h, s in specs.items()},
        "rows_per_chunk": {h: s.rows_per_chunk for h, s in specs.items()}, "batch_tokens": 1, "attn_implementation": "eager",
        "nonfinite": "mask", "format": 1, **sampled,
    }  # fmt: skip
    commit(store, Create("run", name, config, info))
    mark, actions, stats = fingerprint(store, "run", name), [], {}
    for unit in tokenization.units:
        if unit.unit in skip_units:
            continue
        all_tokens = by_unit(made)[unit.unit]
        tokens = [t for t in all_tokens if sample is None or is_kept(t.row, sample)]
        attempt, objects, sums, bad, unit_stats = uuid.uuid4().hex, [], {}, {}, []
        for h, spec in specs.items():
            whole = np.ascontiguousarray(values(h, all_tokens), np.float32)
            rows = whole[[all_tokens.index(t) for t in tokens]]
            if dtype == "int8":
                stored = quantise(rows, transforms[h])
                acts = naive_numbers(stored, transforms[h])
            else:
                stored = to_stored(rows, dtype)
                acts = to_float32(stored, dtype)
            for token, row in zip(tokens, acts, strict=True):
                made.acts.setdefault((name, h), {})[token.row] = row
            parts = []
            for j, start in enumerate(range(0, len(tokens), spec.rows_per_shard)):
                shard = encode_shard(spec, stored[start : start + spec.rows_per_shard])
                parts.append(shard.sums)
                number = unit.unit * (places // spec.rows_per_shard) + j
                objects.append(write_new(store.storage, shard_key(name, h, number), shard.buffers))
            sums[h], bad[h] = (
                np.concatenate([np.empty(0, np.uint32), *parts]),
                int((~np.isfinite(acts)).sum()),
            )
            unit_stats.append(block_stats(h, acts, tokens=row_tokens(tokens) if names_sinks else None))
        meta = {"nonfinite": bad}
        if tokens:
            key = sums_key(name, unit.unit, attempt)
            packed, meta["sums"] = pack_sums(key, sums)
            objects.append(write(store, key, packed))
        objects.append(
            write(
                store,
                f"runs/{name}/stats/{unit.unit:08}-{attempt}.parquet",
                parquet(stats_to_table(unit_stats)),
            )
        )
        for one in unit_stats:
            stats[one.hook_point] = (
                merge_stats(stats[one.hook_point], one) if one.hook_point in stats else one
            )
        actions.append(
            Add(
                "run", name, 0, mark, unit.unit, len(tokens), sum(bad.values()), attempt, tuple(objects), meta
            )
        )
    if seal:
        attempt = uuid.uuid4().hex
        sealed = [
            write(store, f"runs/{name}/stats/all-{attempt}.parquet", parquet(stats_to_table(stats.values())))
        ]
        for h, spec in specs.items():
            n_shards = len(tokenization.units) * (places // spec.rows_per_shard)
            sealed.append(
                write(
                    store,
                    f"runs/{name}/{hook_point_folder(h)}/zarr.json",
                    zarr_json(spec, n_shards=n_shards, attributes={}),
                )
            )
        actions.append(Seal("run", name, 0, len(actions), sum(a.rows for a in actions), tuple(sealed)))
    commit(store, *actions)


def make_store(
    url: str,
    *,
    seed: int = 0,
    n_documents: int = 40,
    window: int = 16,
    overlap: int = 0,
    bos: bool = True,
    rows_per_unit: int = 64,
) -> Made:
    """A store with a corpus and a tokenization and no run yet."""
    store = actstore.open(url, create=True)
    rng = np.random.default_rng(seed)
    ids, texts, metadata = make_documents(rng, n_documents)
    columns = {
        "source": pa.array([m["source"] for m in metadata]), "n": pa.array([m["n"] for m in metadata], pa.int64()),
        "score": pa.array([m["score"] for m in metadata], pa.float64()),
        "position": pa.array([f"page {m['n']}" for m in metadata]),  # a name that tokens have too
    }  # fmt: skip
    add_corpus(store, "docs", texts, columns)
    name, tokens = add_tokenization(
        store, "docs", ids, texts, window=window, overlap=overlap, bos=bos, rows_per_unit=rows_per_unit
    )
    return Made(store, url, texts, metadata, tokens, tokenization=name)


def random_values(seed: int, widths: dict[str, int], *, nonfinite: bool = False, sinks: bool = False):
    """Random rows that depend on the seed, the hook point and the unit alone."""

    def values(hook_point: str, tokens: list[Token]) -> np.ndarray:
        rng = np.random.default_rng([seed, len(hook_point), tokens[0].row])
        acts = rng.standard_normal((len(tokens), widths[hook_point])).astype(np.float32)
        if nonfinite:
            acts[rng.integers(0, len(tokens), 2), rng.integers(0, widths[hook_point], 2)] = [np.nan, np.inf]
        if sinks:
            acts[rng.integers(0, len(tokens), 2)] *= 100
        acts[rng.integers(0, len(tokens))] = 0
        return acts

    return values
