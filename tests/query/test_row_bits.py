"""Bitmaps against the masks of a plain loop, and their counts against those of a scan."""

import itertools

import numpy as np
import pytest

from actstore.errors import InvalidInputError, NotFoundError
from actstore.query.answer import RowOptions, find_rows, open_acts
from actstore.query.row_bits import bits_to_rows, document_rows, read_row_bits, set_bits
from actstore.query.row_mask import RowMask
from actstore.query.scores import NeuronScorer
from actstore.sampling import Sample
from tests.query.make_store import WORDS, add_run, make_store, random_values
from tests.query.naive import eligible

H = "layers.0.resid_post"


class Shard:
    """Some units of a run, as the shard of an index has them."""

    def __init__(self, run, number, units):
        self.number = number
        acts = run.activations(H)
        per_unit = [acts.rows(unit * acts.rows_per_unit, (unit + 1) * acts.rows_per_unit) for unit in units]
        self._rows = np.concatenate(per_unit)
        self.n = len(self._rows)
        stops = np.cumsum([len(rows) for rows in per_unit]).tolist()
        self._ranges = list(zip(units, [0, *stops[:-1]], stops, strict=True))
        self._norms = np.linalg.norm(acts.read(self._rows).astype(np.float64), axis=1)

    def unit_ranges(self):
        return self._ranges

    def norms(self):
        return self._norms

    def rows_of(self, ordinals):
        return self._rows[ordinals]

    def ordinals_of(self, rows):
        place = np.minimum(np.searchsorted(self._rows, rows), self.n - 1)
        return np.where(self._rows[place] == rows, place, -1)


def shards_of(run, *cuts):
    """The stored units of a run, cut at some places."""
    units = sorted(run.collection.units)
    bounds = [0, *cuts, len(units)]
    return [Shard(run, i, units[a:b]) for i, (a, b) in enumerate(itertools.pairwise(bounds))]


def rows_left(found, shards):
    kept = [bits_to_rows(found.bits[s.number], s).tolist() for s in shards if s.number in found.bits]
    return sorted(itertools.chain.from_iterable(kept))


def scanned(run, options, *, zero):
    """What a scan says of the same question: counts of removed rows, rows seen and rows kept."""
    removed = find_rows(
        run, open_acts(run, H, 64 << 20), NeuronScorer([0], "pos"), options, k=1, drop_zero_rows=zero
    ).removed
    return {name: n for name, n in removed.counts.items() if n}, removed.n_seen, removed.n_kept


