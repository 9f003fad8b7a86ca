"""The batch plan: a partition of the windows, within the budget, of like lengths, the same every time."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.errors import InvalidInputError
from actstore.ingest.batches import plan_batches

LENGTHS = st.lists(st.integers(1, 60), max_size=60)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 200), st.booleans())
def test_plan(lengths, budget, equal):
    batches = plan_batches(lengths, budget, equal_lengths=equal)
    flat = [int(w) for batch in batches for w in batch]
    # Longest first, equal ones in their own order: a partition, and sorted.
    assert flat == sorted(range(len(lengths)), key=lambda w: (-lengths[w], w))
    for batch in batches:
        longest = max(lengths[w] for w in batch)
        assert len(batch) == 1 or len(batch) * longest <= budget
        assert not equal or {lengths[w] for w in batch} == {longest}
    # Greedy: no batch could have taken the first window of the next.
    for batch, following in itertools.pairwise(batches):
        longest = lengths[batch[0]]
        assert (len(batch) + 1) * longest > budget or (equal and lengths[following[0]] != longest)


def test_same_input_same_plan():
    lengths = np.random.default_rng(5).integers(1, 900, 5000)
    a, b = (plan_batches(lengths, 4096) for _ in range(2))
    assert [x.tolist() for x in a] == [x.tolist() for x in b]
    padded = sum(len(x) * int(lengths[x].max()) for x in a)
    assert padded < 1.02 * lengths.sum()


@pytest.mark.parametrize(("lengths", "budget"), [([1, 2], 0), ([1, 0], 8), ([-1], 8)])
def test_bad_input(lengths, budget):
    with pytest.raises(InvalidInputError):
        plan_batches(lengths, budget)
