"""int8 rows are within the stated error of the numbers they stand for, and better than plain int8 where it matters."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from actstore.dtypes import SCALE_BYTES, count_nonfinite, row_scales
from actstore.errors import InvalidInputError
from actstore.int8 import (
    Int8Error,
    Int8Transform,
    dequantise,
    fit_int8,
    int8_error,
    parse_int8,
    quantise,
)

ANY = st.floats(width=32, allow_nan=True, allow_infinity=True)
FINITE = st.floats(-(2.0**100), 2.0**100, width=32)


def exact(rows, transform):
    """Scales and numbers in float64: what float32 arithmetic should come close to."""
    grown = 2.0 ** transform.exponent.astype(np.float64)
    centred = (rows.astype(np.float64) - transform.mean.astype(np.float64)) / grown
    return np.abs(centred).max(axis=1) / 127, centred


def naive_numbers(stored, transform):
    """FORMAT.md, section 6.7, number by number in Python's float64, rounded to float32 after each step."""
    answer = np.empty((len(stored), stored.shape[1] - 4), np.float32)
    for row, given_row in zip(answer, stored, strict=True):
        scale = float(np.frombuffer(given_row[-4:].tobytes(), "<f4")[0])
        for i, q in enumerate(given_row[:-4].tolist()):
            step = float(np.float32(q * scale))
            grown = float(np.float32(step * 2.0 ** int(transform.exponent[i])))
            row[i] = np.float32(grown + float(transform.mean[i]))
    return answer


@st.composite
def cases(draw, values=FINITE):
    d_model = draw(st.integers(1, 9))
    rows = draw(arrays(np.float32, (draw(st.integers(0, 6)), d_model), elements=values))
    mean = draw(arrays(np.float32, d_model, elements=st.floats(-(2.0**90), 2.0**90, width=32)))
    exponent = draw(arrays(np.int8, d_model, elements=st.integers(-20, 60)))
    return rows, Int8Transform(mean, exponent)


@settings(max_examples=300, deadline=None)
@given(cases())
def test_the_stated_error(case):
    rows, transform = case
    stored = quantise(rows, transform)
    assert stored.dtype == np.int8
    assert stored.shape == (len(rows), rows.shape[1] + 4)
    found = dequantise(stored, transform).astype(np.float64)
    scales = row_scales(stored).astype(np.float64)
    steps = scales[:, None] * 2.0 ** transform.exponent.astype(np.float64)
    true, mean = rows.astype(np.float64), np.abs(transform.mean.astype(np.float64))
    tiny = 2.0**-119 * 2.0 ** transform.exponent.astype(np.float64)
    bound = 0.5001 * steps + 2.0**-23 * (np.abs(true) + 2 * mean) + tiny
    assert (np.abs(found - true) <= bound).all()
    assert np.abs(stored[:, :-4].astype(int)).max(initial=0) <= 127
    expected = exact(rows, transform)[0]
    assert np.allclose(scales[expected > 2.0**-120], expected[expected > 2.0**-120], rtol=1e-5)


@settings(max_examples=300, deadline=None)
@given(cases(values=ANY))
def test_rows_that_are_not_finite_read_as_nan_and_leave_the_others_alone(case):
    rows, transform = case
    found = dequantise(quantise(rows, transform), transform)
    finite = np.isfinite(rows).all(axis=1)
    assert np.isnan(found[~finite]).all()
    # Beyond 2^100 a row may overflow: then all of it is NaN, and none of it plausible.
    whole = np.isfinite(found).all(axis=1)
    assert np.isnan(found[~whole]).all()
    small = finite & (np.abs(np.where(np.isfinite(rows), rows, 0)).max(axis=1, initial=0) < 2.0**100)
    assert whole[small].all()
    alone = [dequantise(quantise(row[None], transform), transform) for row in rows]
    assert np.concatenate([np.empty_like(found[:0]), *alone]).tobytes() == found.tobytes()
    stored = quantise(rows, transform)
    assert count_nonfinite(stored, "int8") == rows.shape[1] * int(np.isnan(row_scales(stored)).sum())


