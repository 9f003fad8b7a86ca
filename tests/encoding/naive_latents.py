"""Statistics of latents by brute force: one posting at a time, in plain Python."""

import math
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pytest

from actstore.latent_stats import LATENT_STATS_SCHEMA, QUANTILES


def naive_statistics(postings, n_rows, n_documents, norms):
    """The same, latent by latent, in plain Python."""
    answers = []
    for i in range(postings.n_latents):
        at = range(postings.indptr[i], postings.indptr[i + 1])
        values = [float(postings.values[j]) for j in at]
        by_token = defaultdict(list)
        for j, value in zip(at, values, strict=True):
            by_token[int(postings.token_ids[j])].append(value)
        tokens = [
            {"token_id": t, "count": len(v), "mean": math.fsum(v) / len(v)} for t, v in by_token.items()
        ]
        fires = bool(values)
        commonest = max((t["count"] for t in tokens), default=0)
        frequent = [t for t in tokens if t["count"] >= min(5, commonest)]
        bins = defaultdict(int)
        for value in values:
            bins[int(np.float16(value).view(np.uint16)) >> 6] += 1
        strong = defaultdict(int)
        for j, value in zip(at, values, strict=True):
            if value >= np.median(values):
                strong[int(postings.token_ids[j])] += 1
        answers.append({
            "latent": postings.first_latent + i,
            "n_tokens": len(values),
            "n_docs": int(postings.n_docs[i]),
            "density": len(values) / n_rows,
            "doc_density": int(postings.n_docs[i]) / n_documents,
            "mean": math.fsum(values) / len(values) if fires else None,
            "max": max(values) if fires else None,
            "sum": math.fsum(values),
            "max_row": min(int(postings.rows[j]) for j, v in zip(at, values, strict=True) if v == max(values)) if fires else None,
            "quantiles": np.quantile(values, QUANTILES).astype(np.float32).tolist() if fires else None,
            "hist_bins": sorted(bins),
            "hist_counts": [bins[b] for b in sorted(bins)],
            "top_tokens_by_count": sorted(tokens, key=lambda t: (-t["count"], -t["mean"], t["token_id"]))[:10],
            "top_tokens_by_mean": sorted(frequent, key=lambda t: (-t["mean"], -t["count"], t["token_id"]))[:10],
            "single_token_score": max(strong.values()) / sum(strong.values()) if fires else None,
            "decoder_norm": float(norms[i]),
            "is_dead": not fires,
            "is_ultra_dense": len(values) / n_rows > 0.1,
        })  # fmt: skip
    return answers


def close_to(want, rel):
    return want if want is None else pytest.approx(want, rel=rel)


def assert_same(found: pa.Table, expected):
    assert found.schema.names == [n for n in LATENT_STATS_SCHEMA.names if n not in ("promoted", "suppressed")]
    for got, want in zip(found.to_pylist(), expected, strict=True):
        for name in ("mean", "sum", "single_token_score", "density", "doc_density"):
            assert got.pop(name) == close_to(want.pop(name), 1e-12), (got["latent"], name)
        quantiles = got.pop("quantiles"), want.pop("quantiles")
        assert quantiles[0] == close_to(quantiles[1], 3e-7), got["latent"]
        for name in ("top_tokens_by_count", "top_tokens_by_mean"):
            a, b = got.pop(name), want.pop(name)
            assert [(t["token_id"], t["count"]) for t in a] == [(t["token_id"], t["count"]) for t in b], (
                got["latent"], name)  # fmt: skip
            assert [t["mean"] for t in a] == pytest.approx([t["mean"] for t in b], rel=1e-12)
        assert got == want
