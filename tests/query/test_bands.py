"""Bands of a latent's rows against definitions written out again, on values that tie; and how they are asked for."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

import actstore
from actstore.errors import InvalidInputError
from actstore.query import bands
from actstore.query.bands import parse_bands, pick_rows
from tests.query.make_codes import H, add_codes, dead_codes, everywhere_codes, random_codes, stored_rows
from tests.query.make_store import add_run, make_store, random_values
from tests.query.naive_latents import check_context, count_firing, densest, eligible_rows, fold_key, ranked


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Values that tie, special tokens, sinks by norm, rows that are not finite."""
    made = make_store(str(tmp_path_factory.mktemp("bands") / "s"), seed=6, n_documents=60, rows_per_unit=128)
    add_run(made, "run", {H: 12}, random_values(1, {H: 12}, nonfinite=True, sinks=True))
    n = len(stored_rows(made, "run"))
    return add_codes(made, random_codes(n, 20, per_row=5, ties=True))


def mixed(row: int, seed: int) -> int:
    """The hash of a row that decides what is drawn: SplitMix64 in Python's own integers (FORMAT.md, section 6.8)."""
    mask, gamma = (1 << 64) - 1, 0x9E3779B97F4A7C15

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    return mix((mix((seed + gamma) & mask) + (row + 1) * gamma) & mask)


def drawn(candidates, n: int, seed: int, taken: set[int]):
    free = [(row, value) for row, value in candidates if row not in taken]
    chosen = {row for row, _ in sorted(free, key=lambda pair: mixed(pair[0], seed))[:n]}
    return [(row, value) for row, value in free if row in chosen]


def quantile(values: list[float], q: float) -> float:
    """Linear interpolation between order statistics, in exact arithmetic."""
    ordered = sorted(values)
    place = Fraction(q) * (len(ordered) - 1)
    low = int(place)
    if low + 1 == len(ordered):
        return ordered[low]
    return float(ordered[low] + (place - low) * (Fraction(ordered[low + 1]) - Fraction(ordered[low])))


def cut(definition, rows):
    """Name and candidates of every band of a definition, in the order shown; `rows` are (row, value) by rank."""
    kind = definition["band"]
    if kind in ("top", "random"):
        yield kind, rows
    elif kind == "rank":
        n, size = definition["n_bands"], len(rows)
        sizes = [size // n + (i < size % n) for i in range(n)]
        for i, (a, b) in enumerate(itertools.pairwise(itertools.accumulate(sizes, initial=0)), start=1):
            yield f"rank:{i}/{n}", rows[a:b]
    elif kind == "value":
        n = definition["n_bands"]
        largest = Fraction(max((v for _, v in rows), default=0))
        for i in range(n, 0, -1):
            low, high = largest * (i - 1) / n, largest * i / n
            yield f"value:{n - i + 1}/{n}", [(r, v) for r, v in rows if low < v <= high]
    elif kind == "percentile":
        edges = definition["percentiles"]
        values = [quantile([v for _, v in rows], q) for q in edges] if rows else [0.0] * len(edges)
        for i in range(len(edges) - 1, -1, -1):
            last = i + 1 == len(edges)
            inside = [(r, v) for r, v in rows if values[i] <= v and (last or v < values[i + 1])]
            yield f"percentile:{edges[i]:g}-{1 if last else edges[i + 1]:g}", inside


def naive_bands(asked, rows):
    """(band, row, value) of everything that is shown, without `nonactivating`."""
    taken, shown = set(), []
    for definition in asked.to_list():
        n = definition.get("per", definition.get("n"))
        for name, candidates in cut(definition, rows):
            if definition["band"] == "top":
                some = [(r, v) for r, v in candidates if r not in taken][:n]
            else:
                some = drawn(candidates, n, definition["seed"], taken)
            taken |= {row for row, _ in some}
            shown += [(name, row, value) for row, value in some]
    return shown


ASKED = [
    bands.top(5),
    bands.rank(7, 3),
    bands.rank(3, 1000, seed=5),
    bands.value(4, 3, seed=9),
    bands.percentile([0.0, 0.25, 0.5, 0.9], 4),
    bands.percentile([0.99], 4, seed=1),
    bands.random(25, seed=3),
    bands.top(3) + bands.rank(4, 2) + bands.random(4) + bands.value(2, 2) + bands.top(2),
]


@pytest.mark.parametrize("fold", ["context", "doc", None])
@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: "+".join(b["band"] for b in asked.to_list()))
def test_against_definitions_written_out(told, asked, fold):
    rows = eligible_rows(told, H)
    for index in range(0, 20, 3):
        result = told.made.run().examples(actstore.latent("sae", index), bands=asked, fold=fold)
        wanted = naive_bands(asked, ranked(told, index, rows, fold))
        assert [(r["band"], r["row"], r["value"]) for r in result] == wanted
        assert result.meta.n_eligible == count_firing(told, index, rows)
        assert (result.meta.n_requested, result.meta.n_returned) == (asked.n_requested, len(wanted))
        assert result.meta.request["bands"] == asked.to_list()
        for _, group in itertools.groupby(result.to_dicts(), key=lambda r: r["band"]):
            ranks = [r["rank"] for r in group]
            assert ranks == list(range(1, len(ranks) + 1)) or asked is ASKED[-1]
        for r in result:
            check_context(told, index, r)


