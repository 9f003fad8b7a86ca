import json
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

import actstore
from actstore import transforms
from actstore.covariance import covariance_of
from actstore.errors import ErrorKind, FormatError, InvalidInputError, NotFoundError
from actstore.stats import block_stats
from actstore.transforms import STEPS, Transform, fit_transform, parse_steps
from tests.ingest.kept import HOOK_POINTS, KeptRun, activations, tokenized

H = "layers.0.resid_post"
D = HOOK_POINTS[H]


def rows_of(seed: int, n: int, d: int) -> np.ndarray:
    """Correlated rows with a large common mean."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((d, d)) + np.sqrt(d) * np.eye(d)
    return (rng.standard_normal((n, d)) @ mix + 20 * rng.standard_normal(d)).astype(np.float32)


class FakeRun:
    """Rows in memory with the statistics that a run would have stored."""

    def __init__(self, rows: np.ndarray, name: str) -> None:
        self.rows, self.id = rows, name
        self.tokens = np.arange(len(rows))
        self.collection = type("Collection", (), {"units": {}, "fingerprint": name})()

    def d_model(self, hook_point: str) -> int:
        return self.rows.shape[1]

    def stats(self, hook_point: str):
        return block_stats(hook_point, self.rows)

    def covariance(self, hook_point: str):
        return covariance_of(
            lambda block, _: self.rows[block], n_rows=len(self.rows), d_model=self.rows.shape[1]
        )


def fit(rows: np.ndarray, *steps: str) -> Transform:
    transforms._CACHE.clear()
    return fit_transform(FakeRun(rows, "fake"), H, steps)


def covariance(rows: np.ndarray) -> np.ndarray:
    return np.cov(rows.astype(np.float64), rowvar=False, bias=True)


def test_steps_are_named_alike():
    assert parse_steps(None) == parse_steps("") == parse_steps([]) == ()
    assert parse_steps(["whiten", "center"]) == parse_steps("centre, whiten") == ("centre", "whiten")
    assert parse_steps(("STANDARDIZE", "drop-outliers")) == ("drop_outliers", "standardise")
    assert parse_steps(STEPS[::-1]) == STEPS


@pytest.mark.parametrize(
    "steps", ["pca", ["centre", "center"], [1], 3, ["centre", ""], "centre,centre", b"centre"]
)
def test_bad_steps(steps):
    with pytest.raises(InvalidInputError, match="transform") as caught:
        parse_steps(steps)
    assert caught.value.kind == ErrorKind.BAD_ARGUMENT


def test_by_hand():
    rows = np.float32([[0, 10, 5], [4, 10, 5], [0, 30, 5], [4, 30, 5]])
    np.testing.assert_array_equal(
        fit(rows, "centre").apply(rows), [[-2, -10, 0], [2, -10, 0], [-2, 10, 0], [2, 10, 0]]
    )
    unit = [[-1, -1, 0], [1, -1, 0], [-1, 1, 0], [1, 1, 0]]
    np.testing.assert_array_equal(fit(rows, "standardise").apply(rows), unit)
    # Uncorrelated already: whitening divides by the deviations, but for eps (1e-8 of the mean of 4, 100 and 0).
    np.testing.assert_allclose(fit(rows, "whiten").apply(rows), unit, atol=1e-4)
    # What lies where no row does is not there: the third dimension does not vary.
    far = np.float32([[0, 10, 1e6]])
    np.testing.assert_array_equal(fit(rows, "standardise").apply(far), [[-1, -1, 0]])
    assert fit(rows, "whiten").apply(far)[0, 2] == 0


def test_standardise_is_scikit_learns():
    rows = rows_of(1, 500, 40)
    rows[:, 7] = 3.25
    expected = StandardScaler().fit_transform(rows.astype(np.float64))
    np.testing.assert_allclose(fit(rows, "standardise").apply(rows), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(fit(rows, "centre", "standardise").apply(rows), expected, rtol=1e-6, atol=1e-6)
    centred = rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(fit(rows, "centre").apply(rows), centred, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [("whiten",), ("standardise", "whiten"), ("centre", "whiten")])
def test_whitened_rows_vary_alike_in_all_directions(steps):
    rows = rows_of(2, 4000, 24)
    moved = fit(rows, *steps).apply(rows)
    np.testing.assert_allclose(moved.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(covariance(moved), np.eye(24), atol=2e-3)
    # Any two whitenings differ by a rotation: inner products are those of scikit-learn's.
    whitened = PCA(whiten=True, svd_solver="full").fit_transform(rows.astype(np.float64))
    whitened *= np.sqrt(len(rows) / (len(rows) - 1))  # it divides by n - 1
    np.testing.assert_allclose(moved[:50] @ moved[50:100].T, whitened[:50] @ whitened[50:100].T, atol=0.05)


def test_directions_of_little_variance_are_not_blown_up_further():
    rng = np.random.default_rng(15)
    deviations = np.array([100.0, 10.0, 1.0, 0.1, 0.01, 0.001])
    rows = (rng.standard_normal((50_000, 6)) * deviations).astype(np.float32)
    values = np.linalg.eigvalsh(covariance(rows))
    expected = values / (values + 1e-8 * values.mean())
    found = np.linalg.eigvalsh(covariance(fit(rows, "whiten").apply(rows)))
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert found[0] < 0.1
    assert found[1] < 0.9  # the figures are such that eps matters


def test_zca_turns_rows_least():
    """Of all whitenings ZCA is the one whose cross-covariance with the rows is symmetric and positive definite (Kessy et al.)."""
    rows = rows_of(3, 3000, 12)
    for steps, scaled in ((("whiten",), rows), (("standardise", "whiten"), rows / rows.std(axis=0))):
        moved = fit(rows, *steps).apply(rows)
        centred = scaled - scaled.mean(axis=0)
        cross = moved.T.astype(np.float64) @ centred / len(rows)
        np.testing.assert_allclose(cross, cross.T, atol=1e-3 * np.abs(cross).max())
        assert np.linalg.eigvalsh((cross + cross.T) / 2).min() > 0


def test_rank_deficient_rows():
    rng = np.random.default_rng(4)
    rows = (rng.standard_normal((2000, 3)) @ rng.standard_normal((3, 16)) * 5 + 2).astype(np.float32)
    transform = fit(rows, "whiten")
    values = np.linalg.eigvalsh(covariance(transform.apply(rows)))
    np.testing.assert_allclose(values[-3:], 1, atol=1e-3)
    np.testing.assert_allclose(values[:-3], 0, atol=1e-3)
    exact = np.repeat(
        np.float32(rng.integers(-8, 8, (500, 4))), 2, axis=1
    )  # pairs of equal dimensions: rank 4 of 8
    transform = fit(exact, "whiten")
    odd = np.float32([[1, -1, 0, 0, 0, 0, 0, 0]]) * 1000 + exact[:1]
    np.testing.assert_allclose(transform.apply(odd), transform.apply(exact[:1]), atol=1e-3)


def test_outlier_dimensions_are_left_out():
    rows = np.random.default_rng(5).standard_normal((400, 30)).astype(np.float32)
    rows[:, 4] += 300
    rows[:, 11] *= 200
    transform = fit(rows, "drop_outliers")
    others = [i for i in range(30) if i not in (4, 11)]
    np.testing.assert_array_equal(transform.apply(rows), rows[:, others])
    assert (transform.d_in, transform.d_out) == (30, 28)
    both = fit(rows, "centre", "drop_outliers")
    np.testing.assert_allclose(both.apply(rows), (rows - rows.mean(axis=0))[:, others], atol=1e-4)
    whitened = fit(rows, "whiten", "drop_outliers").apply(rows)
    np.testing.assert_allclose(covariance(whitened), np.eye(28), atol=1e-3)
    plain = rows[:, others]
    assert fit(plain, "drop_outliers").apply(plain).tobytes() == plain.tobytes()


@pytest.mark.parametrize(
    "steps", [("centre",), ("standardise",), ("whiten",), ("drop_outliers", "standardise", "whiten")]
)
def test_equal_rows_give_equal_results(steps):
    """Bit by bit, whatever is around a row, how many there are, and how many threads compute."""
    rows = rows_of(6, 3000, 97)
    rows[::7] = rows[5]
    transform = fit(rows, *steps)
    together = transform.apply(rows)
    assert len({together[i].tobytes() for i in range(0, 3000, 7)}) == 1
    rng = np.random.default_rng(7)
    for size in (1, 2, 3, 17, 64, 333, 1024):
        some = rng.choice(3000, size, replace=False)
        assert transform.apply(rows[some]).tobytes() == together[some].tobytes()
        assert transform.apply(rows[some].astype(np.float64)).tobytes() == together[some].tobytes()
    assert transform.apply(np.asfortranarray(rows)).tobytes() == together.tobytes()


def test_threads_change_nothing():
    rng = np.random.default_rng(16)
    rows = rng.standard_normal((700, 512)).astype(np.float32)
    transform = Transform(("whiten",), 512, None, np.zeros(512), None, rng.standard_normal((512, 512)))
    with threadpool_limits(1):
        alone = transform.apply(rows)
        one_by_one = np.concatenate([transform.apply(row[None]) for row in rows[:50]])
    with threadpool_limits(2):
        assert transform.apply(rows).tobytes() == alone.tobytes()
    assert one_by_one.tobytes() == alone[:50].tobytes()


def test_sums_near_the_middle_are_added_up_again():
    """A product that lies in the middle of two float32 numbers, where BLAS's order would decide."""
    rng = np.random.default_rng(8)
    d = 64
    middle = 1 + 2.0**-24  # between 1 and the next float32
    parts = rng.standard_normal(d - 1) * 1e3
    row = np.concatenate([parts, [middle - parts.sum()]])[None]
    transform = Transform(("whiten",), d, None, np.zeros(d), None, np.ones((d, d)))
    alone = transform.apply(row)
    assert set(alone.ravel().tolist()) == {alone[0, 0]}
    for n in (2, 5, 16, 100):
        many = transform.apply(np.repeat(row, n, axis=0))
        assert many.tobytes() == np.repeat(alone, n, axis=0).tobytes()
    assert abs(float(alone[0, 0]) - 1) <= 2.0**-23


