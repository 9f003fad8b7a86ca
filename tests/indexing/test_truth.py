"""Brute force that streams, against sorting every score: filters, ties, equal vectors, numbers that float32 cannot multiply."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.ingest.indexing.truth import Comparison, Truth, hash_rows


def naive(queries, own, rows, vectors, k, passing, is_l2):
    """(row, score) of the best k for each query, from Python's own sort."""
    answers = []
    for q, mine in zip(queries.astype(np.float64), own, strict=True):
        scored = []
        for row, v, passes in zip(rows.tolist(), vectors.astype(np.float64), passing, strict=True):
            if passes and row != mine:
                scored.append((-((q - v) ** 2).sum() if is_l2 else (q * v).sum(), -row))
        answers.append([(-row, score) for score, row in sorted(scored, reverse=True)[:k]])
    return answers


def stream(queries, own, rows, vectors, truths, masks, is_l2, cuts):
    comparison = Comparison(queries, own, is_l2=is_l2)
    edges = [0, *sorted(cuts), len(rows)]
    for start, stop in itertools.pairwise(edges):
        comparison.offer(rows[start:stop], vectors[start:stop], truths, [m[start:stop] for m in masks])
    for truth in truths:
        truth.settle()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from(["normal", "ties", "tiny", "huge"]))
def test_it_is_what_sorting_all_scores_gives(seed, is_l2, numbers):
    rng = np.random.default_rng(seed)
    n, d, k = int(rng.integers(1, 200)), int(rng.integers(1, 12)), int(rng.integers(1, 20))
    vectors = rng.standard_normal((n, d)).astype(np.float32)
    if numbers == "ties":
        vectors = rng.integers(-1, 2, (n, d)).astype(np.float32)
    vectors *= {"tiny": np.float32(1e-22), "huge": np.float32(1e19)}.get(numbers, np.float32(1))
    rows = np.sort(rng.choice(10 * n, n, replace=False))
    some = rng.choice(n, min(n, 7), replace=False)
    masks = [np.ones(n, bool), rng.random(n) < 0.4, np.zeros(n, bool)]
    truths = [Truth(len(some), k, share=1.0), Truth(len(some), k, share=0.4), Truth(len(some), k, share=0.0)]
    cuts = rng.integers(0, n + 1, 3).tolist()
    stream(vectors[some], rows[some], rows, vectors, truths, masks, is_l2, cuts)
    for truth, mask in zip(truths, masks, strict=True):
        expected = naive(vectors[some], rows[some], rows, vectors, k, mask, is_l2)
        for query, answer in enumerate(expected):
            count = int(truth.n_found(k)[query])
            assert truth.rows[query, :count].tolist() == [row for row, _ in answer]
            np.testing.assert_allclose(truth.scores[query, :count], [score for _, score in answer], rtol=1e-9)
        assert (truth.scores[~truth.exists()] == -np.inf).all()


def test_a_first_block_with_far_more_rows_than_are_wanted():
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((5000, 8)).astype(np.float32)
    rows, k = np.arange(5000), 3
    truth = Truth(4, k, share=1.0)
    stream(vectors[:4], rows[:4], rows, vectors, [truth], [np.ones(5000, bool)], False, [])
    scores = vectors[:4].astype(np.float64) @ vectors.T.astype(np.float64)
    scores[np.arange(4), np.arange(4)] = -np.inf
    assert truth.rows.tolist() == np.argsort(-scores, axis=1)[:, :k].tolist()


def test_fewer_queries_take_part_in_one_truth_than_in_another():
    rng = np.random.default_rng(4)
    vectors = rng.standard_normal((50, 5)).astype(np.float32)
    rows = np.arange(100, 150)
    truths = [Truth(10, 4, share=1.0), Truth(3, 9, share=1.0)]
    stream(vectors[:10], rows[:10], rows, vectors, truths, [np.ones(50, bool)] * 2, True, [20])
    assert truths[1].rows.shape == (3, 9)
    assert truths[1].rows[:, :4].tolist() == truths[0].rows[:3].tolist()


def test_equal_rows_have_one_hash_and_others_another():
    rng = np.random.default_rng(5)
    rows = rng.integers(-2, 3, (3000, 3)).astype(np.float32)
    rows = np.concatenate(
        [rows, rng.standard_normal((3000, 3)).astype(np.float32), -np.zeros((1, 3), np.float32)]
    )
    hashes = hash_rows(rows)
    _, by_value = np.unique(rows, axis=0, return_inverse=True)
    _, by_hash = np.unique(hashes, return_inverse=True)
    pairs = {(int(a), int(b)) for a, b in zip(by_value.ravel(), by_hash.ravel(), strict=True)}
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
    permuted = np.array([[1, 2, 3], [3, 2, 1], [2, 1, 3]], np.float32)
    assert len(set(hash_rows(permuted).tolist())) == 3
    assert hash_rows(rows[10:20]).tolist() == hashes[10:20].tolist()


@pytest.mark.parametrize("is_l2", [False, True])
def test_no_vectors_and_no_queries(is_l2):
    none = np.empty((0, 4), np.float32)
    truth = Truth(0, 5, share=1.0)
    stream(none, np.empty(0, np.int64), np.empty(0, np.int64), none, [truth], [np.empty(0, bool)], is_l2, [])
    assert truth.rows.shape == (0, 5)
