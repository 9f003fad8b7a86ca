"""The job on Ray: any number of workers gives the same store, and a killed actor costs nothing."""

import threading
import warnings

import pytest

import actstore
from actstore.ingest import IngestConfig, import_corpus
from actstore.ingest import run as run_ingest
from actstore.ingest.ray_backend import RayBackend
from actstore.log import fsck
from tests.ingest import synthetic, tiny_models

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(400),
    # Ray's own imports and sockets warn; what is tested here is what is stored.
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
    ),
]


@pytest.fixture(scope="module")
def ray():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
        from ray import cloudpickle

        ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
        cloudpickle.register_pickle_by_value(synthetic)  # workers do not have the tests on their path
        yield ray
        cloudpickle.unregister_pickle_by_value(synthetic)
        ray.shutdown()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray")
    url = str(folder / "store")
    return url, synthetic.make_corpus(url, folder / "tokenizer", n_documents=150)


@pytest.fixture(scope="module")
def undisturbed(made):
    """One process, no Ray."""
    url, tokenizer = made
    backend = synthetic.SyntheticBackend()
    assert run_ingest(url, synthetic.config(tokenizer, run="alone"), backend=backend).is_complete
    return units_of(url, "alone")


def units_of(url, run):
    """Rows and shard hashes of every unit, whatever the run's name."""
    found = synthetic.content(actstore.open(url), run)["units"]
    return {u: (rows, bad, tuple((n, s) for _, n, s in objects)) for u, (rows, bad, objects) in found.items()}


def ingest(url, tokenizer, *, progress=None, stop=None, **changes):
    asked = synthetic.config(tokenizer, ray_address="local", **changes)
    backend = RayBackend(asked, actstore.open(url), host=synthetic.SyntheticHost)
    watch = None if progress is None else lambda p: progress(backend, p)
    return run_ingest(url, asked, backend=backend, progress=watch, stop=stop)


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_any_number_of_workers_gives_the_same_store(ray, made, undisturbed, workers):
    url, tokenizer = made
    report = ingest(url, tokenizer, run=f"w{workers}", workers=workers)
    assert report.is_complete
    assert report.n_units == len(undisturbed)
    assert units_of(url, f"w{workers}") == undisturbed
    synthetic.check_complete(actstore.open(url), f"w{workers}")


def test_killed_actors_are_replaced_and_their_units_run_again(ray, made, undisturbed):
    url, tokenizer = made
    kills = []

    def kill_one(backend, progress):
        if len(kills) < 4:
            ray.kill(backend.workers.actors[len(kills) % 2], no_restart=False)
            kills.append(progress.units_done)

    report = ingest(
        url,
        tokenizer,
        run="killed",
        workers=2,
        commit_units=1,
        commit_interval_s=0.0,
        max_attempts=10,
        progress=kill_one,
    )
    assert len(kills) == 4
    assert report.is_complete
    assert units_of(url, "killed") == undisturbed
    assert fsck(actstore.open(url).storage, deep=True).is_clean


def test_stop_ends_cleanly_and_the_same_job_goes_on(ray, made, undisturbed):
    url, tokenizer = made
    stop = threading.Event()
    settings = {"run": "stopped", "workers": 1, "commit_units": 1, "commit_interval_s": 0.0}
    first = ingest(url, tokenizer, stop=stop, progress=lambda backend, p: stop.set(), **settings)
    assert not first.is_complete
    assert 0 < first.n_units < len(undisturbed)
    second = ingest(url, tokenizer, **settings)
    assert second.is_complete
    assert second.units_this_job == len(undisturbed) - first.n_units
    assert units_of(url, "stopped") == undisturbed


def test_a_real_model_in_an_actor_stores_what_it_stores_here(ray, made):
    url, _ = made
    import_corpus(url, "texts", synthetic.documents(40, seed=1))
    reports = []
    for name, address in (("here", None), ("there", "local")):
        asked = IngestConfig(
            corpus="texts", model=tiny_models.cached("gpt2"), hook_points=["layers.*.resid_post", "layers.1.mlp_act"], run=name,
            rows_per_unit=128, batch_tokens=256, device="cpu", ray_address=address,
        )  # fmt: skip
        reports.append(run_ingest(url, asked))
    assert all(r.is_complete for r in reports)
    assert units_of(url, "here") == units_of(url, "there")
    bad = IngestConfig(
        corpus="texts", model=tiny_models.cached("gpt2"), hook_points=["layers.0.resid_pst"], run="bad"
    )
    with pytest.raises(actstore.NotFoundError, match="resid_post"):
        run_ingest(url, bad)
