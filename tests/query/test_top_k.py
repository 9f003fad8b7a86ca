import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from actstore.query.top_k import TopK, offer_block


def expected(scores, rows, keys, k):
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], rows[i]))
    seen, best = set(), []
    for i in order:
        if keys[i] not in seen:
            seen.add(keys[i])
            best.append((scores[i], rows[i]))
    return best[:k]


streams = st.lists(
    st.tuples(st.integers(-6, 6).map(float), st.integers(0, 12)), min_size=0, max_size=120
)  # few values, so that ties and repeated keys abound


@given(streams, st.integers(1, 15), st.integers(1, 40), st.data())
def test_streaming_equals_sorting(stream, k, block, data):
    scores = np.array([s for s, _ in stream])
    keys = np.array([key for _, key in stream], dtype=np.int64)
    rows = np.array(data.draw(st.permutations(range(len(stream)))), dtype=np.int64)
    best = TopK(k)
    for start in range(0, len(stream), block):
        part = slice(start, start + block)
        best.offer(scores[part], rows[part], keys[part])
    assert best.ranked() == expected(scores.tolist(), rows.tolist(), keys.tolist(), k)


@given(
    streams,
    st.integers(1, 15),
    st.integers(1, 40),
    st.lists(st.floats(0, 4), min_size=120, max_size=120),
    st.data(),
)
def test_bounds_change_nothing(stream, k, block, slacks, data):
    """Whatever the upper bounds, the answer is that of the exact scores; rows left out never enter."""
    scores = np.array([s for s, _ in stream])
    keys = np.array([key for _, key in stream], dtype=np.int64)
    rows = np.arange(len(stream), dtype=np.int64)
    out = np.array(
        data.draw(st.lists(st.sampled_from([0, 1, 2]), min_size=len(stream), max_size=len(stream))), dtype=int
    )
    best = TopK(k)
    for start in range(0, len(stream), block):
        part = slice(start, start + block)
        exact_scores = np.where(out[part] == 1, -np.inf, np.where(out[part] == 2, np.nan, scores[part]))
        upper = np.where(out[part] == 1, -np.inf, scores[part] + np.array(slacks)[: len(scores[part])])
        offer_block(
            best, upper, rows[part],
            exact=lambda index, s=exact_scores: s[index], keys=lambda index, p=part: keys[p][index],
        )  # fmt: skip
    kept = [i for i in range(len(stream)) if not out[i]]
    assert best.ranked() == expected(scores[kept].tolist(), rows[kept].tolist(), keys[kept].tolist(), k)


def test_few_rows_are_scored_exactly():
    rng = np.random.default_rng(0)
    best, scored = TopK(10), 0
    for start in range(0, 200_000, 10_000):
        scores = rng.standard_normal(10_000)
        rows = np.arange(start, start + 10_000)
        scored += offer_block(
            best, scores + 1e-6, rows, exact=lambda i, s=scores: s[i], keys=lambda i, r=rows: r[i]
        )
    assert scored < 2_000


def test_one_key_is_one_answer_in_bounded_memory():
    best = TopK(5)
    for i in range(5_000):
        best.offer(np.array([float(i)]), np.array([i]), np.array([7]))
    assert best.ranked() == [(4999.0, 4999)]
    assert len(best._heap) <= 4 * 5 + 65
