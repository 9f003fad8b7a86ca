"""Shards on Ray actors find what one process finds; lost ones are an error, or an answer that says what it lacks."""

import os
import signal
import threading
import warnings

import numpy as np
import pytest

from actstore.errors import ErrorKind, FormatError, InvalidInputError, StorageError
from actstore.query.answer import RowOptions
from actstore.query.index_search import LocalShards
from actstore.query.ray_shards import IndexPlace, RayShards, ShardGroup, deal_shards
from actstore.query.row_bits import read_row_bits
from actstore.vector_index import open_indexes
from tests.query.make_index import add_index
from tests.query.make_store import add_run, make_store, random_values

H = "layers.0.resid_post"
WIDTHS = {H: 12}
SHARDS = [[(0, 3)], [(3, 6), (8, 9)], [(6, 8)]]
"""Units of each shard; those from 9 on are in none."""

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(400),
    # Ray's own imports and sockets warn; what is tested here is what is found.
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
    ),
]


@pytest.fixture(scope="module")
def ray():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray

        ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False)
        yield ray
        ray.shutdown()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    made = make_store(
        str(tmp_path_factory.mktemp("shards") / "a.store"), seed=11, n_documents=220, rows_per_unit=256
    )
    add_run(made, "run", WIDTHS, random_values(12, WIDTHS, nonfinite=True, sinks=True))
    assert len(made.run().tokenization.units) > 12
    add_index(made.run(), H, shards=SHARDS, metric="l2", n_lists=4)
    return made


@pytest.fixture
def index(made):
    [index] = open_indexes(made.run(), H)
    return index


def pid_of(ray, actor):
    return ray.get(actor.__ray_call__.remote(lambda group: os.getpid()))


def units_of(made, rows):
    return {row // made.run().tokenization.rows_per_unit for row in rows if row >= 0}


def queries(n=7):
    return np.random.default_rng(3).standard_normal((n, 12)).astype(np.float32)


def without_meta(result):
    return result.table.drop_columns("context").to_pydict()


@pytest.mark.parametrize("actors", [1, 2, None])
def test_actors_find_what_one_process_finds(ray, made, index, actors):
    options = RowOptions(where="n % 3 = 0")
    bits = read_row_bits(made.run(), H, options, index.shards, drop_zero_rows=False).bits
    few = {2: bits[2]}
    with RayShards(index, actors=actors) as shards:
        assert len(shards.actors) == (actors or 3)
        for given in (None, bits, few, {}):
            for k in (1, 5, 40, 10_000):
                found = shards.search(queries(), k, effort=4, bits=given)
                alone = LocalShards(index).search(queries(), k, effort=4, bits=given)
                assert found.rows.tolist() == alone.rows.tolist()
                assert found.scores.tobytes() == alone.scores.tobytes()
                assert found.lost == ()
        many = np.random.default_rng(5).standard_normal((3000, 12)).astype(np.float32)
        assert many.nbytes > 100 << 10
        alone = LocalShards(index).search(many, 3, effort=2)
        assert shards.search(many, 3, effort=2).rows.tolist() == alone.rows.tolist()


def test_every_shard_is_on_one_actor():
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = rng.integers(0, 100, rng.integers(1, 20)).tolist()
        n = int(rng.integers(1, len(sizes) + 1))
        dealt = deal_shards(sizes, n)
        assert sorted(number for numbers in dealt for number in numbers) == list(range(len(sizes)))
        loads = [sum(sizes[i] for i in numbers) for numbers in dealt]
        # Graham (1969): the heaviest has at most the mean and one shard more.
        assert max(loads) <= sum(sizes) / n + max(sizes)


def test_questions_through_actors(ray, made, index):
    run = made.run()
    row = next(t.row for t in made.tokens if t.doc_id == 20 and t.window_position == 3)
    with RayShards(index, actors=2) as shards:
        for options in ({}, {"where": "source = 'book'"}, {"fold": "doc"}, {"exclude_own_document": True}):
            through = run.nearest(H, row, 15, metric="l2", shards=shards, **options)
            alone = run.nearest(H, row, 15, metric="l2", **options)
            assert through.meta.index["generations"][0]["effort"] is not None
            assert without_meta(through) == without_meta(alone)
            assert through.meta.index == alone.meta.index
            assert (through.meta.exact, through.meta.recall) == (alone.meta.exact, alone.meta.recall)
        together = run.nearest(H, queries(), 4, metric="l2", shards=shards)
        assert without_meta(together) == without_meta(run.nearest(H, queries(), 4, metric="l2"))
        through = run.knn_lm(row, 30, hook_point=H, interpolate=1, shards=shards)
        alone = run.knn_lm(row, 30, hook_point=H, interpolate=1)
        assert through.table.equals(alone.table)
        with pytest.raises(InvalidInputError, match="shards= has shards of index"):
            run.nearest(H, row, metric="cosine", shards=shards)


def search_while(shards, disturb):
    """Search in a thread while something is done to the actors; return what came of it."""
    outcome = []

    def search():
        try:
            outcome.append(shards.search(queries(), 8, effort=4))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=search)
    thread.start()
    disturb()
    thread.join(200)
    assert not thread.is_alive()
    return outcome[0]


