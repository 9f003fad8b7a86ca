"""Products with bytes: never further from float64's inner products than is said, and nothing better is left out."""

import numpy as np
import pytest
from safetensors.numpy import load

from actstore.query.code_scan import CompressedRows
from actstore.sq8 import CodeQueries, Compression
from tests.query.make_directions import KINDS, compress, make_rows, opened

N_BLOCK = 70_000  # more than two threads' least rows


def make_directions(d: int, rng) -> np.ndarray:
    w = rng.standard_normal((14, d))
    w[0] = 0
    w[0, 3] = 1
    w[1] = 0
    w[1, d - 1] = -1e-5
    w[2] *= 1e-300
    w[3] *= 1e150
    w[4, ::2] = 0
    w[5] = 0
    w[6] *= 5e-324 / np.abs(w[6]).max()  # denormal
    w[7] *= 10.0 ** rng.integers(-40, 40, d)
    w[8] = np.sign(w[8])
    return w


def products(rows: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Inner products as a scorer computes them, in float64 row by row, (q, n)."""
    with np.errstate(all="ignore"):
        return np.stack([(rows.astype(np.float64) * one).sum(axis=1) for one in w])


def check(found, w, true, keep, k):
    for q in range(len(w)):
        ordinals = found.ordinals[q][found.ordinals[q] >= 0]
        values = found.values[q][found.ordinals[q] >= 0]
        assert len(set(ordinals.tolist())) == len(ordinals)
        assert keep[ordinals].all()
        assert len(ordinals) >= min(k, keep.sum())
        assert (np.abs(true[q][ordinals] - values) <= found.slack_q[q]).all()
        others = keep.copy()
        others[ordinals] = False
        if others.any():
            assert true[q][others].max() <= found.beyond_q[q]
        else:
            assert found.beyond_q[q] == -np.inf or len(ordinals) >= k


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_directions", [1, 3, 14])
def test_products_are_within_the_bound_and_nothing_better_is_beyond(kind, n_directions):
    rng = np.random.default_rng([n_directions, len(kind)])
    rows = make_rows(kind)
    files = compress(rows)
    keep = rng.random(len(rows)) < 0.7
    keep[load(files["exceptions"])["ordinals"]] = False
    bits = np.packbits(keep, bitorder="little")
    compressed = CompressedRows(opened(files["faiss"]))
    every = make_directions(rows.shape[1], rng)
    true = products(rows, every)
    for start in range(0, len(every), n_directions):
        some = slice(start, start + n_directions)
        for k in (1, 7, 300, len(rows) + 5):
            check(compressed.best(every[some], k, bits=bits, threads=2), every[some], true[some], keep, k)


@pytest.mark.parametrize("n_directions", [2, 9])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_many_rows_on_several_threads(n_directions, threads):
    rng = np.random.default_rng(threads)
    rows = (rng.standard_normal((N_BLOCK + 3, 8)) * np.arange(1, 9)).astype(np.float32)
    rows[100:200] = rows[7]  # ties
    files = compress(rows, block=20_000)
    keep = rng.random(len(rows)) < 0.5
    keep[load(files["exceptions"])["ordinals"]] = False
    keep[:20_000] = False  # a part without a row that counts
    w = rng.standard_normal((n_directions, 8))
    compressed = CompressedRows(opened(files["faiss"]))
    for k in (1, 40, 5000):
        found = compressed.best(w, k, bits=np.packbits(keep, bitorder="little"), threads=threads)
        check(found, w, products(rows, w), keep, k)


def test_no_row_counts():
    rows = make_rows("plain")
    compressed = CompressedRows(opened(compress(rows)["faiss"]))
    for n_directions in (1, 20):
        bits = np.zeros(-(-len(rows) // 8), np.uint8)
        found = compressed.best(np.ones((n_directions, 24)), 5, bits=bits, threads=1)
        assert (found.ordinals == -1).all()
        assert (found.beyond_q == -np.inf).all()


@pytest.mark.parametrize("shift", [0.0, 127.5])
def test_the_bound_is_attained_and_no_looser_than_it_must_be(shift):
    """Along one axis the middle of a bin is off by up to half a bin; the bound allows a twentieth more."""
    rng = np.random.default_rng(0)
    low, width = np.zeros(4, np.float32), np.array([255, 510, 25.5, 1e-30], np.float32)
    compression = Compression(low, width, None)
    queries = CodeQueries(compression, np.eye(4), shift=shift)
    step = width.astype(np.float64) / 255
    assert (queries.slack_q >= step / 2).all()
    assert (queries.slack_q <= 0.525 * step).all()
    rows = (rng.random((50_000, 4)) * width * 0.999).astype(np.float32)
    codes, fits = compression.encode(rows)
    assert fits.all()
    raw = (codes.astype(np.float64) - shift) @ queries.vectors_qd.T.astype(np.float64)
    error = np.abs(queries.values(raw.T.astype(np.float32)) - rows.T.astype(np.float64))
    assert (error.max(axis=1) <= queries.slack_q).all()
    assert (error.max(axis=1) >= 0.499 * step).all()


def test_a_turned_axis_of_little_spread_is_told_apart():
    """Rows differ along one direction by a thousandth of what they differ by along others: its bound follows that."""
    rng = np.random.default_rng(1)
    turn, _ = np.linalg.qr(rng.standard_normal((24, 24)))
    spread = np.ones(24)
    spread[0] = 1e-3
    rows = ((rng.standard_normal((3000, 24)) * spread) @ turn.T).astype(np.float32)
    narrow = turn[:, 0]
    found = CompressedRows(opened(compress(rows)["faiss"])).best(
        narrow[None], 10, bits=np.full(375, 255, np.uint8), threads=1
    )
    assert found.slack_q[0] < 0.1 * (rows.astype(np.float64) @ narrow).std()
