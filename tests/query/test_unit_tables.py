"""Decoded tokens, words and texts: right at every edge, read once, dropped when there is no room."""

import numpy as np
import pyarrow as pa
import pytest

from actstore.codec.cache import BytesCache
from actstore.errors import FormatError, NotFoundError
from actstore.query import quiet_rows, unit_tables
from actstore.query.quiet_rows import StoredRows, draw_quiet_rows
from actstore.query.token_pattern import match_tokens, read_matches
from actstore.query.unit_tables import Words, read_texts, read_unit, read_units, read_words
from actstore.sampling import Sample
from tests.query.make_codes import H, add_codes, random_codes, stored_rows
from tests.query.make_store import WORDS, add_run, by_unit, make_store, random_values


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    made = make_store(str(tmp_path_factory.mktemp("units") / "s"), seed=8, n_documents=50)
    add_run(made, "run", {H: 4}, random_values(1, {H: 4}))
    add_run(made, "sampled", {H: 4}, random_values(1, {H: 4}), sample=Sample(0.4, seed=3))
    return made


def test_units_hold_their_tokens(made):
    tokenization = made.store.tokenization(made.tokenization)
    found = read_units(tokenization, [3, 0, 3, 1])
    assert sorted(found) == [0, 1, 3]
    for unit, tokens in by_unit(made).items():
        mine = read_unit(tokenization, unit)
        assert mine.first_row == tokens[0].row
        assert len(mine) == len(tokens)
        for name in (
            "doc_id",
            "position",
            "token_id",
            "char_start",
            "char_end",
            "is_special",
            "window_position",
        ):
            assert getattr(mine, name).tolist() == [getattr(t, name) for t in tokens]
        assert "row" not in mine.table.column_names
        assert read_unit(tokenization, unit) is mine
    with pytest.raises(NotFoundError, match="unit 99"):
        read_units(tokenization, [99])
    with pytest.raises(ValueError, match="read-only"):
        mine.token_id[0] = 1


def test_texts_of_many_parts_and_row_groups(made):
    corpus = made.store.corpora()[0]
    assert read_texts(corpus, np.arange(50)) == dict(enumerate(made.texts))
    assert read_texts(corpus, [48, 3, 3]) == {3: made.texts[3], 48: made.texts[48]}
    assert read_texts(corpus, []) == {}
    with pytest.raises(FormatError, match="document 50"):
        read_texts(corpus, [1, 50])


def test_words_by_number(made):
    words = read_words(made.store.tokenization(made.tokenization))
    ids = np.array([3, 0, 5, 5, 999, -1])
    assert words.read(ids).to_pylist() == [WORDS[3], "<bos>", WORDS[5], WORDS[5], "<999>", "<-1>"]
    assert Words(pa.array(["a", None])).read(np.array([1, 0])).to_pylist() == ["<1>", "a"]
    assert words.read(ids[:0]).to_pylist() == []


def test_patterns(made):
    matches = match_tokens("^w1|漢", made.store.tokenization(made.tokenization))
    wanted = [word.startswith("w1") or "漢" in word for word in WORDS]
    assert matches.tolist() == wanted
    assert read_matches(matches, np.array([WORDS.index("w1"), 1, 10_000, -1])).tolist() == [
        True,
        False,
        False,
        False,
    ]


def test_the_cache_is_bounded(made, monkeypatch):
    """Everything reads through one cache: with room for little, answers stay right and it stays small."""
    small = BytesCache(20_000)
    monkeypatch.setattr(unit_tables, "CACHE", small)
    tokenization = made.store.tokenization(made.tokenization)
    for _ in range(2):
        for unit, tokens in by_unit(made).items():
            assert read_unit(tokenization, unit).token_id.tolist() == [t.token_id for t in tokens]
        assert read_texts(tokenization.corpus, np.arange(50)) == dict(enumerate(made.texts))
    assert small._nbytes <= 20_000
    assert small._values


@pytest.mark.parametrize("run", ["run", "sampled"])
def test_rows_by_place(made, run):
    told = add_codes(made, random_codes(len(stored_rows(made, run)), 8), run=run, dictionary=f"d-{run}")
    stored = StoredRows(made.run(run), told.codes.collection)
    assert stored.n_rows == len(told.rows)
    assert stored.numbers(np.arange(stored.n_rows)).tolist() == told.rows.tolist()
    shuffled = np.random.default_rng(0).permutation(stored.n_rows)
    assert stored.numbers(shuffled).tolist() == told.rows[shuffled].tolist()
    everything = np.array([t.row for t in made.tokens])
    assert everything[stored.exist(everything)].tolist() == told.rows.tolist()
    far = np.append(everything, 10**9)
    assert stored.among(far).tolist() == told.rows.tolist()


@pytest.mark.parametrize("most", [40, 1 << 20])
def test_drawing_from_more_rows_than_are_looked_at(made, most, monkeypatch):
    """A run of more rows than `MAX_DRAWN` is drawn from with chance alone: rows never come twice."""
    told = add_codes(made, random_codes(len(stored_rows(made, "run")), 8), dictionary=f"m{most}")
    monkeypatch.setattr(quiet_rows, "MAX_DRAWN", most)
    stored = StoredRows(made.run(), told.codes.collection)
    firing = told.firing(0)[0]
    rows = draw_quiet_rows(
        stored, None, 10_000, seed=1, firing=firing,
        keep=lambda rows: np.ones(len(rows), bool), keys=lambda rows: rows, shown=set(),
    )  # fmt: skip
    quiet = sorted(set(told.rows.tolist()) - set(firing.tolist()))
    assert len(set(rows.tolist())) == len(rows)
    assert set(rows.tolist()) <= set(quiet)
    assert rows.tolist() == quiet if most > 40 else 20 < len(rows) <= 40
