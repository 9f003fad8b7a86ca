"""Arguments that nobody should pass, and that somebody will: each gets an error of ours that says what was given."""

import numpy as np
import pytest

import actstore
from actstore.checks import check_whole, is_whole
from actstore.errors import ActstoreError, ErrorKind, InvalidInputError, NotFoundError

H = "layers.0.resid_post"

CALLS = {
    "open None": lambda made: actstore.open(None),
    "open bytes": lambda made: actstore.open(made.url.encode()),
    "open at a text": lambda made: actstore.open(made.url, version="3"),
    "at a float": lambda made: made.store.at(1.0),
    "at True": lambda made: made.store.at(True),
    "run None": lambda made: made.store.run(None),
    "run a list": lambda made: made.store.run(["run"]),
    "hook point None": lambda made: made.run().activations(None),
    "hook point of stats": lambda made: made.run().stats(3),
    "neuron of nothing": lambda made: actstore.neuron(None, 1),
    "scan text": lambda made: made.run().activations(H).scan("5"),
    "scan half rows": lambda made: made.run().activations(H).scan(7.5),
    "shuffled None": lambda made: made.run().activations(H).shuffled(10, seed=None),
    "shuffled text": lambda made: made.run().activations(H).shuffled("10"),
    "shuffled half a worker": lambda made: made.run().activations(H).shuffled(10, num_workers=0.5),
    "shuffled worker 2 of 2": lambda made: made.run().activations(H).shuffled(10, num_workers=2, worker_index=2),
    "a state of None": lambda made: made.run().activations(H).shuffled(10).load_state(None),
    "rows beyond int64": lambda made: made.run().activations(H)[10**30],
    "documents by name": lambda made: made.run().tokenization.corpus.documents(["a"]),
    "documents by halves": lambda made: made.run().tokenization.corpus.documents([1.5]),
    "one document": lambda made: made.run().tokenization.corpus.documents(3),
    "documents of one column": lambda made: made.run().tokenization.corpus.documents([0], "text"),
    "documents of no column": lambda made: made.run().tokenization.corpus.documents([0], ["txt"]),
    "texts as one": lambda made: made.run().encode_text("abc", H),
    "target None": lambda made: made.run().examples(None),
    "target 7": lambda made: made.run().examples(7),
    "parse None": lambda made: actstore.parse_target(None),
    "huge direction": lambda made: actstore.direction(H, [1e308] * 12),
    "huge query": lambda made: made.run().nearest(H, [1e300] * 12, metric="l2"),
    "docs= text": lambda made: made.run().examples(actstore.neuron(H, 1), docs="a"),
    "memory text": lambda made: made.run().examples(actstore.neuron(H, 1), memory_bytes="1"),
    "memory beyond all": lambda made: made.run().nearest(H, 5, memory_bytes=1 << 70),
    "sql memory text": lambda made: made.store.sql("SELECT 1", memory_bytes="1"),
    "sql memory beyond all": lambda made: made.store.sql("SELECT 1", memory_bytes=10**30),
    "sql time text": lambda made: made.store.sql("SELECT 1", timeout_s="1"),
    "sql time NaN": lambda made: made.store.sql("SELECT 1", timeout_s=float("nan")),
    "sql half a thread": lambda made: made.store.sql("SELECT 1", threads=1.5),
    "sql one value": lambda made: made.store.sql("SELECT ?", 1),
    "sql values as text": lambda made: made.store.sql("SELECT ?", "1"),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_wrong_arguments(made, call):
    with pytest.raises(InvalidInputError) as caught:
        CALLS[call](made)
    assert str(caught.value)


def test_numpy_numbers_are_numbers(made):
    store, run = made.store, made.run()
    acts = run.activations(H)
    assert store.at(np.int64(store.version)).version == store.version
    assert sum(len(rows) for rows, _ in acts.scan(np.int32(7))) == len(acts)
    assert len(run.examples(actstore.neuron(H, np.int8(1)), np.int64(3), memory_bytes=np.int64(1 << 28))) == 3
    answer = store.sql("SELECT $1 + $2 AS n", [np.int64(3), np.float32(0.5)])
    assert answer.to_dicts() == [{"n": 3.5}]
    assert store.sql("SELECT $a AS n", {"a": np.bool_(True)}).to_dicts() == [{"n": True}]
    assert run.tokenization.unit_table(np.int64(0)).num_rows > 0
    assert len(run.tokenization.corpus.documents(np.array([0, 1], np.uint8))) == 2


def test_units_that_are_none(made):
    for unit in ("a", None, 1.0, -1, 999):
        with pytest.raises(NotFoundError, match="unit"):
            made.run().tokenization.unit_table(unit)


def test_a_batch_is_no_larger_than_a_unit_whatever_is_asked_for(made):
    acts = made.run().activations(H)
    largest = max(stop - start for start, stop in acts.row_ranges)
    sizes = [len(rows) for rows, _ in acts.scan(1 << 60)]
    assert sum(sizes) == len(acts)
    assert max(sizes) == largest


def test_names_that_are_not_there_are_told_from_those_that_are(made):
    with pytest.raises(NotFoundError, match="did you mean 'half'"):
        made.store.run("halv")
    with pytest.raises(NotFoundError, match="there are 'half', 'part', 'run'"):
        made.store.run("xyzzy")


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("n = ", "ends in the middle"),
        ("n = 1 ORDER BY n", "character 6"),
        ("n\n= = 2", "cannot be evaluated"),
        ("text", "cannot be evaluated"),
        ("x" * 1000 + " +", "ends in the middle"),
    ],
)
def test_errors_of_a_predicate_speak_of_the_predicate(made, where, said):
    with pytest.raises(InvalidInputError, match=said) as caught:
        made.run().examples(actstore.neuron(H, 1), where=where)
    assert repr(where)[:50] in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_an_array_of_objects_brings_no_advice_to_unpickle(tmp_path):
    (tmp_path / "text.npy").write_text("root:x:0:0")
    with pytest.raises(InvalidInputError) as caught:
        actstore.parse_target(f"direction:{H}:{tmp_path}/text.npy")
    assert "pickle" not in str(caught.value)
    assert "numpy.save" in str(caught.value)


@pytest.mark.parametrize("value", [True, np.bool_(True), 1.0, "1", None, [1], np.array([1]), np.float64(1)])
def test_what_is_no_whole_number(value):
    assert not is_whole(value)
    with pytest.raises(ActstoreError, match="k must be a whole number from 1 to 3, got") as caught:
        check_whole(value, what="k", least=1, most=3)
    assert caught.value.kind is ErrorKind.BAD_ARGUMENT


@pytest.mark.parametrize("value", [0, 4, np.int64(4), -(1 << 70)])
def test_whole_numbers_out_of_range(value):
    assert is_whole(value)
    with pytest.raises(InvalidInputError, match="from 1 to 3"):
        check_whole(value, what="k", least=1, most=3)
