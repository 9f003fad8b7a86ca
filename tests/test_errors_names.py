"""Errors keep their class and text across processes; names and keys cannot leave the store."""

import pickle

import pytest

from actstore import errors
from actstore.errors import ActstoreError, ErrorKind, FormatError, InvalidInputError
from actstore.names import check_key, check_name, hook_point_folder

CLASSES = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, ActstoreError)]


@pytest.mark.parametrize("cls", CLASSES)
def test_errors_survive_pickling(cls):
    error = pickle.loads(pickle.dumps(cls(ErrorKind.BAD_NAME, "asked, found, do")))
    assert type(error) is cls
    assert error.kind is ErrorKind.BAD_NAME
    assert str(error) == "asked, found, do [bad-name]"


def test_exit_codes_tell_the_classes_apart():
    codes = [c.exit_code for c in CLASSES]
    assert len(set(codes)) == len(codes)
    assert 0 not in codes


@pytest.mark.parametrize("name", ["a", "pythia@demo", "GPT-2_small.v1", "0", "x" * 64])
def test_good_names(name):
    assert check_name(name, what="run name") == name


HOSTILE = [
    "", ".", "..", "../x", "a/../b", "a/b", "..%2fx", "%2e%2e/", "..\\x", "/abs", "~root", "C:\\x", "a..b", "trailing.",
    "trailing ", " x", "nul", "NUL.txt", "com1", "x\0y", "x\ny", "x" * 65, "\u202etxt", "e\u0301", "-rf", ".hidden", "a:b", "a*",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_refused(name):
    with pytest.raises(InvalidInputError) as caught:
        check_name(name, what="run name")
    assert caught.value.kind is ErrorKind.BAD_NAME
    assert "run name" in str(caught.value)


@pytest.mark.parametrize(
    "key", ["runs/a/../b", "/abs", "a//b", "a/./b", "../x", "a/..", "", "a\0b", "a/b/", "x" * 901, "a b"]
)
def test_hostile_keys_are_refused(key):
    with pytest.raises(FormatError):
        check_key(key)


def test_hook_points_become_keys():
    key = f"runs/pythia@demo/{hook_point_folder('module:transformer.h.0.mlp:output')}/c/0/0"
    assert check_key(key) == "runs/pythia@demo/module~transformer.h.0.mlp~output/c/0/0"
