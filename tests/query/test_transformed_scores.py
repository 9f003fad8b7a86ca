import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.preprocessing import StandardScaler

from actstore.query.query_vectors import transform_queries
from actstore.query.scores import SimilarityScorer, TransformedScorer
from actstore.row_norms import row_norms
from actstore.transforms import Transform
from tests.query.naive import eligible, top

H = "layers.0.resid_post"


def made_of(rows: np.ndarray, steps) -> Transform:
    """A transform of these rows, by scikit-learn's means and deviations and numpy's eigenvectors."""
    d, wide = rows.shape[1], rows.astype(np.float64)
    scaler = StandardScaler().fit(wide)
    values, vectors = np.linalg.eigh(np.cov(wide, rowvar=False, bias=True))
    parts = {
        "centre": (None, scaler.mean_),
        "standardise": (None, scaler.mean_, 1 / scaler.scale_),
        "whiten": (None, scaler.mean_, None, np.ascontiguousarray((vectors / np.sqrt(values)) @ vectors.T)),
        "drop_outliers": (np.arange(1, d),),
    }
    return Transform((steps,), d, *parts[steps])


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
@pytest.mark.parametrize("step", ["centre", "standardise", "whiten", "drop_outliers"])
def test_scores_are_of_transformed_rows(metric, step):
    rng = np.random.default_rng(3)
    rows = (rng.standard_normal((500, 24)) @ (rng.standard_normal((24, 24)) + 5 * np.eye(24)) + 30).astype(
        np.float32
    )
    queries = rng.standard_normal((3, 24)) * 5 + 30
    transform = made_of(rows, step)
    moved = transform.apply(rows).astype(np.float64)
    asked = transform_queries(transform, queries, metric)
    scorer = TransformedScorer(transform, SimilarityScorer(asked, metric))
    assert (scorer.n_queries, scorer.metric) == (3, metric)
    upper = scorer.upper(rows, row_norms(rows)[0])
    for q in range(3):
        values = {
            "cosine": lambda q=q: 1 - cdist(asked[q : q + 1], moved, "cosine")[0],
            "ip": lambda q=q: moved @ asked[q],
            "l2": lambda q=q: cdist(asked[q : q + 1], moved)[0],
        }[metric]()
        np.testing.assert_allclose(scorer.value(rows, q), values, rtol=1e-9, atol=1e-9)
        exact = scorer.exact(rows, q)
        np.testing.assert_allclose(exact, -(values**2) if metric == "l2" else values, rtol=1e-9, atol=1e-9)
        assert (upper[:, q] >= exact).all()
        assert (
            upper[:, q] <= exact + 0.01 * (1 + np.abs(exact))
        ).all()  # bounds that bound nothing would do no good
        some = rng.choice(500, 7, replace=False)
        assert scorer.exact(rows[some], q).tobytes() == exact[some].tobytes()


def test_rows_that_become_zeros_or_overflow():
    rows = np.float32([[1, 2], [1, 2], [3, 3], [3e38, 2]])
    transform = Transform(("standardise",), 2, None, np.array([1.0, 2.0]), np.array([10.0, 1.0]))
    for metric in ("cosine", "ip", "l2"):
        scorer = TransformedScorer(transform, SimilarityScorer(np.array([[1.0, 1.0]]), metric))
        exact = scorer.exact(rows, 0)
        upper = scorer.upper(rows, row_norms(rows)[0])
        assert not np.isnan(upper).any()
        assert (upper[:, 0] >= exact).all()
        if metric == "cosine":
            assert exact[:2].tolist() == [-np.inf, -np.inf]
        assert exact[2] > -np.inf


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_a_scan_in_transformed_space(made, metric):
    """Masks and sinks are those of the stored rows; the order that of transformed ones."""
    rows = list(eligible(made, H, zero=metric == "cosine"))
    everything = np.stack([a for a in made.acts["run", H].values() if np.isfinite(a).all()]).astype(
        np.float64
    )
    mean, std = everything.mean(axis=0), everything.std(axis=0)
    query = np.random.default_rng(4).standard_normal(12)
    asked = (query - mean) / std

    def score(acts):
        moved = (acts - mean) / std
        if metric == "l2":
            return -float(np.linalg.norm(moved - asked))
        return float(moved @ asked / np.linalg.norm(moved) / np.linalg.norm(asked))

    result = made.run().nearest(H, query, 15, metric=metric, transform="standardize")
    wanted = top(made, rows, score, 15)
    assert result.table["row"].to_pylist() == [row for row, _ in wanted]
    sign = -1 if metric == "l2" else 1
    np.testing.assert_allclose(result.table["value"], [sign * s for _, s in wanted], rtol=1e-5, atol=1e-6)
    assert result.meta.n_eligible == len(rows)