def test_an_actor_killed_in_a_search_is_an_error_that_names_the_rows(ray, index):
    with RayShards(index, actors=3) as shards:
        alone = shards.search(queries(), 8, effort=4)
        (lost,), actor = next(iter(shards.actors.items()))
        pid = pid_of(ray, actor)
        os.kill(pid, signal.SIGSTOP)  # so that the search cannot end before the kill
        error = search_while(shards, lambda: os.kill(pid, signal.SIGKILL))
        assert isinstance(error, StorageError)
        assert error.kind is ErrorKind.WORKER_FAILED
        units = ", ".join(f"{a} to {b - 1}" for a, b in SHARDS[lost])
        assert f"shard {lost} of units {units}" in error.message
        assert f"{index.shards[lost].n} rows were not searched" in error.message
        # Another actor has taken its place.
        again = shards.search(queries(), 8, effort=4)
        assert again.rows.tolist() == alone.rows.tolist()


def test_a_part_of_an_answer_says_that_it_is_one(ray, made, index):
    run = made.run()
    with RayShards(index, actors=3, on_lost="partial") as shards:
        (lost,), actor = list(shards.actors.items())[1]
        pid = pid_of(ray, actor)
        os.kill(pid, signal.SIGSTOP)
        found = search_while(shards, lambda: os.kill(pid, signal.SIGKILL))
        assert found.lost == (lost,)
        gone = {u for a, b in SHARDS[lost] for u in range(a, b)}
        others = {n: full_bits(shard) for n, shard in enumerate(index.shards) if n != lost}
        rest = LocalShards(index).search(queries(), 8, effort=4, bits=others)
        assert found.rows.tolist() == rest.rows.tolist()
        assert not units_of(made, found.rows.ravel().tolist()) & gone
        again = shards.search(queries(), 8, effort=4)
        assert again.lost == ()

        # The same through a question: the rows that no index has, and those of the other shards.
        pid = pid_of(ray, shards.actors[lost,])
        os.kill(pid, signal.SIGSTOP)
        outcome = []
        ask = threading.Thread(
            target=lambda: outcome.append(
                run.nearest(H, queries()[0], 12, metric="l2", fold=None, shards=shards)
            )
        )
        ask.start()
        os.kill(pid, signal.SIGKILL)
        ask.join(200)
        [part] = outcome
        assert not part.meta.exact
        assert part.meta.recall is None
        assert any("part of the answer" in w and str(index.shards[lost].n) in w for w in part.meta.warnings)
        [told] = part.meta.index["generations"]
        assert told["lost_shards"] == [lost]
        keep = [r for u in range(len(run.tokenization.units)) if u not in gone for r in rows_of_unit(run, u)]
        wanted = run.nearest(H, queries()[0], 12, metric="l2", fold=None, exact=True, rows=keep)
        assert part.table["row"].to_pylist() == wanted.table["row"].to_pylist()


def full_bits(shard):
    return np.packbits(np.ones(shard.n, bool), bitorder="little")


def rows_of_unit(run, unit):
    step = run.tokenization.rows_per_unit
    return run.activations(H).rows(unit * step, (unit + 1) * step).tolist()


def test_an_actor_that_hangs_is_given_up(ray, index):
    alone = LocalShards(index).search(queries(), 8, effort=4)
    with RayShards(index, actors=2, timeout_s=10) as shards:
        actor = next(iter(shards.actors.values()))
        os.kill(pid_of(ray, actor), signal.SIGSTOP)
        with pytest.raises(StorageError, match=r"did not answer \(GetTimeoutError\)"):
            shards.search(queries(), 8, effort=4)
        for _ in range(20):  # the first searches may find its successor still opening
            try:
                again = shards.search(queries(), 8, effort=4)
                break
            except StorageError:
                continue
        assert again.rows.tolist() == alone.rows.tolist()
        assert actor not in shards.actors.values()


