"""Runs and dictionaries whose codes can be worked out exactly by hand: all numbers are eighths, so float32 rounds nothing."""

import numpy as np
from tokenizers import Tokenizer

from actstore.dictionary import make_dictionary
from actstore.ingest.dictionaries.save import save_dictionary
from tests.ingest import kept

HOOK_POINT = "layers.0.resid_post"
WIDTH = kept.HOOK_POINTS[HOOK_POINT]


def eighths(tokens, width: int) -> np.ndarray:
    """What the "model" computes: whole eighths, by document, window and position."""
    table = np.round((np.random.default_rng(width).standard_normal((997, width)) * 4 + 1) * 8) / 8
    doc, window, at = (
        tokens[name].to_numpy().astype(int) for name in ("doc_id", "window", "window_position")
    )
    return table[(doc * 101 + window * 37 + at) % len(table)]


def make_run(store, tokenization, name: str = "r", *, value=eighths, finish=True, **settings):
    run = kept.KeptRun(store, name, tokenization, value=value, **settings)
    if finish:
        run.finish()
    return run


def weights(
    n_latents: int = 40, *, width: int = WIDTH, seed: int = 0, dead: bool = False
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    encoder = rng.integers(-4, 5, (width, n_latents)) / 8
    bias = np.full(n_latents, -1e6) if dead else rng.integers(-40, 8, n_latents) / 8
    return {
        "W_enc": encoder,
        "b_enc": bias,
        "W_dec": rng.integers(-4, 5, (n_latents, width)) / 8,
        "b_dec": rng.integers(-8, 9, width) / 8,
    }


def add_dictionary(
    store, name: str = "sae", *, activation="relu", k=None, hook_point=HOOK_POINT, width=None, **made
):
    width = width or kept.HOOK_POINTS[hook_point]
    options = {} if k is None else {"k": k}
    data = make_dictionary(
        weights(width=width, **made),
        activation=activation,
        hook_point=hook_point,
        apply_b_dec_to_input=True,
        **options,
    )
    return save_dictionary(store, name, data)


def naive_codes(dictionary, rows_td: np.ndarray, value_dtype: str = "float16") -> np.ndarray:
    """The codes of rows, dense, as stored: in float64 from the weights, row by row."""
    w = {name: np.asarray(dictionary.weight(name), np.float64) for name in ("W_enc", "b_enc", "b_dec")}
    codes = np.zeros((len(rows_td), dictionary.n_latents), value_dtype)
    for i, x in enumerate(rows_td.astype(np.float64)):
        if not np.isfinite(x).all():
            continue
        pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
        if dictionary.activation == "topk":
            best = sorted(range(len(pre)), key=lambda j: (-pre[j], j))[: dictionary.k]
            pre = np.where(np.isin(np.arange(len(pre)), best), pre, 0)
        codes[i] = np.maximum(pre, 0)
    return codes


def token_rows(run, without=()) -> dict[int, list[tuple[int, int, bool]]]:
    """(unit, offset, special) of the row of every position of each document, in order, from the tokenizer alone.

    A row stands for a position if it has the id that the whole document's sequence has there, and is the first that does.
    """
    tokenization = run.tokenization
    tokenizer = Tokenizer.from_str(tokenization.tokenizer_json().decode())
    sequences = []
    for part in tokenization.corpus.parts:
        texts = run.store.objects.table(part.objects[0])["text"].to_pylist()
        sequences += [tokenizer.encode(t).ids for t in texts]
    found: dict[int, dict[int, tuple[int, int, bool]]] = {}
    broken = set()
    for unit in tokenization.units:
        for offset, token in enumerate(tokenization.unit_table(unit.unit).to_pylist()):
            document = found.setdefault(token["doc_id"], {})
            if unit.unit in without:
                broken.add(token["doc_id"])
            right = sequences[token["doc_id"]][token["position"]] == token["token_id"]
            if right and token["position"] not in document:
                document[token["position"]] = unit.unit, offset, token["is_special"]
    return {d: [rows[p] for p in sorted(rows)] for d, rows in found.items() if d not in broken}


def naive_pooled(
    run, dense: dict[tuple[int, int], np.ndarray], *, top_m=None, pool_special=False, without=()
):
    """By document: n_tokens, n_fired, totals, and {latent: (max, sum, count)} of those kept.

    `dense` has the codes of every row that is stored and finite, by unit and offset of the token row.
    """
    answer = {}
    for doc_id, rows in token_rows(run, without).items():
        used = [dense[u, o] for u, o, special in rows if (u, o) in dense and (pool_special or not special)]
        codes = np.array(used, np.float64) if used else np.zeros((0, 0))
        fires = [j for j in range(codes.shape[1]) if (codes[:, j] > 0).any()]
        every = {j: (codes[:, j].max(), codes[:, j].sum(), int((codes[:, j] > 0).sum())) for j in fires}
        best = sorted(every, key=lambda j: (-every[j][1], j))[:top_m]
        answer[doc_id] = (
            len(used),
            len(every),
            sum(s for _, s, _ in every.values()),
            max((m for m, _, _ in every.values()), default=0.0),
            sum(c for _, _, c in every.values()),
            {j: every[j] for j in sorted(best)},
        )
    return answer


def pooled_documents(batches) -> dict[int, tuple]:
    """What batches hold, in the form of `naive_pooled`."""
    found = {}
    for b in batches:
        for i, doc_id in enumerate(b.doc_ids.tolist()):
            at = range(int(b.indptr[i]), int(b.indptr[i + 1]))
            entries = {int(b.latents[e]): (float(b.max[e]), float(b.sum[e]), int(b.count[e])) for e in at}
            assert list(entries) == sorted(entries)
            assert doc_id not in found
            totals = b.n_tokens, b.n_fired, b.total_sum, b.total_max, b.total_count
            found[doc_id] = (*(column[i].item() for column in totals), entries)
    assert list(found) == sorted(found)
    return found


def content(store, codes: str = "sae@r") -> dict:
    """What two stores must agree in: bytes and meta of every unit, not attempts or versions."""
    collection = store.state.collection("codes", codes)
    return {
        "config": collection.config,
        "sealed": collection.is_sealed,
        "units": {
            u: (
                unit.rows,
                dict(unit.meta),
                tuple((o.key.rsplit("/", 1)[0], o.nbytes, o.sha256) for o in unit.objects),
            )
            for u, unit in sorted(collection.units.items())
        },
    }
