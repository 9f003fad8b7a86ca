"""Is every token in exactly the windows it should be in, and every window in exactly one unit?"""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.errors import InvalidInputError
from actstore.ingest.token_encoding import EncodedBatch, Template
from actstore.ingest.token_units import Cut, Start, UnitPacker
from actstore.ingest.windows import auto_rows_per_unit, check_window, pack_units, plan_windows


@st.composite
def geometries(draw):
    prefix, suffix = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    room = draw(st.integers(1, 8))
    return {
        "prefix": prefix,
        "suffix": suffix,
        "window": room + prefix + suffix,
        "overlap": draw(st.integers(0, room - 1)),
    }


@given(st.integers(0, 60), geometries())
def test_windows_cover_the_body_in_order(n_body, geometry):
    room = geometry["window"] - geometry["prefix"] - geometry["suffix"]
    windows = plan_windows(n_body, **geometry)
    if n_body + geometry["prefix"] + geometry["suffix"] == 0:
        assert windows == []
        return
    assert windows[0][0] == 0
    assert windows[-1][1] == n_body
    assert all(0 <= b - a <= room for a, b in windows)
    # All but the last are full, and neighbours share exactly the overlap: so no window is within another.
    assert all(b - a == room for a, b in windows[:-1])
    assert all(after[0] == before[1] - geometry["overlap"] for before, after in pairwise(windows))
    if geometry["overlap"] == 0:
        assert [t for a, b in windows for t in range(a, b)] == list(range(n_body))
    if len(windows) > 1:
        assert windows[-1][1] > windows[-2][1]


@given(st.lists(st.integers(1, 10), max_size=40), st.integers(10, 30), st.data())
def test_packing_is_greedy_and_complete(lengths, rows_per_unit, data):
    filled = data.draw(st.integers(0, rows_per_unit))
    ranges = pack_units(lengths, rows_per_unit, filled=filled)
    assert [i for a, b in ranges for i in range(a, b)] == list(range(len(lengths)))
    sizes = [sum(lengths[a:b]) for a, b in ranges]
    sizes[0] += filled
    assert all(size <= rows_per_unit for size in sizes)
    for size, (start, _) in zip(sizes, ranges[1:], strict=False):
        assert size + lengths[start] > rows_per_unit


@given(st.integers(0, 1 << 45), st.integers(1, 1 << 20))
def test_auto_rows_are_a_power_of_two_that_holds_a_window(text_bytes, window):
    rows = auto_rows_per_unit(text_bytes, window=window)
    assert rows & (rows - 1) == 0
    assert rows >= window
    assert 2048 <= rows <= max(65_536, 2 * window)
    if window <= 2048 and 2048 < rows < 65_536:
        assert rows // 2 < text_bytes // 256 <= rows


@pytest.mark.parametrize(("window", "overlap"), [(2, 0), (0, 0), (-5, 0), (3, 1), (10, 8), (10, -1)])
def test_windows_that_cannot_advance_are_refused(window, overlap):
    with pytest.raises(InvalidInputError):
        check_window(window=window, overlap=overlap, prefix=1, suffix=1)
    check_window(window=3, overlap=0, prefix=1, suffix=1)