class DroppedByAnother(RayShards):
    """As if another thread gave up an actor after this one had seen to it that all are there."""

    def _place_actors(self, timeout_s):
        missing = super()._place_actors(timeout_s)
        if getattr(self, "drops", False):
            holder = self._holders[0]
            self._drop(holder, holder.actor)
            self.drops = False
        return missing


def test_an_actor_that_another_search_gave_up(ray, index):
    with DroppedByAnother(index, actors=3) as shards:
        alone = shards.search(queries(), 8, effort=4)
        [lost] = shards._holders[0].numbers
        shards.drops = True
        with pytest.raises(StorageError, match=f"rows were not searched .shard {lost} of units"):
            shards.search(queries(), 8, effort=4)
        assert shards.search(queries(), 8, effort=4).rows.tolist() == alone.rows.tolist()


def test_lost_shards_that_are_not_asked_are_not_missed(ray, index):
    with RayShards(index, actors=3) as shards:
        [((lost,), actor), ((other,), _), _] = shards.actors.items()
        bits = {other: full_bits(index.shards[other])}
        ray.kill(actor)
        found = shards.search(queries(), 5, effort=4, bits=bits)
        assert lost != other
        assert (
            found.rows.tolist() == LocalShards(index).search(queries(), 5, effort=4, bits=bits).rows.tolist()
        )


def test_actors_have_names_and_reserve_processors(ray, index):
    with RayShards(index, actors=2, cpus_per_actor=3):
        names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
        mine = [name for name in names if name.startswith(f"actstore-shards:{index.id}:")]
        assert len(mine) == len(set(mine)) == 2
        with pytest.raises(StorageError, match=r"1 of 1 actors of 1 CPUs did not open .* CPU 6"):
            RayShards(index, actors=1, start_timeout_s=3)
    with RayShards(index, actors=1) as shards:
        assert list(shards.actors) == [(0, 1, 2)]


def test_damaged_files_are_found_when_they_are_opened(ray, tmp_path):
    made = make_store(str(tmp_path / "b.store"), seed=2, n_documents=30)
    add_run(made, "run", WIDTHS, random_values(3, WIDTHS))
    add_index(made.run(), H, shards=[[(0, 2)], [(2, 4)]], n_lists=2)
    [index] = open_indexes(made.run(), H)
    path = index.shards[1].file()
    with open(path, "r+b") as file:
        file.seek(200)
        file.write(b"damage")
    with pytest.raises(FormatError) as caught:
        RayShards(index, actors=2)
    assert caught.value.kind is ErrorKind.OBJECT_DAMAGED


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"actors": 0}, "actors must be"),
        ({"actors": 1.5}, "actors must be"),
        ({"cpus_per_actor": 0}, "cpus_per_actor must be"),
        ({"on_lost": "ignore"}, "'error', 'partial'"),
        ({"timeout_s": 0}, "timeout_s must be"),
        ({"start_timeout_s": float("nan")}, "start_timeout_s must be"),
    ],
)
def test_bad_options(index, options, message):
    with pytest.raises(InvalidInputError, match=message):
        RayShards(index, **options)


def test_stores_of_one_process_and_closed_shards(ray, index):
    made = make_store("memory://ray-shards", seed=2, n_documents=30)
    add_run(made, "run", WIDTHS, random_values(3, WIDTHS))
    add_index(made.run(), H, shards=[[(0, 2)]], n_lists=2)
    [lonely] = open_indexes(made.run(), H)
    with pytest.raises(InvalidInputError, match="lives in one process"):
        RayShards(lonely)
    shards = RayShards(index, actors=1)
    shards.close()
    shards.close()
    assert shards.actors == {}
    with pytest.raises(InvalidInputError, match="were closed"):
        shards.search(queries(), 5, effort=4)
    assert ray.is_initialized()


def test_a_group_needs_no_ray(index):
    group = ShardGroup(IndexPlace.of(index), [0, 2])
    assert group.open() == 2
    scores, rows = group.search(queries(), 6, 4, None)
    some = {n: full_bits(index.shards[n]) for n in (0, 2)}
    alone = LocalShards(index).search(queries(), 6, effort=4, bits=some)
    assert rows.tolist() == alone.rows.tolist()
    assert scores.tobytes() == alone.scores.tobytes()
