"""Where a job's workers go, and that a worker keeps to the run it was given; without Ray."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import actstore
from actstore.ingest import IngestConfig, import_corpus
from actstore.ingest import run as run_ingest
from actstore.ingest.backend import LocalBackend
from actstore.ingest.host import Job, ModelHost
from actstore.ingest.placement import actor_options
from actstore.ingest.unit import RunPlan
from actstore.log import fsck
from tests.ingest import synthetic, tiny_models

NODES = st.lists(
    st.fixed_dictionaries(
        {"CPU": st.integers(1, 96).map(float)}, optional={"GPU": st.integers(1, 8).map(float)}
    ),
    min_size=1,
    max_size=6,
)


def placed(nodes, options):
    """Actors that fit, by taking them off the nodes one at a time in Ray's ten-thousandths."""
    asked = {"CPU": options["num_cpus"], "GPU": options.get("num_gpus", 0.0)}
    count = 0
    for node in nodes:
        left = {name: round(node.get(name, 0.0) * 10_000) for name in asked}
        while all(left[name] >= round(asked[name] * 10_000) for name in asked) and count < 10_000:
            left = {name: left[name] - round(asked[name] * 10_000) for name in asked}
            count += 1
    return count


@settings(max_examples=300, deadline=None)
@given(nodes=NODES, workers=st.integers(1, 40), device=st.sampled_from(["auto", "cpu", "cuda"]))
def test_all_workers_fit_at_once_and_none_asks_for_more_than_a_node_has(nodes, workers, device):
    options = actor_options(nodes, workers=workers, device=device)
    with_gpu = [node for node in nodes if "GPU" in node] if device != "cpu" else []
    if device == "cuda" and not with_gpu:  # an autoscaler may bring some
        assert options == {"num_cpus": 1.0, "num_gpus": 1.0}
        return
    assert placed(nodes, options) >= workers
    assert ("num_gpus" in options) == bool(with_gpu)
    assert 0 < options.get("num_gpus", 1.0) <= 1.0
    n_gpus = sum(node["GPU"] for node in with_gpu)
    if n_gpus >= workers:
        assert options["num_gpus"] == 1.0
    # One more CPU each, and they would not all fit.
    if options["num_cpus"] >= 1:
        assert placed(with_gpu or nodes, {**options, "num_cpus": options["num_cpus"] + 1}) < workers


@pytest.mark.parametrize(
    ("nodes", "workers", "device", "expected"),
    [
        ([{"CPU": 4.0}] * 3, 1, "auto", {"num_cpus": 4.0}),  # not 12, which no node has
        ([{"CPU": 4.0}] * 3, 2, "auto", {"num_cpus": 4.0}),  # not 6
        ([{"CPU": 1.0}] * 2, 3, "auto", {"num_cpus": 0.5}),  # not 0.67, which fits twice
        (
            [{"CPU": 8.0, "GPU": 3.0}],
            4,
            "cuda",
            {"num_cpus": 2.0, "num_gpus": 0.5},
        ),  # not 0.75, which fits 3 times
        ([{"CPU": 64.0}, {"CPU": 8.0, "GPU": 2.0}], 2, "auto", {"num_cpus": 4.0, "num_gpus": 1.0}),
        ([{"CPU": 8.0, "GPU": 2.0}], 2, "cpu", {"num_cpus": 4.0}),
        ([{}], 2, "auto", {"num_cpus": 1.0}),
    ],
)
def test_shares_of_some_clusters(nodes, workers, device, expected):
    assert actor_options(nodes, workers=workers, device=device) == expected


@settings(max_examples=300, deadline=None)
@given(
    nodes=NODES, workers=st.integers(1, 40), gpus=st.integers(1, 4), device=st.sampled_from(["auto", "cuda"])
)
def test_gpus_asked_for_are_reserved_whole(nodes, workers, gpus, device):
    options = actor_options(nodes, workers=workers, device=device, gpus_per_worker=gpus)
    assert options["num_gpus"] == gpus
    room = sum(int(node.get("GPU", 0)) // gpus for node in nodes)
    assert placed(nodes, options) >= min(workers, room), "CPUs keep workers from GPUs that are free"
    assert actor_options(nodes, workers=workers, device="auto", gpus_per_worker=0) == actor_options(
        nodes, workers=workers, device="cpu"
    )


def test_a_gpu_asked_for_by_number_is_visible_to_its_worker():
    nodes = [{"CPU": 64.0}, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 4.0}]
    options = actor_options(nodes, workers=1, device="cuda:1")
    assert options["num_gpus"] == 1.0
    assert options["num_cpus"] == 8.0
    assert options["runtime_env"]["env_vars"] == {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
    assert "runtime_env" not in actor_options(nodes, workers=1, device="cuda")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("backend") / "store")
    import_corpus(url, "texts", synthetic.documents(12, seed=1))
    return url


def asked(run: str) -> IngestConfig:
    return IngestConfig(
        corpus="texts", model=tiny_models.cached("gpt2"), hook_points=["layers.0.resid_post"], run=run,
        rows_per_unit=128, device="cpu", ray_address=None,
    )  # fmt: skip


def test_one_backend_keeps_two_runs_of_one_configuration_apart(texts):
    backend = LocalBackend(asked("one"))
    for name in ("one", "two"):
        assert run_ingest(texts, asked(name), backend=backend).is_complete
    store = actstore.open(texts)
    for name in ("one", "two"):
        collection = store.run(name).collection
        assert all(o.key.startswith(f"runs/{name}/") for u in collection.units.values() for o in u.objects)
    assert (
        store.run("one").activations("layers.0.resid_post")[:]
        == store.run("two").activations("layers.0.resid_post")[:]
    ).all()
    assert fsck(store.storage, deep=True).is_clean


def test_a_worker_opens_the_store_once_for_all_units(texts):
    run_ingest(texts, asked("model"))
    store = actstore.open(texts)
    run = store.run("model")
    specs = {"layers.0.resid_post": run.activations("layers.0.resid_post").layout.spec}
    plan = RunPlan("model", run.collection.fingerprint, 1, run.tokenization.id, specs, 128, "error")
    opened = []

    class Watched(Job):
        def open_store(self):
            opened.append(self.url)
            return super().open_store()

    host = ModelHost(asked("model"), threads=None)
    units = [u.unit for u in run.tokenization.units]
    assert len(units) > 1
    for unit in units:
        # A new but equal job each time: what Ray makes of one that it stored.
        written = host.run_job_unit(Watched(store.url, store.version, None, plan), unit)
        stored = run.collection.units[unit]
        assert [o for o in written.objects if "/c/" in o.key] == [o for o in stored.objects if "/c/" in o.key]
    assert opened == [store.url]
