"""Dictionaries in a store: exactly once, checked, and as other readers find them."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from actstore.dictionary import Dictionary
from actstore.dictionary_data import DictionaryData, parse_config
from actstore.errors import ConflictError, ErrorKind, FormatError, InvalidInputError, NotFoundError
from actstore.ingest.dictionaries import Encoder, check_fits, make_dictionary, save_dictionary
from actstore.log.values import Collection
from actstore.run import Run
from actstore.store import Store, open_store
from tests.dictionaries.make import HOOK, random_dictionary


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "s", create=True)


def test_what_is_saved_is_read(store: Store, tmp_path: Path) -> None:
    data = random_dictionary(1, k=5, prepend_bos=True, model={"name": "m"}, info={"why": "test"})
    saved = save_dictionary(store, "d", data)
    for dictionary in (
        saved,
        store.dictionary("d"),
        pickle.loads(pickle.dumps(saved)),
        *store.dictionaries(),
    ):
        assert dictionary.spec == data.spec
        assert dictionary.info == {"why": "test"}
        assert (dictionary.id, dictionary.k, dictionary.d_in, dictionary.n_latents) == ("d", 5, 16, 96)
        assert dictionary.weights().keys() == data.weights.keys()
        for name, weight in data.weights.items():
            np.testing.assert_array_equal(dictionary.weight(name), weight)
            assert not dictionary.weight(name).flags.writeable
    (path,) = (tmp_path / "s" / "dictionaries" / "d").iterdir()
    for name, weight in load_file(path).items():  # the safetensors package is another reader
        np.testing.assert_array_equal(weight, data.weights[name])
    unit = saved.collection.units[0]
    assert (saved.collection.is_sealed, unit.rows, unit.objects[0].nbytes) == (True, 96, path.stat().st_size)


def test_saving_again_writes_nothing(store: Store, tmp_path: Path) -> None:
    data = random_dictionary(1)
    first = save_dictionary(store, "d", data)
    again = save_dictionary(store, "d", DictionaryData(data.spec, data.weights, {"other": "info"}))
    assert (again.fingerprint, store.version, again.info) == (first.fingerprint, 1, {})
    assert len(list((tmp_path / "s" / "dictionaries" / "d").iterdir())) == 1
    for other in (random_dictionary(2), random_dictionary(1, k=9)):
        with pytest.raises(ConflictError, match="another one") as error:
            save_dictionary(store, "d", other)
        assert error.value.kind is ErrorKind.CONFIG_DIFFERS
    assert store.refresh().version == 1
    with pytest.raises(InvalidInputError):
        save_dictionary(store, "../d", data)


def test_two_writers_of_one_name(store: Store, tmp_path: Path) -> None:
    other = open_store(tmp_path / "s")
    data = random_dictionary(1)
    save_dictionary(other, "d", data)
    assert save_dictionary(store, "d", data).collection.version == 1
    with pytest.raises(ConflictError):
        save_dictionary(other, "D", random_dictionary(3))  # names that differ only in case


def test_damage_is_never_a_number(store: Store, tmp_path: Path) -> None:
    save_dictionary(store, "d", random_dictionary(1))
    (path,) = (tmp_path / "s" / "dictionaries" / "d").iterdir()
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:200] + b"\xff" + whole[201:], whole + b"\0"):
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match="SHA-256"):
            store.dictionary("d").weight("W_enc")
    path.unlink()
    with pytest.raises(FormatError, match="missing"):
        Encoder(store.dictionary("d"))
    path.write_bytes(whole)
    assert store.dictionary("d").weight("b_dec").shape == (16,)


def test_configurations_of_no_dictionary(store: Store) -> None:
    config = save_dictionary(store, "d", random_dictionary(1)).config
    for change in (
        {"format": 2},
        {"activation": "tanh"},
        {"d_in": -1},
        {"k": None},
        {"normalize": {"kind": "x"}},
    ):
        with pytest.raises(FormatError):
            parse_config({**config, **change})
    with pytest.raises(FormatError):
        parse_config({k: v for k, v in config.items() if k != "hook_point"})
    collection = store.dictionary("d").collection
    unsealed = Collection("dictionary", "d", collection.config, collection.fingerprint, {}, 1)
    with pytest.raises(FormatError, match="no single object"):
        Dictionary(unsealed, store.objects).weights()
    # Weights of another configuration than the collection's.
    wider = Collection(
        "dictionary",
        "d",
        {**config, "n_latents": 97},
        "",
        {},
        1,
        units=collection.units,
        seal=collection.seal,
    )
    with pytest.raises(FormatError, match=r"W_enc|97"):
        Dictionary(wider, store.objects).weights()


def test_decoder_and_encoder_rows(store: Store) -> None:
    data = random_dictionary(1, normalize={"kind": "scale", "factor": 4.0})
    dictionary = save_dictionary(store, "d", data)
    np.testing.assert_allclose(dictionary.decoder([3, 90, 3]), data.weights["W_dec"][[3, 90, 3]] / 4)
    np.testing.assert_allclose(
        dictionary.decoder_norms(), np.linalg.norm(data.weights["W_dec"], axis=1) / 4, rtol=1e-6
    )
    np.testing.assert_array_equal(dictionary.encoder([5]), data.weights["W_enc"][:, [5]].T)
    assert dictionary.encoder().shape == (96, 16)
    assert dictionary.decoder(7).shape == (1, 16)
    assert dictionary.decoder([]).shape == (0, 16)
    rescaled = save_dictionary(store, "r", random_dictionary(1, rescale_acts_by_decoder_norm=True))
    np.testing.assert_allclose(rescaled.decoder_norms(), 1, rtol=1e-6)
    assert rescaled.decoder_norms() is rescaled.decoder_norms()
    for wrong in ([96], [-1], [0.5], "x"):
        with pytest.raises(InvalidInputError, match="95"):
            dictionary.decoder(wrong)
    with pytest.raises(NotFoundError, match="W_enc"):
        dictionary.weight("threshold")


def test_a_code_of_one_adds_its_decoder_row(store: Store) -> None:
    """`decoder()` and `Encoder.decode` say the same, whatever the units of codes are."""
    from actstore.sparse.rows import SparseRows

    for i, options in enumerate(
        ({}, {"rescale_acts_by_decoder_norm": True}, {"normalize": {"kind": "scale", "factor": 0.5}})
    ):
        dictionary = save_dictionary(store, f"d{i}", random_dictionary(i, **options))
        encoder = Encoder(dictionary)
        none, one = (encoder.decode(SparseRows.from_dense(np.eye(96)[:1] * x)) for x in (0, 1))
        np.testing.assert_allclose(one - none, dictionary.decoder([0]), atol=1e-5)


def test_a_dictionary_must_fit_the_run(store: Store) -> None:
    data = random_dictionary(1)  # layers.3.resid_post, 16 wide
    dictionary = save_dictionary(store, "d", data)
    fits = Run(store, Collection("run", "r", {"hook_points": [{"name": HOOK, "d_model": 16}]}, "", {}, 1))
    assert check_fits(dictionary, fits) == check_fits(data, fits) == HOOK
    other_name = {"hook_points": [{"name": "layers.4.resid_pre", "d_model": 16}]}
    assert (
        check_fits(dictionary, Run(store, Collection("run", "r", other_name, "", {}, 1)))
        == "layers.4.resid_pre"
    )
    wide = {"hook_points": [{"name": HOOK, "d_model": 32}]}
    with pytest.raises(InvalidInputError, match=r"16 numbers.*32"):
        check_fits(dictionary, Run(store, Collection("run", "r", wide, "", {}, 1)))
    elsewhere = {
        "hook_points": [{"name": "layers.3.resid_pre", "d_model": 16}, {"name": "embed", "d_model": 16}]
    }
    with pytest.raises(
        InvalidInputError, match=r"layers.3.resid_post, and run 'r' has embed, layers.3.resid_pre"
    ):
        check_fits(dictionary, Run(store, Collection("run", "r", elsewhere, "", {}, 1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "tanh"}, "tanh"),
        ({"k": 0}, "k is 0"),
        ({"k": 97}, "97"),
        ({"k": 2.5}, "2.5"),
        ({"k": True}, "True"),
        ({"activation": "groupmax", "k": 7}, "groups"),
        ({"hook_point": "nowhere"}, "nowhere"),
        ({"kind": "lora"}, "lora"),
        ({"normalize": {"kind": "scale"}}, "factor"),
        ({"normalize": {"kind": "scale", "factor": float("nan")}}, "nan"),
        ({"normalize": {"kind": "none", "eps": 1}}, "eps"),
        ({"apply_b_dec_to_input": 1}, "apply_b_dec"),
    ],
)
def test_dictionaries_that_cannot_be(change: dict, message: str) -> None:
    weights = {"W_enc": np.ones((16, 96)), "W_dec": np.ones((96, 16))}
    settings = {"activation": "topk", "k": 3, "hook_point": HOOK, **change}
    with pytest.raises((InvalidInputError, NotFoundError), match=message):
        make_dictionary(weights, **settings)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"W_enc": np.ones((16, 96))}, "W_dec"),
        ({"W_enc": np.ones(16), "W_dec": np.ones((96, 16))}, "matrix"),
        ({"W_enc": np.ones((16, 96)), "W_dec": np.ones((95, 16))}, "W_dec should be"),
        ({"W_enc": np.ones((16, 96)), "W_dec": np.ones((96, 15))}, "d_out"),
        ({"W_enc": np.ones((16, 0)), "W_dec": np.ones((0, 16))}, "n_latents is 0"),
        ({"W_enc": np.ones((16, 96)), "W_dec": np.ones((96, 16)), "b_enc": np.ones(95)}, "b_enc"),
        ({"W_enc": np.ones((16, 96)), "W_dec": np.ones((96, 16)), "threshold": np.ones(96)}, "threshold"),
        ({"W_enc": np.full((16, 96), np.nan), "W_dec": np.ones((96, 16))}, "NaN"),
        ({"W_enc": np.full((16, 96), 1e39), "W_dec": np.ones((96, 16))}, "infinite"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_weights_that_cannot_be(weights: dict, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        make_dictionary(weights, activation="topk", k=3, hook_point=HOOK)
    with pytest.raises(InvalidInputError, match="threshold"):
        make_dictionary(
            {"W_enc": np.ones((2, 3)), "W_dec": np.ones((3, 2))}, activation="jumprelu", hook_point=HOOK
        )