@pytest.mark.parametrize(
    ("exponent", "mean"), [([0, 0], 0.0), ([0, 5], 0.0), ([-9, -3], 0.0), ([7, 0], 1e38)]
)
def test_no_finite_row_is_read_with_an_infinity(exponent, mean):
    """Rounding carries numbers near the largest float32 past it: such rows are NaN as a whole, and counted."""
    largest = np.finfo(np.float32).max
    rng = np.random.default_rng(0)
    rows = np.concatenate(
        [
            largest * (1 - 2.0 ** -np.arange(1, 25)[:, None]) * [1, 0.3],
            largest * rng.uniform(-1, 1, (200, 2)),
            [[largest, 0], [0, -largest]],
        ]
    ).astype(np.float32)
    transform = Int8Transform(np.full(2, mean, np.float32), np.array(exponent, np.int8))
    stored = quantise(rows, transform)
    found = dequantise(stored, transform)
    is_nan = np.isnan(found).any(axis=1)
    assert np.isnan(found[is_nan]).all()
    assert np.isfinite(found[~is_nan]).all()
    assert is_nan.any()
    assert count_nonfinite(stored, "int8") == 2 * int(is_nan.sum())
    small = rows / np.float32(64)
    assert np.isfinite(dequantise(quantise(small, transform), transform)).all() or min(exponent) < 0
    assert np.isfinite(int8_error(rows / np.float32(2), quantise(rows, transform), transform).largest)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(1, 700), st.integers(0, 2**32))
def test_numbers_are_those_of_the_format(n_rows, d_model, seed):
    """Whatever the scales, exponents and blocks, and for any choice of columns."""
    rng = np.random.default_rng(seed)
    d_model = min(d_model, 4000 // n_rows)
    d_model = max(1, d_model)
    stored = rng.integers(-127, 128, (n_rows, d_model + 4)).astype(np.int8)
    scales = np.exp(rng.normal(0, 8, n_rows)).astype("<f4")
    scales[rng.random(n_rows) < 0.1] = [0]
    scales[rng.random(n_rows) < 0.1] = [np.nan]
    stored[:, d_model:] = scales[:, None].view(np.int8)
    transform = Int8Transform(
        rng.normal(0, 3, d_model).astype(np.float32), rng.integers(-30, 30, d_model).astype(np.int8)
    )
    expected = naive_numbers(stored, transform)
    assert dequantise(stored, transform).tobytes() == expected.tobytes()
    columns = rng.integers(0, d_model, 5)
    assert dequantise(stored, transform, columns=columns).tobytes() == expected[:, columns].tobytes()
    wide = np.zeros((n_rows, 2 * d_model), np.float32)
    assert dequantise(stored, transform, wide[:, ::2]).base is not None
    assert wide[:, ::2].tobytes() == expected.tobytes()
    assert not wide[:, 1::2].any()


def test_large_inputs_are_cut_into_blocks_and_do_not_know_it():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((5000, 300), dtype=np.float32)
    transform = fit_int8(rows.mean(axis=0, dtype=np.float64), rows.std(axis=0, dtype=np.float64))
    stored = quantise(rows, transform)
    out = np.empty_like(stored)
    assert quantise(rows, transform, out=out) is out
    pieces = [quantise(rows[i : i + 7], transform) for i in range(0, 5000, 7)]
    assert stored.tobytes() == out.tobytes() == np.concatenate(pieces).tobytes()
    scale, centred = exact(rows, transform)
    assert np.mean(stored[:, :-4] == np.rint(centred / scale[:, None])) > 0.9999


def test_a_row_that_equals_the_mean_has_scale_0_and_reads_as_the_mean():
    transform = Int8Transform(np.array([1.5, -2.0], np.float32), np.array([3, -4], np.int8))
    stored = quantise(np.array([[1.5, -2.0]], np.float32), transform)
    assert stored.tobytes() == bytes(6)
    assert dequantise(stored, transform).tolist() == [[1.5, -2.0]]


def test_scales_are_little_endian_at_the_end():
    transform = Int8Transform(np.zeros(2, np.float32), np.zeros(2, np.int8))
    stored = quantise(np.array([[-254.0, 100.0]], np.float32), transform)
    assert stored.tobytes() == bytes([(-127) % 256, 50]) + bytes.fromhex("00000040")
    assert quantise(np.array([[np.inf, 1.0]], np.float32), transform).tobytes() == bytes(2) + bytes.fromhex(
        "0000c07f"
    )


ODD = st.one_of(
    st.sampled_from([0.0, -0.0, np.nan, np.inf, -np.inf, 5e-324, 1e-310, -1.0, 1.7e308]),
    st.floats(allow_nan=True, allow_infinity=True),
)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 6).flatmap(lambda d: st.tuples(*[arrays(np.float64, d, elements=ODD)] * 2)))
def test_a_fit_of_anything_can_be_used(moments):
    transform = fit_int8(*moments)
    assert np.isfinite(transform.mean).all()
    assert np.abs(transform.exponent.astype(int)).max() <= 60
    assert parse_int8(json.loads(json.dumps(transform.to_json())), d_model=len(moments[0])) == transform
    rows = np.ones((2, len(moments[0])), np.float32)
    stored = quantise(rows, transform)
    assert dequantise(stored, transform).shape == rows.shape