FILTERS = {
    "none": (RowOptions(), lambda t, m: True),
    "where": (RowOptions(where="source = 'book' AND n < 25"), lambda t, m: m["source"] == "book" and m["n"] < 25),
    "where of nothing": (RowOptions(where="n < 0"), lambda t, m: False),
    "rows": (RowOptions(rows=range(70, 140)), lambda t, m: 70 <= t.row < 140),
    "rows and where": (
        RowOptions(rows=slice(10, 500), where="n % 2 = 0"),
        lambda t, m: 10 <= t.row < 500 and m["n"] % 2 == 0,
    ),
    "docs": (RowOptions(docs=[3, 17, 30]), lambda t, m: t.doc_id in (3, 17, 30)),
    "excluded": (RowOptions(exclude_docs=[3, 17, 30]), lambda t, m: t.doc_id not in (3, 17, 30)),
    "regex": (RowOptions(regex="^w1"), lambda t, m: WORDS[t.token_id].startswith("w1")),
    "all": (
        RowOptions(rows=slice(5, 700), docs=range(2, 35), where="n <> 7", regex="w|a"),
        lambda t, m: 5 <= t.row < 700
        and 2 <= t.doc_id < 35
        and m["n"] != 7
        and ("w" in WORDS[t.token_id] or "a" in WORDS[t.token_id]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize(
    ("special", "sinks", "zero"), [(True, True, True), (False, True, False), (False, False, True)]
)
def test_bits_are_the_rows_that_a_plain_loop_keeps(made, name, special, sinks, zero):
    options, keep = FILTERS[name]
    options = RowOptions(
        **{f: getattr(options, f) for f in options.__slots__} | {"mask_special": special, "mask_sinks": sinks}
    )
    run = made.run()
    shards = shards_of(run, 1, 4)
    found = read_row_bits(run, H, options, shards, drop_zero_rows=zero)
    rows = eligible(
        made, H, special=special, sinks=sinks, zero=zero, keep=lambda t: keep(t, made.metadata[t.doc_id])
    )
    assert rows_left(found, shards) == [token.row for token, _ in rows]
    counts = {reason: n for reason, n in found.removed.counts.items() if n}
    assert (counts, found.removed.n_seen, found.n_eligible) == scanned(run, options, zero=zero)
    assert found.n_eligible == len(rows_left(found, shards))


def test_counts_come_in_the_order_of_the_masks(made):
    options = RowOptions(rows=slice(5, None), docs=range(40), where="n <> 7", regex="w|a")
    found = read_row_bits(made.run(), H, options, shards_of(made.run()), drop_zero_rows=True)
    names = ["rows", "docs", "where", "regex", "special", "window_first", "nonfinite", "norm", "zero_norm"]
    assert list(found.removed.counts) == names


@pytest.mark.parametrize("run", ["half", "part"])
def test_other_runs_of_the_same_tokens(made, run):
    """A partial run shares its tokens' bitmaps with others where it has whole shards of the same units."""
    shards = shards_of(made.run(run), 2)
    found = read_row_bits(made.run(run), H, RowOptions(where="n > 4"), shards, drop_zero_rows=True)
    rows = eligible(made, H, run, zero=True, keep=lambda t: t.doc_id > 4)
    assert rows_left(found, shards) == [token.row for token, _ in rows]


def test_a_sampled_run(tmp_path):
    made = make_store(str(tmp_path / "s"), seed=4)
    add_run(made, "run", {H: 8}, random_values(3, {H: 8}, sinks=True), sample=Sample(0.4, 5))
    shards = shards_of(made.run(), 3)
    for options, keep in (FILTERS["none"], FILTERS["where"], FILTERS["docs"], FILTERS["regex"]):
        found = read_row_bits(made.run(), H, options, shards, drop_zero_rows=False)
        rows = eligible(made, H, keep=lambda t, keep=keep: keep(t, made.metadata[t.doc_id]))
        assert rows_left(found, shards) == [token.row for token, _ in rows]
        assert found.removed.n_seen == made.run().n_rows


def test_a_second_question_evaluates_nothing(made):
    options = RowOptions(where="n % 3 = 1", rows=np.arange(3, 600))
    shards = shards_of(made.run(), 2)
    first = read_row_bits(made.run(), H, options, shards, drop_zero_rows=True)
    again = read_row_bits(made.run(), H, options, shards, drop_zero_rows=True)
    assert [again.bits[n] is first.bits[n] for n in first.bits] == [True] * len(first.bits)
    assert again.removed.counts == first.removed.counts
    assert not any(bits.flags.writeable for bits in first.bits.values())


def test_what_depends_on_the_clock_is_evaluated_again(made):
    options = RowOptions(where="n >= 0 AND now() > TIMESTAMPTZ '2000-01-01'")
    shards = shards_of(made.run())
    first = read_row_bits(made.run(), H, options, shards, drop_zero_rows=True)
    again = read_row_bits(made.run(), H, options, shards, drop_zero_rows=True)
    assert again.bits[0] is not first.bits[0]
    np.testing.assert_array_equal(again.bits[0], first.bits[0])


def test_masks_are_never_mistaken_for_each_other(made):
    """Every pair of different questions in one process, in any order."""
    run, shards = made.run(), shards_of(made.run(), 3)
    questions = [
        RowOptions(rows=[1, 2, 30]), RowOptions(rows=[1, 2, 31]), RowOptions(docs=[1, 2, 30]), RowOptions(rows=slice(1, 31)),
        RowOptions(exclude_docs=[1, 2, 30]), RowOptions(where="n = 1"), RowOptions(regex="n = 1"), RowOptions(has_next=True),
        RowOptions(rows=np.array([1, 30])), RowOptions(rows=np.array([1, 30], np.int32)), RowOptions(mask_special=False),
        RowOptions(mask_sinks=False),
    ]  # fmt: skip
    for options in [*questions, *reversed(questions)]:
        for zero in (False, True):
            found = read_row_bits(run, H, options, shards, drop_zero_rows=zero)
            assert found.n_eligible == scanned(run, options, zero=zero)[2]


def test_rows_taken_out(made):
    run, shards = made.run(), shards_of(made.run(), 2)
    found = read_row_bits(run, H, RowOptions(), shards, drop_zero_rows=True)
    before = rows_left(found, shards)
    taken = document_rows(run.tokenization, 12)
    assert taken.tolist() == [t.row for t in made.tokens if t.doc_id == 12]
    fewer = found.without(shards, np.concatenate([taken, [before[0], 10**6]]))
    kept = sorted(row for s in shards for row in bits_to_rows(fewer[s.number], s).tolist())
    assert kept == [row for row in before if row not in {*taken.tolist(), before[0]}]
    assert rows_left(found, shards) == before


def test_rows_given_by_number_know_no_masks_of_documents_left_out_or_next_tokens(made):
    """To ignore a mask would be a wrong answer."""
    run = made.run()
    for options in (RowOptions(exclude_docs=[1]), RowOptions(has_next=True)):
        with pytest.raises(AssertionError, match="only `Eligibility`"):
            RowMask(run, options.masks, sinks=None, norms=lambda rows: rows * 0.0, memory_bytes=1 << 20)


def test_set_bits():
    rng = np.random.default_rng(0)
    for n, p in itertools.product((0, 1, 7, 8, 9, 1000, 4097), (0.0, 0.01, 0.5, 1.0)):
        keep = rng.random(n) < p
        assert set_bits(np.packbits(keep, bitorder="little")).tolist() == np.flatnonzero(keep).tolist()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (RowOptions(where="nope = 1"), InvalidInputError),
        (RowOptions(rows=[0.5]), InvalidInputError),
        (RowOptions(rows=[[1, 2], [3]]), InvalidInputError),
        (RowOptions(docs=[10**6]), NotFoundError),
        (RowOptions(rows=[-1]), NotFoundError),
    ],
)
def test_bad_masks(made, options, error):
    for _ in range(2):  # not remembered either
        with pytest.raises(error):
            read_row_bits(made.run(), H, options, shards_of(made.run()), drop_zero_rows=True)