@pytest.mark.parametrize(
    "steps", [(), ("centre",), ("whiten",), ("standardise", "whiten"), ("drop_outliers", "whiten")]
)
def test_float64_sums(steps):
    """The map itself, against a plain evaluation of the stored parts in float64."""
    rows = rows_of(9, 300, 33)
    rows[:, 3] *= 500
    t = fit(rows, *steps)
    expected = rows.astype(np.float64) if t.keep is None else rows[:, t.keep].astype(np.float64)
    if t.mean is not None:
        expected = expected - t.mean
    if t.scale is not None:
        expected = expected * t.scale
    if t.matrix is not None:
        expected = np.einsum("td,ed->te", expected, t.matrix)
    np.testing.assert_allclose(t.apply(rows), expected, rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("steps", [("centre",), ("standardise", "whiten"), ("drop_outliers",)])
def test_odd_rows(steps):
    rows = rows_of(10, 400, 20)
    rows[:, 2] *= 1000
    transform = fit(rows, *steps)
    odd = rows[:6].copy()
    odd[1, 3], odd[2, 0], odd[3, 2] = np.nan, np.inf, -np.inf
    odd[4] = 3e38
    odd[5] = 0
    moved = transform.apply(odd)
    assert np.isnan(moved[1:4]).all()  # also where the dimension itself is left out
    assert np.isfinite(moved[[0, 5]]).all()
    assert not np.isnan(moved[4]).any() or "whiten" in steps
    assert transform.apply(odd[:0]).shape == (0, transform.d_out)
    negative = transform.apply(-np.zeros((1, 20), np.float32))
    assert negative.tobytes() == transform.apply(np.zeros((1, 20), np.float32)).tobytes()
    with pytest.raises(InvalidInputError, match="20 dimensions"):
        transform.apply(rows[:, :5])


def test_huge_and_tiny_numbers():
    rng = np.random.default_rng(11)
    for scale in (1e-30, 1e30):
        rows = (rng.standard_normal((600, 8)) * scale).astype(np.float32)
        for steps in (("standardise",), ("whiten",)):
            moved = fit(rows, *steps).apply(rows)
            np.testing.assert_allclose(np.diag(covariance(moved)), 1, atol=1e-3)


def test_rows_of_which_nothing_is_left():
    constant = np.full((50, 6), 2.5, np.float32)
    for steps in (("standardise",), ("whiten",)):
        with pytest.raises(InvalidInputError, match="leaves nothing"):
            fit(constant, *steps)
    assert not fit(constant, "centre").apply(constant).any()
    with pytest.raises(InvalidInputError, match="no finite rows"):
        fit(np.full((5, 6), np.nan, np.float32), "centre")


def test_nonfinite_rows_do_not_count():
    rows = rows_of(12, 300, 10)
    spoilt = np.concatenate([rows, np.full((7, 10), np.inf, np.float32)])
    np.testing.assert_array_equal(
        fit(spoilt, "standardise").apply(rows), fit(rows, "standardise").apply(rows)
    )


@pytest.mark.parametrize("steps", [(), ("centre",), ("standardise",), ("drop_outliers", "whiten"), STEPS])
def test_stored_and_read_back(steps):
    rows = rows_of(13, 300, 12)
    rows[:, 5] *= 1000
    transform = fit(rows, *steps)
    again = Transform.from_bytes(transform.to_bytes())
    assert (again.steps, again.d_in, again.d_out) == (transform.steps, 12, transform.d_out)
    assert again.is_identity == (steps == ())
    assert again.apply(rows).tobytes() == transform.apply(rows).tobytes()


def test_damaged_transforms():
    good = fit(rows_of(14, 100, 6), "whiten")
    data = good.to_bytes()
    arrays = safetensors.numpy.load(data)
    about = {"steps": json.dumps(["whiten"]), "d_in": "6"}

    def saved(arrays=arrays, **changes) -> bytes:
        return safetensors.numpy.save(arrays, about | changes)

    assert Transform.from_bytes(saved()).steps == ("whiten",)
    bad = [
        b"", b"x" * 100, data[:-1], data + b"x", saved(steps="[]", d_in="7"), saved(steps='["pca"]'), saved(d_in="x"),
        saved(steps="{"), saved(arrays | {"more": np.zeros(2)}), saved(arrays | {"mean": np.zeros(5)}),
        saved(arrays | {"mean": np.zeros(6, np.float32)}), saved(arrays | {"mean": np.full(6, np.nan)}),
        saved(arrays | {"keep": np.arange(1, 7)}), safetensors.numpy.save(arrays),
    ]  # fmt: skip
    for piece in bad:
        with pytest.raises(FormatError, match="not a stored transform"):
            Transform.from_bytes(piece)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run with rows, pooled vectors and covariances, and one without covariances."""
    folder = tmp_path_factory.mktemp("transforms")
    store = actstore.open(str(folder / "a.store"), create=True)
    tokenization = tokenized(store, folder / "tokenizer", n=60)
    full = KeptRun(store, "full", tokenization, keep=("dense", "pooled"), covariance=True)
    return {
        "full": full.finish(),
        "bare": KeptRun(store, "bare", tokenization).finish(),
        "part": KeptRun(store, "part", tokenization, covariance=True).finish(without=(1,), seal=False),
        "acts": np.concatenate(list(full.captured(H).values())),
        "kept": full,
    }


def test_fitted_to_a_run(runs):
    acts = runs["acts"]
    expected = StandardScaler().fit_transform(acts.astype(np.float64))
    np.testing.assert_allclose(
        fit_transform(runs["full"], H, "standardize").apply(acts), expected, rtol=1e-5, atol=1e-5
    )
    whitened = fit_transform(runs["full"], "blocks.0.hook_resid_post", ["whiten"]).apply(acts)
    np.testing.assert_allclose(covariance(whitened), np.eye(D), atol=1e-4)
    rows = np.concatenate([a for u, a in runs["kept"].captured(H).items() if u != 1])
    np.testing.assert_allclose(
        fit_transform(runs["part"], H, "centre").mean, rows.mean(axis=0, dtype=np.float64), rtol=1e-9
    )
    assert fit_transform(runs["full"], H, ()).apply(acts) is acts


def test_fitted_once(runs):
    first = fit_transform(runs["full"], H, "whiten")
    assert fit_transform(runs["full"], H, ["whiten"]) is first
    assert fit_transform(runs["full"], H, "centre") is not first
    assert fit_transform(runs["full"], H, "whiten", of="documents") is not first


def test_fitted_to_documents(runs):
    found = runs["full"].pooled(H, "last").to_numpy()
    moved = fit_transform(runs["full"], H, "standardise", of="documents", pooling="last").apply(found.vectors)
    expected = StandardScaler().fit_transform(found.vectors.astype(np.float64))
    np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=1e-5)
    whitened = fit_transform(runs["full"], H, "whiten", of="documents").apply(
        runs["full"].pooled(H).to_numpy().vectors
    )
    np.testing.assert_allclose(covariance(whitened), np.eye(D), atol=1e-3)


def test_what_a_run_lacks(runs):
    with pytest.raises(InvalidInputError, match=r"covariance=True \(--covariance\)"):
        fit_transform(runs["bare"], H, "whiten")
    with pytest.raises(InvalidInputError, match="keep="):
        fit_transform(runs["bare"], H, "centre", of="documents")
    with pytest.raises(NotFoundError, match=r"layers\.9"):
        fit_transform(runs["full"], "layers.9.resid_post", "centre")
    with pytest.raises(InvalidInputError, match="pca"):
        fit_transform(runs["full"], H, ["pca"])


def test_a_view_of_other_parts_is_not_confused(runs):
    """The kept transform is that of the stored units: a run with fewer has another."""
    assert not np.array_equal(
        fit_transform(runs["part"], H, "centre").mean, fit_transform(runs["full"], H, "centre").mean
    )
    assert replace(fit_transform(runs["full"], H, "centre")).steps == ("centre",)


def test_activations_of_the_double_are_seeded(runs):
    """The oracle's rows are those that were stored."""
    tokens = runs["full"].tokenization.unit_table(0)
    np.testing.assert_array_equal(activations(tokens, D), runs["full"].activations(H)[: tokens.num_rows])