def test_exponents_follow_the_standard_deviations():
    std = 2.0 ** np.array([-9.0, -1.0, 0.0, 0.0, 0.0, 1.0, 5.0])
    assert fit_int8(np.zeros(7), std).exponent.tolist() == [-4, -1, 0, 0, 0, 1, 4]
    # Another unit of measurement moves all of them alike.
    assert fit_int8(np.zeros(7), std * 2.0**-9).exponent.tolist() == [-13, -10, -9, -9, -9, -8, -5]
    std[0] = np.nan
    std[1] = 0.0
    assert fit_int8(np.zeros(7), std).exponent.tolist() == [0, 0, 0, 0, 0, 1, 4]


@pytest.mark.parametrize(
    "stored",
    [
        None,
        {},
        {"mean": "AAAA", "exponent": "AA=="},
        {"mean": "AAAAAA==", "exponent": "AAA="},
        {"mean": "AACAfw==", "exponent": "AA=="},
        {"mean": "AAAAAA==", "exponent": "gA=="},
        {"mean": "AAAAAA==", "exponent": "A-=="},
        {"mean": 3, "exponent": "AA=="},
    ],
)
def test_what_is_no_transform(stored):
    with pytest.raises((KeyError, TypeError, ValueError)):
        parse_int8(stored, d_model=1)
    assert parse_int8({"mean": "AAAAAA==", "exponent": "AA=="}, d_model=1).mean.tolist() == [0.0]


def test_rows_of_another_width_are_refused():
    transform = fit_int8(np.zeros(3), np.ones(3))
    for call in (
        lambda: quantise(np.zeros((2, 4), np.float32), transform),
        lambda: dequantise(np.zeros((2, 3), np.int8), transform),
        lambda: dequantise(np.zeros(7, np.int8), transform),
        lambda: quantise(np.zeros((2, 3), np.float32), transform, out=np.zeros((2, 3), np.int8)),
    ):
        with pytest.raises(InvalidInputError):
            call()


@settings(max_examples=50, deadline=None)
@given(cases(values=st.floats(-1e4, 1e4, width=32) | st.just(np.nan)), st.integers(0, 6))
def test_measured_errors_merge(case, cut):
    rows, transform = case
    stored = quantise(rows, transform)
    finite = np.isfinite(rows).all(axis=1)
    true = rows[finite].astype(np.float64)
    difference = np.abs(dequantise(stored, transform)[finite].astype(np.float64) - true)
    whole = int8_error(rows, stored, transform)
    assert whole.n_values == true.size
    assert whole.largest == difference.max(initial=0.0)
    assert whole.squared_error == pytest.approx((difference**2).sum())
    assert whole.squared_deviation == pytest.approx(((true - transform.mean.astype(np.float64)) ** 2).sum())
    parts = [int8_error(rows[part], stored[part], transform) for part in (slice(cut), slice(cut, None))]
    merged = sum(parts, Int8Error())
    assert (merged.n_values, merged.largest) == (whole.n_values, whole.largest)
    assert merged.squared_error == pytest.approx(whole.squared_error)


def with_outliers(acts, rng):
    """Rows of a model with outlier dimensions, channels of unequal width, and a rare sink."""
    width = acts.shape[1]
    spread = rng.lognormal(0, 0.6, width)
    spread[rng.choice(width, 3, replace=False)] *= [25, 40, 60]
    acts = acts * spread + rng.standard_normal(width) * spread * 2
    acts[::97] *= 15
    return acts.astype(np.float32)


def lost(true, found):
    """Share of every channel's variance that is lost."""
    error = ((found.astype(np.float64) - true) ** 2).mean(axis=0)
    return error / true.astype(np.float64).var(axis=0)


def test_outlier_dimensions_cost_the_others_nothing():
    """On a GPT-2's residual stream with planted outliers, calibrated on an eighth of the rows."""
    import torch
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2Model(
        GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=2, n_positions=64, **special)
    ).eval()
    with torch.no_grad():
        hidden = model(torch.randint(0, 300, (64, 64))).last_hidden_state
    acts = with_outliers(hidden.reshape(-1, 64).numpy().astype(np.float64), np.random.default_rng(1))
    seen = acts[:: len(acts) // 512].astype(np.float64)
    transform = fit_int8(seen.mean(axis=0), seen.std(axis=0))
    stored = quantise(acts, transform)
    ours = lost(acts, dequantise(stored, transform))
    plain_transform = Int8Transform(np.zeros(64, np.float32), np.zeros(64, np.int8))
    plain = quantise(acts, plain_transform)
    theirs = lost(acts, dequantise(plain, plain_transform))
    assert np.median(ours) < 3e-4
    assert ours.max() < 3e-3
    assert np.median(theirs) > 30 * np.median(ours)
    error = int8_error(acts, stored, transform)
    assert error.relative < 0.01
    assert int8_error(acts, plain, plain_transform).squared_error > 10 * error.squared_error
    assert stored.nbytes / acts.nbytes == pytest.approx((64 + SCALE_BYTES) / (4 * 64))
