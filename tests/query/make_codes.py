"""Dictionaries, codes, postings and latent statistics over a test run, without a model: random sparse numbers, known exactly.

`add_codes` stores what it is given with the real encoders and commits it by hand; what a test needs to work out an answer on
its own is kept beside it as a scipy matrix.
"""

import itertools
import uuid
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import scipy.sparse as sp

from actstore.codes import codes_id
from actstore.dictionary_data import make_dictionary
from actstore.ingest.dictionaries.save import save_dictionary
from actstore.ingest.encoding.pooled_codes import pool_codes, pooled_object, unit_documents
from actstore.latent_stats import LATENT_STATS_SCHEMA, MIN_TOKEN_COUNT, QUANTILES, stats_bytes
from actstore.log.values import Add, Create, Seal
from actstore.sparse import SparseRows, encode_segment, encode_unit
from tests.query.make_store import (
    WORDS,
    Made,
    add_corpus,
    add_tokenization,
    commit,
    fingerprint,
    write,
)

H = "layers.0.resid_post"
POOL_TOP_M = 12


@dataclass
class MadeCodes:
    """The codes of a run in a dictionary, as a test sees them."""

    made: Made
    dictionary: str
    run: str
    rows: np.ndarray
    """Row numbers of the run's stored rows that have codes, ascending, shape (n,)."""

    matrix: sp.csr_matrix
    """Their codes as stored (rounded to the value dtype), float64, shape (n, n_latents)."""

    norms: np.ndarray
    """L2 norms of the encoded rows, float32, shape (n,)."""

    @property
    def n_latents(self) -> int:
        return self.matrix.shape[1]

    @property
    def codes(self):
        return self.made.run(self.run).codes(self.dictionary)

    def column(self, latent: int) -> np.ndarray:
        """The latent's value on every row of `rows`, zeros included."""
        return np.asarray(self.matrix[:, [latent]].todense()).ravel()

    def firing(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows on which the latent fires, ascending, and its values there."""
        values = self.column(latent)
        return self.rows[values > 0], values[values > 0]

    def value(self, row: int, latent: int) -> float:
        return float(self.matrix[int(np.searchsorted(self.rows, row)), latent])


def random_codes(
    n_rows: int,
    n_latents: int,
    *,
    seed: int = 0,
    per_row: float = 6,
    ties: bool = False,
    dtype: str = "float16",
) -> sp.csr_matrix:
    """Random codes whose latents differ in density as 1/rank; the last tenth is dead, and some rows have no codes.

    With `ties` the values are few, so that equal ones are everywhere.
    """
    rng = np.random.default_rng([seed, n_rows, n_latents])
    n_alive = max(1, n_latents - n_latents // 10)
    share = 1 / np.arange(1, n_alive + 1)
    share = np.minimum(0.5, share * per_row / share.sum())
    columns = []
    for p in share:
        rows = np.flatnonzero(rng.random(n_rows) < p)
        values = rng.integers(1, 5, len(rows)) / 2 if ties else np.exp(rng.standard_normal(len(rows)))
        columns.append((rows, values))
    order = rng.permutation(n_latents)[:n_alive]  # which latents are frequent is not told by their number
    rows = np.concatenate([r for r, _ in columns])
    values = np.concatenate([v for _, v in columns]).astype(dtype).astype(np.float64)
    latents = np.concatenate([np.full(len(r), order[i]) for i, (r, _) in enumerate(columns)])
    made = sp.csr_matrix((values, (rows, latents)), shape=(n_rows, n_latents))
    empty = rng.random(n_rows) < 0.05
    made = sp.csr_matrix(sp.diags((~empty).astype(float)) @ made)
    made.eliminate_zeros()
    made.sort_indices()
    return made


def dead_codes(n_rows: int, n_latents: int) -> sp.csr_matrix:
    """No latent ever fires."""
    return sp.csr_matrix((n_rows, n_latents))


def everywhere_codes(n_rows: int, n_latents: int, latent: int = 3, *, seed: int = 0) -> sp.csr_matrix:
    """Random codes in which one latent fires on every row, with values that often tie."""
    made = random_codes(n_rows, n_latents, seed=seed).tolil()
    made[:, latent] = (1 + np.arange(n_rows) % 17).reshape(-1, 1) / 4
    return sp.csr_matrix(made.tocsr())


def wide_codes(n_rows: int, *, n_latents: int = 70_000, seed: int = 0) -> sp.csr_matrix:
    """Codes of a dictionary whose latents' numbers need more than 16 bits; only some of the first and last 40 ever fire."""
    narrow = random_codes(n_rows, 80, seed=seed).tocoo()
    latents = np.where(narrow.col < 40, narrow.col, n_latents - 80 + narrow.col)
    return sp.csr_matrix((narrow.data, (narrow.row, latents)), shape=(n_rows, n_latents))


def repeated_store(url: str, *, n_documents: int = 12, word: int = 2, bos: bool = False) -> Made:
    """A store whose every token is the same word; documents of one token and of none are among them, and no run yet."""
    import actstore

    store = actstore.open(url, create=True)
    lengths = [0 if i % 5 == 4 else 1 if i % 5 == 2 else 3 * i + 2 for i in range(n_documents)]
    ids = [[word] * n for n in lengths]
    texts = [" ".join(WORDS[w] for w in words) for words in ids]
    add_corpus(store, "docs", texts, {"n": pa.array(lengths, pa.int64())})
    name, tokens = add_tokenization(
        store, "docs", ids, texts, window=16, overlap=0, bos=bos, rows_per_unit=64
    )
    return Made(store, url, texts, [{"n": n} for n in lengths], tokens, tokenization=name)


def stored_rows(made: Made, run: str, skip_units: tuple[int, ...] = ()) -> np.ndarray:
    """Row numbers that a run stores, ascending, without those of some units."""
    hook_point = made.run(run).hook_points[0]
    rows = np.array(sorted(made.acts[run, hook_point]), dtype=np.int64)
    per_unit = made.store.tokenization(made.tokenization).rows_per_unit
    return rows[~np.isin(rows // per_unit, skip_units)]


def add_dictionary(
    made: Made, name: str, n_latents: int, d_in: int, *, hook_point: str = H, seed: int = 0, k: int = 8
) -> None:
    """Store a dictionary of random weights, whose encoder is near its decoder."""
    rng = np.random.default_rng([seed, n_latents])
    decoder = rng.standard_normal((n_latents, d_in)).astype(np.float32)
    decoder /= np.linalg.norm(decoder, axis=1, keepdims=True)
    encoder = decoder.T + 0.3 * rng.standard_normal((d_in, n_latents)).astype(np.float32)
    weights = {"W_enc": encoder, "W_dec": decoder}
    save_dictionary(
        made.store,
        name,
        make_dictionary(weights, activation="topk", k=min(k, n_latents), hook_point=hook_point),
    )


def add_codes(
    made: Made,
    matrix: sp.csr_matrix,
    *,
    dictionary: str = "sae",
    run: str = "run",
    hook_point: str = H,
    value_dtype: str = "float16",
    n_segments: int = 3,
    postings: bool = True,
    seal: bool = True,
    skip_units: tuple[int, ...] = (),
    norms: np.ndarray | None = None,
) -> MadeCodes:
    """Store codes of a run, in a dictionary that is made where there is none of that name; then postings and statistics.

    Args:
        made: A store with the run.
        matrix: The codes of `stored_rows(made, run, skip_units)`, in order.
        dictionary: Name of the dictionary.
        run: Name of the run.
        hook_point: Which of its hook points was encoded.
        value_dtype: float16 or float32; the values of `matrix` are rounded to it.
        n_segments: Postings are cut into this many.
        postings: Whether to build them, and the statistics.
        seal: Whether the codes are complete; without it there are no postings.
        skip_units: Units without codes; then the codes are not complete.
        norms: L2 norms of the rows; default: those of the run's stored rows, 0 of rows that are not finite.
    """
    rows = stored_rows(made, run, skip_units)
    assert matrix.shape[0] == len(rows)
    matrix = sp.csr_matrix(matrix, dtype=np.float64, copy=True)
    matrix.data = matrix.data.astype(value_dtype).astype(np.float64)
    matrix.eliminate_zeros()
    matrix.sort_indices()
    if ("dictionary", dictionary) not in made.store.state.collections:
        add_dictionary(
            made, dictionary, matrix.shape[1], made.run(run).d_model(hook_point), hook_point=hook_point
        )
    if norms is None:
        acts = [made.acts[run, hook_point][r].astype(np.float64) for r in rows]
        norms = np.array([np.linalg.norm(a) if np.isfinite(a).all() else 0.0 for a in acts])
    told = MadeCodes(made, dictionary, run, rows, matrix, np.asarray(norms, np.float32))
    seal = seal and not skip_units and made.run(run).is_complete
    _commit_codes(told, hook_point, value_dtype, seal)
    if postings and seal:
        _commit_postings(told, value_dtype, n_segments)
    return told


def _sparse(matrix: sp.csr_matrix, value_dtype: str) -> SparseRows:
    return SparseRows(
        indptr=matrix.indptr.astype(np.int64),
        latents=matrix.indices.astype(np.uint32),
        values=matrix.data.astype(value_dtype),
        n_latents=matrix.shape[1],
    )


def _commit_codes(told: MadeCodes, hook_point: str, value_dtype: str, seal: bool) -> None:
    store, run = told.made.store, told.made.run(told.run)
    config = {
        "format": 1, "dictionary": told.dictionary,
        "dictionary_fingerprint": fingerprint(store, "dictionary", told.dictionary), "run": told.run,
        "run_fingerprint": run.collection.fingerprint, "tokenization": told.made.tokenization,
        "hook_point": hook_point, "n_latents": told.n_latents, "value_dtype": value_dtype,
        "rows_per_unit": run.tokenization.rows_per_unit, "pool_top_m": POOL_TOP_M, "pool_special": False,
        "encoder": {"compute_dtype": "float32", "rows_dtype": "float32"},
    }  # fmt: skip
    name = codes_id(told.dictionary, told.run)
    commit(store, Create("codes", name, config, {}))
    mark, actions = fingerprint(store, "codes", name), []
    units = told.rows // run.tokenization.rows_per_unit
    for unit in np.unique(units).tolist():
        mine = np.flatnonzero(units == unit)
        attempt = uuid.uuid4().hex
        piece = _sparse(told.matrix[mine], value_dtype)
        data, meta = encode_unit(piece, told.norms[mine])
        obj = write(store, f"codes/{name}/units/{unit:08}-{attempt}.bin", data)
        tokens = run.tokenization.unit_table(unit)
        kept = told.rows[mine] - unit * run.tokenization.rows_per_unit
        documents = unit_documents(run.tokenization, unit, tokens, pool_special=False)
        data, counts = pooled_object(pool_codes(piece, documents, kept=kept, top_m=POOL_TOP_M), documents)
        pooled = write(store, f"codes/{name}/pooled/{unit:08}-{attempt}.parquet", data)
        meta = {**meta, "pooled": counts}
        actions.append(Add("codes", name, 0, mark, unit, len(mine), 0, attempt, (obj, pooled), meta))
    if seal:
        actions.append(Seal("codes", name, 0, len(actions), len(told.rows), ()))
    commit(store, *actions)


def _commit_postings(told: MadeCodes, value_dtype: str, n_segments: int) -> None:
    store, name = told.made.store, codes_id(told.dictionary, told.run)
    cuts = np.unique(np.linspace(0, told.n_latents, n_segments + 1).astype(int)).tolist()
    config = {
        "format": 1, "codes": name, "codes_fingerprint": fingerprint(store, "codes", name), "n_latents": told.n_latents,
        "boundaries": cuts,
    }  # fmt: skip
    commit(store, Create("postings", name, config, {}))
    mark, actions = fingerprint(store, "postings", name), []
    for unit, (first, stop) in enumerate(itertools.pairwise(cuts)):
        piece = told.matrix[:, first:stop].tocoo()
        shuffled = np.random.default_rng(unit).permutation(piece.nnz)
        data, meta = encode_segment(
            first,
            stop - first,
            (piece.col[shuffled] + first).astype(np.uint32),
            told.rows[piece.row[shuffled]],
            piece.data[shuffled].astype(value_dtype),
        )
        attempt = uuid.uuid4().hex
        objects = [write(store, f"postings/{name}/{unit:06}-{attempt}.bin", data)]
        stats = stats_bytes(naive_stats(told, first, stop))
        objects.append(write(store, f"postings/{name}/stats-{unit:06}-{attempt}.parquet", stats))
        actions.append(Add("postings", name, 0, mark, unit, piece.nnz, 0, attempt, tuple(objects), meta))
    commit(store, *actions, Seal("postings", name, 0, len(actions), told.matrix.nnz, ()))


def naive_stats(told: MadeCodes, first: int, stop: int) -> pa.Table:
    """Statistics of latents `first` to `stop`, worked out one latent at a time."""
    tokens = told.made.by_row
    n_docs = len({tokens[int(r)].doc_id for r in told.rows})
    columns = told.matrix[:, first:stop].tocsc()
    out: dict[str, list] = {name: [] for name in LATENT_STATS_SCHEMA.names}
    for latent in range(first, stop):
        mine = slice(columns.indptr[latent - first], columns.indptr[latent - first + 1])
        rows, values = told.rows[columns.indices[mine]], columns.data[mine]
        for name, value in _stats_of(latent, rows, values, tokens, len(told.rows), n_docs).items():
            out[name].append(value)
    return pa.table(out, schema=LATENT_STATS_SCHEMA)


def _stats_of(latent, rows, values, tokens, n_rows, n_docs) -> dict:
    here = [tokens[int(r)] for r in rows]
    by_token: dict[int, list[float]] = {}
    for token, value in zip(here, values, strict=True):
        by_token.setdefault(token.token_id, []).append(float(value))
    told = [{"token_id": t, "count": len(v), "mean": sum(v) / len(v)} for t, v in by_token.items()]
    often = [t for t in told if t["count"] >= min(MIN_TOKEN_COUNT, max(u["count"] for u in told))]
    bins, counts = np.unique(values.astype(np.float16).view(np.uint16) >> 6, return_counts=True)
    dead = len(rows) == 0
    docs = len({t.doc_id for t in here})
    median = None if dead else np.sort(values)[len(values) // 2]
    strong = [sum(v >= median for v in vs) for vs in by_token.values()]
    return {
        "latent": latent, "n_tokens": len(rows), "n_docs": docs, "density": len(rows) / n_rows,
        "doc_density": docs / n_docs, "mean": None if dead else float(values.mean()),
        "max": None if dead else float(values.max()), "sum": float(values.sum()),
        "max_row": None if dead else int(rows[values == values.max()].min()),
        "quantiles": None if dead else np.quantile(values, QUANTILES).astype(np.float32).tolist(),
        "hist_bins": bins.tolist(), "hist_counts": counts.tolist(),
        "top_tokens_by_count": sorted(told, key=lambda t: (-t["count"], -t["mean"], t["token_id"]))[:10],
        "top_tokens_by_mean": sorted(often, key=lambda t: (-t["mean"], -t["count"], t["token_id"]))[:10],
        "single_token_score": None if dead else max(strong) / sum(strong), "decoder_norm": 1.0,
        "is_dead": dead, "is_ultra_dense": len(rows) / n_rows > 0.1, "promoted": None, "suppressed": None,
    }  # fmt: skip