def test_what_each_band_held_is_told(told):
    index = densest(told)
    asked = bands.top(2) + bands.value(4, 3) + bands.percentile([0.5, 0.9], 2)
    result = told.made.run().examples(actstore.latent("sae", index), bands=asked)
    rows = ranked(told, index, eligible_rows(told, H), "context")
    told_bands = result.meta.mask[f"latent:sae:{index}"]["bands"]
    expected = [pair for definition in asked.to_list() for pair in cut(definition, rows)]
    assert [b["band"] for b in told_bands] == [name for name, _ in expected]
    assert [b["n_rows"] for b in told_bands] == [len(inside) for _, inside in expected]
    assert sum(b["n_returned"] for b in told_bands) == len(result)
    largest = rows[0][1]
    edges = [(b["low"], b["high"]) for b in told_bands if b["band"].startswith("value")]
    assert edges == [(largest * i / 4, largest * (i + 1) / 4) for i in (3, 2, 1, 0)]
    values = [value for _, value in rows]
    low, high = (quantile(values, q) for q in (0.5, 0.9))
    edges = [(b["low"], b["high"]) for b in told_bands if b["band"].startswith("percentile")]
    assert edges == [(high, largest), (low, high)]


@pytest.mark.parametrize("fold", ["context", "doc", None])
def test_rows_that_do_not_fire(told, fold):
    rows = eligible_rows(told, H)
    good = {row for row, norm in zip(told.rows.tolist(), told.norms.tolist(), strict=True) if norm > 0}
    for index in (0, 7, densest(told)):
        fires = set(told.firing(index)[0].tolist())
        quiet = [row for row in rows if row not in fires and row in good]
        target = actstore.latent("sae", index)
        asked = bands.top(4) + bands.nonactivating(12, seed=2)
        result = told.made.run().examples(target, bands=asked, fold=fold)
        shown = [r for r in result if r["band"] == "nonactivating"]
        n_keys = len({fold_key(told, row, fold) for row in quiet})
        assert len(shown) == min(12, n_keys) or fold == "doc"
        assert {r["value"] for r in shown} <= {0.0}
        assert {r["row"] for r in shown} <= set(quiet)
        keys = [fold_key(told, r["row"], fold) for r in result]
        assert len(keys) == len(set(keys))
        for r in shown:
            check_context(told, index, r)
        again = told.made.run().examples(target, bands=asked, fold=fold)
        assert again.to_dicts() == result.to_dicts()
        assert result.meta.seed == 2
        everything = told.made.run().examples(target, bands=bands.nonactivating(10_000), fold=fold)
        assert len(everything) == n_keys
        assert any(f"{n_keys} rows" in w for w in everything.meta.warnings)
    some = rows[::7]
    result = told.made.run().examples(target, bands=bands.nonactivating(10_000), rows=some, fold=None)
    assert [r["row"] for r in result] == [row for row in some if row in set(quiet)]
    result = told.made.run().examples(target, bands=bands.nonactivating(10_000), docs=[3, 41], fold=None)
    docs = {row: token.doc_id for row, token in told.made.by_row.items()}
    assert [r["row"] for r in result] == [row for row in quiet if docs[row] in (3, 41)]


def test_every_quiet_row_is_as_likely(told):
    """400 draws of 5 of n rows: counts are binomial, and none may be off by more than 5 of their deviations."""
    index = densest(told)
    fires = set(told.firing(index)[0].tolist())
    good = {row for row, norm in zip(told.rows.tolist(), told.norms.tolist(), strict=True) if norm > 0}
    quiet = [row for row in eligible_rows(told, H)[:200] if row not in fires and row in good]
    counts = dict.fromkeys(quiet, 0)
    for seed in range(400):
        for r in told.made.run().examples(
            actstore.latent("sae", index),
            bands=bands.nonactivating(5, seed=seed),
            rows=quiet,
            fold=None,
            before=0,
            after=0,
        ):
            counts[r["row"]] += 1
    p = 5 / len(quiet)
    found = np.array(list(counts.values()))
    assert found.sum() == 2000
    assert np.abs(found - 400 * p).max() < 5 * np.sqrt(400 * p * (1 - p))