def oracle_rows(lengths, *, prefix, suffix, window, overlap):
    """Cut documents token by token: (doc, position, index in the document or None, window, window position)."""
    windows = []
    for doc, n_body in enumerate(lengths):
        total = prefix + n_body + suffix
        if total == 0:
            continue
        sequence = list(range(total))
        if total <= window:
            windows.append([(doc, p, 0, w) for w, p in enumerate(sequence)])
            continue
        body = sequence[prefix : prefix + n_body]
        room = window - prefix - suffix
        index, start = 0, 0
        while True:
            piece = body[start : start + room]
            last = start + room >= n_body
            before = sequence[:prefix] if index == 0 else [piece[0]] * prefix
            after = sequence[prefix + n_body :] if last else [piece[-1]] * suffix
            windows.append([(doc, p, index, w) for w, p in enumerate([*before, *piece, *after])])
            if last:
                break
            index, start = index + 1, start + room - overlap
    return windows


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=12),
    geometries(),
    st.integers(0, 20),
    st.integers(1, 4),
    st.data(),
)
def test_units_hold_what_a_plain_loop_cuts(lengths, geometry, extra, batch_size, data):
    rows_per_unit = geometry["window"] + extra
    prefix, suffix = geometry["prefix"], geometry["suffix"]
    cut = Cut(
        Template(prefix, suffix), geometry["window"], geometry["overlap"], rows_per_unit, special_ids=(7,)
    )
    expected_windows = oracle_rows(lengths, **geometry)
    expected_units, filled = [[]], 0
    for rows in expected_windows:
        if filled + len(rows) > rows_per_unit:
            expected_units.append([])
            filled = 0
        expected_units[-1] += rows
        filled += len(rows)
    expected_units = [u for u in expected_units if u]

    # Every token's id says where it is: document * 100 + index; body token j covers characters [2j, 2j + 1).
    batches = []
    for first in range(0, len(lengths), batch_size):
        docs = range(first, min(first + batch_size, len(lengths)))
        totals = [prefix + lengths[d] + suffix for d in docs]
        ids = [100 * (d + 1) + t for d, n in zip(docs, totals, strict=True) for t in range(n)]
        starts = [2 * (t - prefix) if prefix <= t < n - suffix else 0 for n in totals for t in range(n)]
        ends = [2 * (t - prefix) + 1 if prefix <= t < n - suffix else 0 for n in totals for t in range(n)]
        batches.append(
            EncodedBatch(
                first,
                np.array(totals, np.int64),
                np.array(ids, np.int32),
                np.array(starts, np.int32),
                np.array(ends, np.int32),
            )
        )

    def units(start: Start):
        packer = UnitPacker(cut, start)
        found = [
            u
            for b in batches
            if b.first_doc + len(b.lengths) > start.doc
            for u in packer.add(skipped(b, start.doc))
        ]
        return [*found, *packer.finish()]

    whole = units(Start())
    assert [u.unit for u in whole] == list(range(len(expected_units)))
    for unit, expected in zip(whole, expected_units, strict=True):
        table = unit.table.to_pydict()
        assert table["row"] == list(
            range(unit.unit * rows_per_unit, unit.unit * rows_per_unit + len(expected))
        )
        found = list(
            zip(table["doc_id"], table["position"], table["window"], table["window_position"], strict=True)
        )
        assert found == expected
        n_docs = [d for d, _, w, p in expected if w == 0 and p == 0]
        assert unit.meta["n_documents"] == len(n_docs)
        assert (unit.meta["first_doc"], unit.meta["last_doc"]) == (expected[0][0], expected[-1][0])
        assert unit.meta["n_windows"] == sum(p == 0 for *_, p in expected)
        check_tokens(table, lengths, geometry)
    # Going on behind any unit gives the same rest.
    if whole:
        k = data.draw(st.integers(0, len(whole) - 1))
        meta = whole[k].meta
        rest = units(Start(k + 1, meta["last_doc"], meta["last_window"] + 1))
        assert [(u.unit, u.meta) for u in rest] == [(u.unit, u.meta) for u in whole[k + 1 :]]
        assert all(a.table.equals(b.table) for a, b in zip(rest, whole[k + 1 :], strict=True))


def skipped(batch: EncodedBatch, doc: int) -> EncodedBatch:
    """The batch from a document on, as the reader of texts gives it."""
    n = max(0, doc - batch.first_doc)
    at = int(batch.lengths[:n].sum())
    return EncodedBatch(
        batch.first_doc + n, batch.lengths[n:], batch.ids[at:], batch.starts[at:], batch.ends[at:]
    )


def check_tokens(table, lengths, geometry):
    prefix, suffix, window = geometry["prefix"], geometry["suffix"], geometry["window"]
    for i, token in enumerate(table["token_id"]):
        doc, index = token // 100 - 1, token % 100
        total = prefix + lengths[doc] + suffix
        assert doc == table["doc_id"][i]
        assert table["window_position"][i] < window
        special = index < prefix or index >= total - suffix
        assert table["is_special"][i] == special
        span = (table["char_start"][i], table["char_end"][i])
        if special:
            assert span[0] == span[1]
        else:
            assert table["position"][i] == index
            assert span == (2 * (index - prefix), 2 * (index - prefix) + 1)
