"""Statistics of latents against a brute-force oracle that looks at one posting at a time."""

import numpy as np
import pytest

from actstore.ingest.encoding.latent_stats import RangePostings, latent_statistics
from actstore.latent_stats import histogram_bins, histogram_edges
from tests.encoding.naive_latents import assert_same, naive_statistics

N_ROWS = 400


def make_postings(seed, n_latents, *, first_latent=0, dtype=np.float16, n_values=None, n_tokens=40, dead=0.3, everywhere=(),
                  n_rows=N_ROWS):  # fmt: skip
    """Random postings with ties (few different values), dead latents, and latents that fire on every row."""
    rng = np.random.default_rng(seed)
    rows_per_latent = np.where(rng.random(n_latents) < dead, 0, rng.integers(1, 60, n_latents))
    rows_per_latent[list(everywhere)] = n_rows
    token_of_row = np.minimum(rng.zipf(1.5, n_rows), n_tokens).astype(np.int32) * 3
    doc_of_row = np.sort(rng.integers(0, 25, n_rows))
    rows, n_docs = [], np.zeros(n_latents, np.int64)
    for latent, n in enumerate(rows_per_latent):
        chosen = np.sort(rng.choice(n_rows, n, replace=False))
        n_docs[latent] = len(set(doc_of_row[chosen].tolist()))
        rows.append(chosen)
    rows = np.concatenate(rows).astype(np.int64)
    values = rng.gamma(1.0, 3.0, len(rows)) + 1e-3
    if n_values:
        values = np.ceil(values * n_values) / n_values
    indptr = np.concatenate([[0], np.cumsum(rows_per_latent)]).astype(np.int64)
    postings = RangePostings(
        first_latent, indptr, rows * 7 + 5, values.astype(dtype), token_of_row[rows], n_docs
    )
    return postings, len(set(doc_of_row.tolist()))


@pytest.mark.parametrize("block", [1, 100, 1 << 20])
@pytest.mark.parametrize(
    "made",
    [
        {"n_latents": 60},
        {"n_latents": 60, "n_values": 1, "dtype": np.float32, "everywhere": (0, 59)},
        {"n_latents": 60, "n_values": 2, "n_tokens": 1},
        {"n_latents": 30, "first_latent": 70_000, "n_tokens": 400, "n_values": 1, "everywhere": (3,)},
        {"n_latents": 30, "dtype": np.float32, "dead": 0.0, "n_tokens": 300},
        {"n_latents": 20, "dead": 1.0},
        {"n_latents": 1, "dead": 0.0},
    ],
    ids=["random", "ties", "one token", "over 65535", "float32", "all dead", "one latent"],
)
def test_every_statistic_is_that_of_a_loop_over_postings(made, block):
    for seed in range(3):
        postings, n_documents = make_postings(seed, **made)
        norms = np.random.default_rng(seed).random(postings.n_latents)
        found = latent_statistics(
            postings, n_rows=N_ROWS, n_documents=n_documents, decoder_norms=norms, block_postings=block
        )
        found.validate(full=True)
        assert_same(found, naive_statistics(postings, N_ROWS, n_documents, norms))


def test_no_latents_and_no_rows_make_an_empty_table():
    nothing = RangePostings(
        5, np.zeros(1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float16), np.zeros(0, np.int32),
        np.zeros(0, np.int64),
    )  # fmt: skip
    assert latent_statistics(nothing, n_rows=0, n_documents=0, decoder_norms=np.zeros(0)).num_rows == 0


def test_hand_made_latent():
    # Latent 9 fires on rows 2 3 5 7 11 with the values 1 4 4 2 4 on the tokens 7 8 8 7 6.
    postings = RangePostings(
        9,
        np.array([0, 5]),
        np.array([2, 3, 5, 7, 11]),
        np.array([1, 4, 4, 2, 4], np.float16),
        np.array([7, 8, 8, 7, 6], np.int32),
        np.array([3]),
    )
    row = latent_statistics(postings, n_rows=50, n_documents=6, decoder_norms=np.array([2.0])).to_pylist()[0]
    assert (row["n_tokens"], row["density"], row["doc_density"], row["is_ultra_dense"]) == (
        5,
        0.1,
        0.5,
        False,
    )
    assert (row["mean"], row["max"], row["sum"], row["max_row"]) == (3.0, 4.0, 15.0, 3)
    assert row["quantiles"] == [4.0] * 5
    assert (row["hist_bins"], row["hist_counts"]) == ([240, 256, 272], [1, 1, 3])
    assert row["top_tokens_by_count"] == [
        {"token_id": 8, "count": 2, "mean": 4.0},
        {"token_id": 7, "count": 2, "mean": 1.5},
        {"token_id": 6, "count": 1, "mean": 4.0},
    ]
    # The commonest token fires twice, so twice is enough for a place by mean: token 6, once, has none.
    assert [t["token_id"] for t in row["top_tokens_by_mean"]] == [8, 7]
    # The median is 4: three strong firings, two of them on token 8.
    assert row["single_token_score"] == pytest.approx(2 / 3)


def test_histogram_bins_are_sixteen_to_an_octave():
    values = np.array([6e-8, 0.5, 1.0, 1.99, 2.0, 65504.0], np.float32)
    bins = histogram_bins(values)
    edges, after = histogram_edges(bins), histogram_edges(bins + 1)
    assert ((edges <= values) & (values < after)).all()
    assert histogram_edges(np.arange(240, 257)).tolist() == [1 + i / 16 for i in range(17)]