def test_dead_and_everywhere(tmp_path):
    made = make_store(str(tmp_path / "s"), n_documents=8)
    add_run(made, "run", {H: 4}, random_values(1, {H: 4}))
    add_codes(made, dead_codes(len(made.tokens), 5), dictionary="dead")
    told = add_codes(made, everywhere_codes(len(made.tokens), 12), dictionary="all")
    asked = bands.top(3) + bands.value(3, 2) + bands.percentile([0.5], 2) + bands.nonactivating(4)
    result = made.run().examples(actstore.latent("dead", 2), bands=asked)
    assert len(result) == 0
    assert result.table.column_names[:2] == ["band", "rank"]
    assert any("is dead" in w for w in result.meta.warnings)
    result = made.run().examples(actstore.latent("all", 3), bands=asked)
    wanted = naive_bands(bands.Bands(asked.parts[:3]), ranked(told, 3, eligible_rows(told, H), "context"))
    assert [(r["band"], r["row"], r["value"]) for r in result] == wanted
    assert any("no row in nonactivating" in w for w in result.meta.warnings)


def test_several_latents_with_bands(told):
    targets = [actstore.latent("sae", i) for i in (0, 4, 9)]
    asked = bands.top(2) + bands.random(3)
    together = told.made.run().examples(targets, bands=asked)
    assert together.table.column_names[:3] == ["target", "band", "rank"]
    assert together.meta.n_requested == 15
    for target in targets:
        mine = [r for r in together.to_dicts() if r.pop("target") == target.label]
        assert mine == told.made.run().examples(target, bands=asked).to_dicts()


def test_values_on_edges():
    """Values that lie on the edges of the bands, worked out by hand."""
    values = np.array([4, 4, 3, 2, 2, 1, 1, 0.5])
    rows = np.arange(8) * 10
    found = {p.band: values[p.index].tolist() for p in pick_rows(bands.value(4, 9), rows, values)}
    assert found == {"value:1/4": [4, 4], "value:2/4": [3], "value:3/4": [2, 2], "value:4/4": [1, 1, 0.5]}
    found = {p.band: values[p.index].tolist() for p in pick_rows(bands.rank(3, 9), rows, values)}
    assert found == {"rank:1/3": [4, 4, 3], "rank:2/3": [2, 2, 1], "rank:3/3": [1, 0.5]}
    found = [p.to_dict() for p in pick_rows(bands.percentile([0, 0.5], 9), rows, values)]
    assert found == [
        {"band": "percentile:0.5-1", "low": 2.0, "high": 4.0, "n_rows": 5, "n_returned": 5},
        {"band": "percentile:0-0.5", "low": 0.5, "high": 2.0, "n_rows": 3, "n_returned": 3},
    ]
    equal = pick_rows(bands.value(3, 9), rows, np.full(8, 0.3))
    assert [p.n_rows for p in equal] == [8, 0, 0]
    assert [p.n_rows for p in pick_rows(bands.rank(3, 9), rows[:0], values[:0])] == [0, 0, 0]


def test_parsed_from_text():
    text = "top:5, rank:10x2@7,value:4x3,percentile:0.5/0.9x2,random:6@1,nonactivating:8"
    asked = bands.top(5) + bands.rank(10, 2, seed=7) + bands.value(4, 3) + bands.percentile([0.5, 0.9], 2)
    asked += bands.random(6, seed=1) + bands.nonactivating(8)
    assert parse_bands(text) == asked
    for bad in (
        "",
        "top",
        "top:x",
        "top:5@1",
        "rank:5",
        "value:x2",
        "percentile:ax2",
        "best:5",
        "random:2x2",
        "rank:-1x2",
    ):
        with pytest.raises(InvalidInputError, match="is none of"):
            parse_bands(bad)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bands.top(0), "rows of band 'top'"), (lambda: bands.rank(0, 5), "n_bands"),
        (lambda: bands.value(5, 20_000), "from 1 to 10000"), (lambda: bands.random(5, seed=-1), "seed"),
        (lambda: bands.percentile([50, 90]), "ascending shares"), (lambda: bands.percentile([0.9, 0.5]), "ascending"),
        (lambda: bands.percentile([]), "ascending"), (lambda: bands.percentile(0.5), "list of numbers"),
        (lambda: bands.check_bands(bands.Bands(())), "has no band"),
        (lambda: bands.check_bands(bands.rank(1000, 1) + bands.top(1)), "at most 1000"),
        (lambda: bands.check_bands([bands.top(3)]), "made with"),
    ],
)  # fmt: skip
def test_bad_definitions(make, message):
    with pytest.raises(InvalidInputError, match=message):
        make()
