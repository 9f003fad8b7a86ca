from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.log.chunked import ChunkedMap
from actstore.log.txns import KEPT_TXNS, RecentTxns

keys = st.integers(0, 2000)


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.dictionaries(keys, st.integers(), max_size=40), st.sets(keys, max_size=20)), max_size=8
    )
)
def test_every_version_equals_a_dict_and_stays_as_it_was(steps):
    versions = [(ChunkedMap(), {})]
    for changes, removed in steps:
        chunked, plain = versions[-1]
        gone = {key for key in removed if key in plain and key not in changes}
        new = {**plain, **changes}
        for key in gone:
            del new[key]
        versions.append((chunked.updated(changes, removed=gone), new))
    for chunked, plain in versions:
        assert list(chunked.items()) == sorted(plain.items())
        assert list(chunked) == sorted(plain)
        assert list(chunked.values()) == [plain[key] for key in sorted(plain)]
        assert len(chunked) == len(plain)
        assert chunked == plain
        assert all((key in chunked) == (key in plain) for key in range(0, 2001, 7))


def test_key_removed_that_was_put_in_the_same_step():
    assert dict(ChunkedMap.of({1: "a"}).updated({300: "b"}, removed=[300])) == {1: "a"}


def test_recent_transactions_are_found_and_old_ones_forgotten():
    txns = RecentTxns()
    for version in range(KEPT_TXNS + 100):
        txns = txns.added(f"t{version}", version)
    kept = list(txns.items())
    assert kept == [(v, f"t{v}") for v in range(100, KEPT_TXNS + 100)]
    assert all(txns.version_of(txn) == version for version, txn in kept)
    assert all(txns.version_of(f"t{version}") is None for version in range(100))
    again = RecentTxns.of(dict(kept))
    assert again == txns
    assert all(again.version_of(txn) == version for version, txn in kept)
