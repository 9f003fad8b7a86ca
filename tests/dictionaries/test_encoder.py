"""Encoding and decoding against float64, and what happens to rows that cannot be encoded."""

import numpy as np
import pytest
import torch

from actstore.dictionary_data import ACTIVATIONS
from actstore.errors import ErrorKind, InvalidInputError
from actstore.ingest.dictionaries import DictionaryData, Encoder, make_dictionary
from actstore.sparse.rows import SparseRows
from tests.dictionaries.make import HOOK, encode64, random_dictionary


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    assert (np.abs(found - expected) <= tolerance * np.maximum(1, np.abs(expected))).all()


@pytest.mark.parametrize(
    "options", [{}, {"apply_b_dec_to_input": True}, {"rescale_acts_by_decoder_norm": True}]
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_codes_follow_the_definition(activation: str, options: dict[str, bool]) -> None:
    if activation == "gated" and "rescale_acts_by_decoder_norm" in options:
        return
    data = random_dictionary(5, activation=activation, **options)
    rows = np.random.default_rng(6).normal(size=(500, 16)).astype(np.float32)
    encoder = Encoder(data, value_dtype="float32")
    codes, expected = encoder.encode(rows).check(), encode64(data, rows)
    close(codes.to_dense(), expected)
    decoder = data.weights["W_dec"].astype(np.float64)
    if "rescale_acts_by_decoder_norm" in options:
        decoder /= np.linalg.norm(decoder, axis=1, keepdims=True)
    close(encoder.decode(codes), expected @ decoder + data.weights["b_dec"], 2e-5)


def test_batches_do_not_show() -> None:
    data = random_dictionary(1)
    rows = np.random.default_rng(2).normal(size=(331, 16)).astype(np.float32)
    whole = Encoder(data).encode(rows)
    small = Encoder(data)
    small.batch_rows = 64
    assert small.encode(rows[:0]).n_rows == 0
    parts = small.encode(rows)
    for name in ("indptr", "latents", "values"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))
    np.testing.assert_allclose(small.decode(parts), Encoder(data).decode(whole), rtol=1e-6)
    assert small.decode(parts.slice(0, 0)).shape == (0, 16)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_rows_of_any_float_type(dtype: str) -> None:
    data = random_dictionary(3, activation="jumprelu")
    rows = np.random.default_rng(2).normal(size=(20, 16)).astype(dtype)
    expected = Encoder(data).encode(rows.astype(np.float32)).to_dense()
    rows.flags.writeable = False
    np.testing.assert_array_equal(Encoder(data).encode(rows).to_dense(), expected)
    np.testing.assert_array_equal(Encoder(data).encode(torch.tensor(rows)).to_dense(), expected)
    strided = np.repeat(rows, 2, axis=1)[:, ::2]
    np.testing.assert_array_equal(Encoder(data).encode(strided).to_dense(), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rows_that_are_not_finite_have_no_codes(activation: str) -> None:
    data = random_dictionary(4, activation=activation)
    rows = np.random.default_rng(2).normal(size=(6, 16)).astype(np.float32)
    expected = Encoder(data).encode(rows).to_dense()
    rows[1, 3], rows[4, 0], rows[5] = np.nan, np.inf, -np.inf
    expected[[1, 4, 5]] = 0
    np.testing.assert_array_equal(Encoder(data).encode(rows).check().to_dense(), expected)


def test_a_row_of_zeros_cannot_be_made_of_constant_norm() -> None:
    data = random_dictionary(4, normalize={"kind": "constant_norm"})
    rows = np.zeros((2, 16), np.float32)
    rows[1] = 1
    assert Encoder(data).encode(rows).counts.tolist()[0] == 0


def test_large_offsets_do_not_cost_digits() -> None:
    """Massive activations lie in b_dec: taken from the row before the product, they leave its digits alone."""
    data = random_dictionary(8, apply_b_dec_to_input=True, activation="relu")
    weights = {
        **data.weights,
        "b_dec": data.weights["b_dec"] + 4096 * (np.arange(16) == 3).astype(np.float32),
    }
    data = DictionaryData(data.spec, weights)
    rows = (np.random.default_rng(1).normal(size=(200, 16)) + weights["b_dec"]).astype(np.float32)
    close(Encoder(data, value_dtype="float32").encode(rows).to_dense(), encode64(data, rows))


def test_codes_in_the_stored_dtype() -> None:
    data = make_dictionary({"W_enc": np.eye(3), "W_dec": np.eye(3)}, activation="relu", hook_point=HOOK)
    rows = np.array([[1e-9, 1.0001, 65504], [0, -1, 3e-8]], np.float32)
    codes = Encoder(data).encode(rows).check()
    np.testing.assert_array_equal(codes.to_dense(), rows.clip(0).astype(np.float16).astype(np.float32))
    assert codes.counts.tolist() == [2, 1]
    assert Encoder(data, value_dtype="float32").encode(rows).counts.tolist() == [3, 1]
    with pytest.raises(InvalidInputError, match="float32") as error:
        Encoder(data).encode(rows * 2)
    assert error.value.kind is ErrorKind.OVERFLOW


def test_bfloat16_is_near() -> None:
    data = random_dictionary(2, activation="relu")
    rows = np.random.default_rng(2).normal(size=(50, 16)).astype(np.float32)
    found = Encoder(data, dtype="bfloat16").encode(rows).check().to_dense()
    assert np.abs(found - encode64(data, rows)).max() < 0.2


def test_many_latents() -> None:
    data = random_dictionary(2, d_in=2, n_latents=70_001, k=3)
    rows = np.random.default_rng(2).normal(size=(30, 2)).astype(np.float32)
    codes = Encoder(data, value_dtype="float32").encode(rows).check()
    close(codes.to_dense(), encode64(data, rows))
    assert codes.latents.max() > 65_535


def test_all_dead_and_one_everywhere() -> None:
    weights = {
        "W_enc": np.zeros((4, 6)),
        "W_dec": np.zeros((6, 4)),
        "b_enc": np.array([-1, -1, 2, -1, -1, -1]),
    }
    rows = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    one = Encoder(make_dictionary(weights, activation="topk", k=2, hook_point=HOOK)).encode(rows)
    assert one.latents.tolist() == [2] * 9
    dead = make_dictionary({**weights, "b_enc": -np.ones(6)}, activation="relu", hook_point=HOOK)
    assert Encoder(dead).encode(rows).nnz == 0
    # Decoder rows of norm 0, rescaled: no codes, and no NaN.
    rescaled = make_dictionary(
        {**weights, "W_enc": np.ones((4, 6))},
        activation="relu",
        hook_point=HOOK,
        rescale_acts_by_decoder_norm=True,
    )
    encoder = Encoder(rescaled)
    assert encoder.encode(rows).nnz == 0
    assert np.isfinite(encoder.decode(SparseRows.from_dense(np.ones((1, 6))))).all()


def test_arguments() -> None:
    data = random_dictionary(1, normalize={"kind": "layer_norm", "eps": 1e-5})
    encoder = Encoder(data)
    for rows in (np.zeros((2, 15), np.float32), np.zeros(16, np.float32), [[0.0] * 16]):
        with pytest.raises(InvalidInputError, match="shape"):
            encoder.encode(rows)
    codes = encoder.encode(np.ones((2, 16), np.float32))
    with pytest.raises(InvalidInputError, match="needs as many rows"):
        encoder.decode(codes)
    with pytest.raises(InvalidInputError, match="latents"):
        encoder.decode(SparseRows.empty(2, 95), np.ones((2, 16), np.float32))
    with pytest.raises(InvalidInputError, match="float64"):
        Encoder(data, dtype="float64")
    with pytest.raises(InvalidInputError, match="int8"):
        Encoder(data, value_dtype="int8")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sums_beyond_float32_are_refused_and_not_left_out(activation: str) -> None:
    data = random_dictionary(4, activation=activation)
    rows = np.random.default_rng(5).normal(size=(9, 16)).astype(np.float32)
    rows[4] = 3e38 * np.sign(rows[4])  # its products are infinite, of both signs: their sums are no numbers
    with pytest.raises(InvalidInputError) as error:
        Encoder(data, value_dtype="float32").encode(rows)
    assert error.value.kind is ErrorKind.NON_FINITE
    rows[4] = np.nan
    assert Encoder(data, value_dtype="float32").encode(rows).counts[4] == 0
