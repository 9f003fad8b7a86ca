"""The job on Ray: any number of workers gives the same store, and a killed actor costs nothing."""

import threading
import warnings

import pytest

import actstore
from actstore.ingest import IngestConfig, import_corpus
from actstore.ingest import run as run_ingest
from actstore.ingest.backend import RayBackend
from actstore.log import fsck
from tests.ingest import synthetic, tiny_models

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(400),
    # Ray's own imports and sockets warn; what is tested here is what is stored.
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
    ),
    pytest.mark.xdist_group("ray"),
]


@pytest.fixture(scope="module")
def ray():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray

        ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
        yield ray
        ray.shutdown()


@pytest.fixture(scope="module")
def store_url(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("ray") / "store")
    store = actstore.open(url, create=True)
    import_corpus(store, "texts", synthetic.documents(80))
    return url


def config(**changes):
    settings = {
        "corpus": "texts",
        "model": tiny_models.cached("gpt2"),
        "hook_points": ["layers.*.resid_post", "layers.1.mlp_act"],
        "run": "r",
        "rows_per_unit": 128,
        "batch_tokens": 256,
        "device": "cpu",
    }
    return IngestConfig(**{**settings, **changes})


def content(url, run):
    found = synthetic.content(actstore.open(url), run)
    return {
        u: (rows, bad, tuple((n, s) for _, n, s in objects))
        for u, (rows, bad, objects) in found["units"].items()
    }


@pytest.fixture(scope="module")
def undisturbed(store_url):
    """One process, no Ray."""
    assert run_ingest(store_url, config(run="alone", ray_address=None)).is_complete
    return content(store_url, "alone")


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_any_number_of_workers_gives_the_same_store(ray, store_url, undisturbed, workers):
    report = run_ingest(store_url, config(run=f"w{workers}", workers=workers))
    assert report.is_complete
    assert report.n_units == len(undisturbed)
    assert content(store_url, f"w{workers}") == undisturbed


def test_killed_actors_are_replaced_and_their_units_run_again(ray, store_url, undisturbed):
    asked = config(run="killed", workers=2, commit_units=1, commit_interval_s=0.0, max_attempts=10)
    backend = RayBackend(asked, actstore.open(store_url))
    kills = []

    def kill_one(progress):
        if len(kills) < 3:
            victim = backend._actors[len(kills) % 2]
            ray.kill(victim, no_restart=False)
            kills.append(progress.units_done)

    report = run_ingest(store_url, asked, backend=backend, progress=kill_one)
    assert len(kills) == 3
    assert report.is_complete
    assert content(store_url, "killed") == undisturbed
    assert fsck(actstore.open(store_url).storage, deep=True).is_clean


def test_stop_ends_cleanly_and_the_same_job_goes_on(ray, store_url, undisturbed):
    stop = threading.Event()
    asked = config(run="stopped", workers=1, commit_units=1, commit_interval_s=0.0)
    first = run_ingest(store_url, asked, stop=stop, progress=lambda p: stop.set())
    assert not first.is_complete
    assert 0 < first.n_units < len(undisturbed)
    second = run_ingest(store_url, asked)
    assert second.is_complete
    assert second.units_this_job == len(undisturbed) - first.n_units
    assert content(store_url, "stopped") == undisturbed


def test_errors_of_a_worker_reach_the_caller_as_themselves(ray, store_url):
    with pytest.raises(actstore.NotFoundError, match="resid_post"):
        run_ingest(store_url, config(run="bad", hook_points=["layers.0.resid_pst"]))
