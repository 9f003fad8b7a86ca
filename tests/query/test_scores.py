import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actstore.query.scores import NeuronScorer, ProjectionScorer, SimilarityScorer, dot64
from actstore.row_norms import row_norms

seeds = st.integers(0, 2**32 - 1)


def hard_rows(rng, n, d):
    """Rows of all magnitudes, with cancellation, subnormals and near overflow."""
    acts = rng.standard_normal((n, d)).astype(np.float32)
    scale = 10.0 ** rng.integers(-40, 38, n)
    with np.errstate(all="ignore"):
        acts = (acts * scale[:, None]).astype(np.float32)
    acts[rng.integers(0, n)] = 0
    acts[~np.isfinite(acts)] = np.float32(3e38)
    return acts


def exact_dot(a, b):
    return math.fsum(float(x) * float(y) for x, y in zip(a, b, strict=True))


@given(seeds, st.integers(1, 70), st.sampled_from(["pos", "neg", "abs"]))
def test_projection_bounds_hold(seed, d, sign):
    rng = np.random.default_rng(seed)
    acts = hard_rows(rng, 40, d)
    vectors = rng.standard_normal((3, d)) * 10.0 ** rng.integers(-20, 20, (3, 1))
    vectors[0] = acts[5] if acts[5].any() else 1.0
    norms, finite = row_norms(acts)
    assert finite.all()
    scorer = ProjectionScorer(vectors, sign)
    upper = scorer.upper(acts, norms)
    for q in range(3):
        scores = scorer.exact(acts, q)
        assert (upper[:, q] >= scores).all(), (seed, q)
        for i in range(len(acts)):
            true = exact_dot(acts[i], vectors[q])
            signed = {"pos": true, "neg": -true, "abs": abs(true)}[sign]
            assert upper[i, q] >= signed


@given(seeds, st.integers(1, 70), st.sampled_from(["cosine", "ip", "l2"]))
def test_similarity_bounds_hold(seed, d, metric):
    rng = np.random.default_rng(seed)
    acts = hard_rows(rng, 40, d)
    vectors = rng.standard_normal((3, d)) * 10.0 ** rng.integers(-10, 10, (3, 1))
    vectors[0] = acts[5] if acts[5].any() else 1.0
    scorer = SimilarityScorer(vectors, metric)
    upper = scorer.upper(acts, row_norms(acts)[0])
    for q in range(3):
        assert (upper[:, q] >= scorer.exact(acts, q)).all(), (seed, q)


@given(seeds, st.integers(1, 40))
def test_bounds_are_tight_enough_to_be_useful(seed, d):
    rng = np.random.default_rng(seed)
    acts = rng.standard_normal((50, d)).astype(np.float32)
    vectors = rng.standard_normal((2, d))
    scorer = SimilarityScorer(vectors, "ip")
    gap = scorer.upper(acts, row_norms(acts)[0]) - np.stack([scorer.exact(acts, q) for q in range(2)], axis=1)
    assert (
        gap <= 1e-4 * np.linalg.norm(acts, axis=1)[:, None] * np.linalg.norm(vectors, axis=1) + 1e-25
    ).all()


@given(seeds, st.integers(1, 300))
def test_equal_rows_score_equal_whatever_is_around_them(seed, d):
    rng = np.random.default_rng(seed)
    acts = rng.standard_normal((64, d)).astype(np.float32)
    w = rng.standard_normal(d)
    whole = dot64(acts, w)
    for start, stop in [(0, 1), (3, 4), (5, 38), (17, 64)]:
        assert (dot64(acts[start:stop], w) == whole[start:stop]).all()
    for i in (0, 63):
        assert whole[i] == pytest.approx(exact_dot(acts[i], w), rel=1e-12, abs=1e-12)


def test_neurons_are_the_stored_values():
    acts = np.array([[1.5, -2.0], [0.0, 3.0]], np.float32)
    scorer = NeuronScorer([1, 0], "neg")
    assert scorer.upper(acts, np.ones(2)).tolist() == [[2.0, -1.5], [-3.0, 0.0]]
    assert scorer.value(acts, 0).tolist() == [-2.0, 3.0]


def test_norms_of_extreme_rows():
    acts = np.array([[3e-30, 4e-30], [3e30, 4e30], [0, 0], [np.nan, 1], [np.inf, 1], [1e-45, 0]], np.float32)
    norms, finite = row_norms(acts)
    assert norms[:2] == pytest.approx([5e-30, 5e30], rel=1e-6)
    assert norms[2] == 0
    assert norms[5] == pytest.approx(1.4e-45, rel=0.01)
    assert finite.tolist() == [True, True, True, False, False, True]
