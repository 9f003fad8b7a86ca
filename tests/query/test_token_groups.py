"""Tokens read by row groups: the same ones as in the unit, however it was cut, from whatever the cache happens to hold."""

import numpy as np
import pytest

from actstore.codec.cache import BytesCache
from actstore.errors import FormatError, NotFoundError
from actstore.query import token_groups, unit_tables
from actstore.query.row_contexts import show_rows
from actstore.query.token_groups import read_around, read_columns
from actstore.query.unit_tables import TOKEN_COLUMNS, read_unit
from actstore.storage.local import LocalStorage
from tests.query.make_store import by_unit, make_store

DTYPES = {"doc_id": np.int64, "is_special": np.bool_}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_store(str(tmp_path_factory.mktemp("groups") / "s"), seed=3, n_documents=80, rows_per_unit=256)


@pytest.fixture(params=[1 << 20, 1], ids=["cached", "nothing cached"])
def cache(request, monkeypatch):
    cache = BytesCache(request.param)
    for module in (unit_tables, token_groups):
        monkeypatch.setattr(module, "CACHE", cache)
    return cache


def tokenization_of(made):
    return made.store.tokenization(made.tokenization)


@pytest.mark.parametrize("n", [1, 2, 9, 200])
@pytest.mark.parametrize(("before", "after"), [(0, 0), (7, 0), (16, 8), (300, 300)])
def test_tokens_around_rows(made, cache, n, before, after):
    rng = np.random.default_rng(n + before)
    tokens, units = made.by_row, by_unit(made)
    for _ in range(6):
        rows = np.sort(rng.choice([*tokens], n))  # some of them twice
        found = [(piece, int(at)) for piece, offsets in read_around(tokenization_of(made), rows, before=before, after=after)
                 for at in offsets]  # fmt: skip
        assert len(found) == n
        for row, (piece, offset) in zip(rows.tolist(), found, strict=True):
            unit = [t.row for t in units[row // 256]]
            assert piece.first_row + offset == row
            held = range(piece.first_row, piece.first_row + len(piece))
            assert max(unit[0], row - before) in held
            assert min(unit[-1], row + after) in held
            for name in TOKEN_COLUMNS:
                column = getattr(piece, name)
                assert column.dtype == DTYPES.get(name, np.int32)
                assert column.tolist() == [getattr(tokens[r], name) for r in held]


@pytest.mark.parametrize("n", [0, 1, 4, 60])
def test_columns_of_rows(made, cache, n):
    rng = np.random.default_rng(n)
    tokens = made.by_row
    for names in (("is_special", "window_position"), ("doc_id",), TOKEN_COLUMNS):
        rows = np.sort(rng.choice([*tokens], n, replace=False)).astype(np.int64)
        found = read_columns(tokenization_of(made), rows, names)
        assert [*found] == [*names]
        for name, column in found.items():
            assert column.dtype == DTYPES.get(name, np.int32)
            assert column.tolist() == [getattr(tokens[row], name) for row in rows.tolist()]


def test_a_row_group_is_read_and_not_its_unit(made, cache):
    tokenization = tokenization_of(made)
    [(piece, offsets)] = read_around(tokenization, np.array([256 + 40]))
    assert (piece.first_row, len(piece), offsets.tolist()) == (256 + 37, 37, [3])
    [(piece, offsets)] = read_around(
        tokenization, np.array([256 + 40]), before=4
    )  # the next one begins at 37
    assert (piece.first_row, len(piece), offsets.tolist()) == (256, 74, [40])
    if cache._max_bytes > 1:
        whole = read_unit(tokenization, 1)
        [(piece, offsets)] = read_around(tokenization, np.array([256 + 40]))
        assert piece is whole
        assert offsets.tolist() == [40]


def test_windows_across_row_groups(made, cache):
    """All rows of the store, shown in a random order: the tokens of the same window, as many as asked for."""
    tokens = made.by_row
    rows = np.random.default_rng(0).permutation([*tokens])
    for before, after in ((16, 8), (0, 3), (5, 0)):
        shown = show_rows(tokenization_of(made), rows, before=before, after=after)
        for i, row in enumerate(rows.tolist()):
            own = tokens[row]
            window = [t for t in made.tokens if (t.doc_id, t.window) == (own.doc_id, own.window)]
            wanted = [t for t in window if row - before <= t.row <= row + after]
            part = slice(shown.indptr[i], shown.indptr[i + 1])
            assert shown.token_id[part].tolist() == [t.token_id for t in wanted]
            assert shown.char_end[part].tolist() == [t.char_end for t in wanted]
            assert (shown.starts[i], shown.doc_id[i], shown.position[i]) == (
                wanted[0].row, own.doc_id, own.position,
            )  # fmt: skip


def test_units_that_are_not_there(made, cache):
    for read in (lambda t, rows: read_around(t, rows), lambda t, rows: read_columns(t, rows, ["doc_id"])):
        with pytest.raises(NotFoundError, match="unit 99"):
            read(tokenization_of(made), np.array([3, 99 * 256]))


def test_every_damaged_byte_is_an_error(tmp_path, cache):
    """A row group is decoded only once the whole object was compared with its hash."""
    made = make_store(str(tmp_path / "s"), n_documents=30, rows_per_unit=256)
    rng = np.random.default_rng(0)
    obj = tokenization_of(made).units[1].objects[0]
    path = LocalStorage(made.url).local_path(obj.key)
    with open(path, "rb") as file:
        data = file.read()
    for place in rng.integers(0, len(data), 25).tolist():
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(bytes([data[place] ^ (1 << int(rng.integers(8)))]))
        for read in (lambda rows: read_around(tokenization_of(made), rows),
                     lambda rows: read_columns(tokenization_of(made), rows, ["doc_id"])):  # fmt: skip
            cache.clear()
            with pytest.raises(FormatError, match="SHA-256"):
                read(np.array([256 + 100, 256 + 101]))
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(data[place : place + 1])
    assert len(read_around(tokenization_of(made), np.array([256 + 100]))) == 1
