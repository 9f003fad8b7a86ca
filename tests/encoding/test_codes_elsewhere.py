"""Codes made on Ray, on an object store, and where a worker is killed: every object is that of one process on a disk."""

import os
import re
import shutil
import signal
import warnings
from dataclasses import dataclass

import pytest

import actstore
from actstore.cli import main
from actstore.ingest import import_corpus
from actstore.ingest import run as run_ingest
from actstore.ingest.encoding.codes_job import CodesTask
from actstore.ingest.encoding.encode import encode, prepare_codes
from actstore.ingest.encoding.plan import KIND, CodesSettings, codes_plan
from actstore.ingest.ray_backend import RayBackend
from actstore.ingest.unit_job import run_unit_job
from actstore.log import fsck
from actstore.log.canonical import canonical_json
from actstore.storage import open_storage
from tests.encoding import codes_host
from tests.encoding.encoded import add_dictionary as add_relu
from tests.encoding.test_keep_codes import RESID, CodesBackend, add_dictionary
from tests.ingest import synthetic, tiny_models
from tests.s3_server import S3Server

pytestmark = [
    pytest.mark.timeout(400),
    # Ray's own imports and sockets warn; what is tested here is what is stored.
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
    ),
]

WORKERS = 2


@pytest.fixture(scope="module")
def ray():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
        from ray import cloudpickle

        ray.init(address="local", num_cpus=WORKERS, include_dashboard=False, log_to_driver=False)
        for module in (synthetic, codes_host):  # workers do not have the tests on their path
            cloudpickle.register_pickle_by_value(module)
        yield ray
        for module in (synthetic, codes_host):
            cloudpickle.unregister_pickle_by_value(module)
        ray.shutdown()


@pytest.fixture(scope="module")
def s3():
    with S3Server() as server:
        yield server


@dataclass
class Base:
    """A store to begin from: a tokenized corpus, a dictionary, and a run of dense rows."""

    folder: object
    tokenizer: str

    @property
    def url(self) -> str:
        return str(self.folder / "base")

    def config(self, model="synthetic", **changes):
        settings = {
            "run": "r", "keep": ("dense", "pooled", "codes"), "dictionary": ("a",), "model": str(model),
            "commit_units": 1, "commit_interval_s": 0.0, "straggler_factor": 0,
        }  # fmt: skip
        return synthetic.config(self.tokenizer, **{**settings, **changes})

    def copy(self, url: str, storage_options=None):
        """Put a copy elsewhere, object by object, and open it."""
        source = open_storage(self.url)
        target = open_storage(url, create=True, storage_options=storage_options)
        for key in source.list(""):
            target.put_new(key, [source.get(key)])
        return actstore.open(url, storage_options=storage_options)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    made = Base(folder, synthetic.make_corpus(str(folder / "base"), folder / "tokenizer"))
    store = actstore.open(made.url)
    add_dictionary(store, "a", RESID)
    dense = made.config(run="dense", keep=("dense",), dictionary=())
    assert run_ingest(store, dense, backend=synthetic.SyntheticBackend()).is_complete
    return made


@pytest.fixture(scope="module")
def undisturbed(base):
    """Everything in the store after both ways to codes, in one process on a disk."""
    shutil.copytree(base.url, base.folder / "undisturbed")
    store = actstore.open(str(base.folder / "undisturbed"))
    assert run_ingest(store, base.config(), backend=CodesBackend()).is_complete
    assert encode(store, "a", "dense").is_complete
    found = everything(store)
    assert {(kind, id) for kind, id in found if kind in ("codes", "postings")} == {
        (kind, id) for kind in ("codes", "postings") for id in ("a@r", "a@dense")
    }
    return found


def everything(store) -> dict:
    """Each collection with every unit's rows and meta, and every object's length and SHA-256; not attempts, times, versions."""
    store.refresh()
    assert not fsck(store.storage, deep=True).problems

    def plain(value):
        return re.sub(rb"[0-9a-f]{32}(?=\.)", b"*", canonical_json(value))

    def listed(objects):
        return sorted((plain(o.key), o.nbytes, o.sha256) for o in objects)

    found = {}
    for name, collection in store.state.collections.items():
        assert collection.is_sealed, name
        units = {u: (x.rows, plain(x.meta), listed(x.objects)) for u, x in collection.units.items()}
        found[name] = (
            plain(collection.config), units, listed(collection.seal.objects), plain(collection.seal.meta)
        )  # fmt: skip
    return found


def kill_one(folder, at: int):
    """Kill the busiest worker at the first progress with so many units done; say whom."""
    killed = []

    def progress(p):
        if not killed and p.units_done >= at:
            killed.append(codes_host.busiest(folder))
            os.kill(killed[0], signal.SIGKILL)

    return killed, progress


def on_ray(base, store, folder):
    """Both ways on Ray, with a worker killed in each."""
    folder.mkdir()
    asked = base.config(folder, ray_address="local", workers=WORKERS)
    killed, progress = kill_one(folder, 3)
    report = run_ingest(
        store, asked, backend=RayBackend(asked, store, host=codes_host.CodesHost), progress=progress
    )
    assert killed
    assert report.is_complete
    assert report.retries >= 1, "the units that the worker had were not run again"

    pids = folder / "encode"
    pids.mkdir()
    collection = prepare_codes(store, "a", "dense", CodesSettings())
    run = store.run("dense").collection
    killed, progress = kill_one(pids, 3)
    outcome = run_unit_job(
        store, kind=KIND, id=collection.id, pending=sorted(run.units), rows_of=lambda u: run.units[u].rows,
        task=codes_host.SlowTask(CodesTask(codes_plan(collection), "cpu", 1 << 20), str(pids)),
        ray_address="local", workers=WORKERS, commit_units=1, commit_interval_s=0.0, progress=progress,
    )  # fmt: skip
    assert killed
    assert outcome.counters.retries + outcome.counters.copies >= 1
    assert outcome.counters.committed == len(run.units)
    report = encode(store, "a", "dense", ray_address="local", workers=WORKERS, device="cpu")
    assert (report.is_complete, report.has_postings, report.units_this_job) == (True, True, 0)


@pytest.mark.ray
def test_on_ray_with_killed_workers(base, undisturbed, ray):
    store = base.copy(str(base.folder / "ray"))
    on_ray(base, store, base.folder / "ray-pids")
    assert everything(store) == undisturbed


@pytest.mark.s3
def test_on_an_object_store(base, undisturbed, s3):
    store = base.copy(f"s3://{s3.make_bucket()}/a.store", s3.storage_options)
    assert run_ingest(store, base.config(), backend=CodesBackend()).is_complete
    assert encode(store, "a", "dense").is_complete
    assert everything(store) == undisturbed


@pytest.mark.ray
@pytest.mark.s3
def test_on_ray_and_an_object_store_with_killed_workers(base, undisturbed, ray, s3):
    store = base.copy(f"s3://{s3.make_bucket()}/a.store", s3.storage_options)
    on_ray(base, store, base.folder / "ray-s3-pids")
    assert everything(store) == undisturbed


@pytest.mark.ray
def test_the_command_line_on_ray_stores_what_it_stores_here(base, ray):
    """A real model in an actor, and the encoding of stored rows, against one process."""
    url = str(base.folder / "model")
    store = actstore.open(url, create=True)
    import_corpus(store, "c", ["The quick brown fox jumps over the lazy dog.", "x", "A list of lists. " * 30])
    common = [
        "ingest", url, "--corpus", "c", "--model", tiny_models.cached("gpt2"), "--hook-points", "layers.0.resid_post",
        "--device", "cpu", "--json",
    ]  # fmt: skip
    assert main([*common, "--no-ray", "--run", "dense"]) == 0
    add_relu(store.refresh(), width=store.run("dense").d_model("layers.0.resid_post"))
    codes = ["--keep", "codes", "--dictionary", "sae"]
    assert main([*common, *codes, "--no-ray", "--run", "here"]) == 0
    assert main([*common, *codes, "--ray-address", "local", "--run", "there"]) == 0
    assert main(["sae", "encode", url, "sae", "dense", "--workers", "2", "--json"]) == 0
    store.refresh()
    assert store.run("there").codes("sae").n_codes > 0
    for kind in ("codes", "postings"):
        found = [
            {
                u: (x.rows, dict(x.meta), [o.sha256 for o in x.objects])
                for u, x in store.state.collection(kind, f"sae@{run}").units.items()
            }
            for run in ("here", "there", "dense")
        ]
        assert found[0] == found[1] == found[2]
        assert found[0]
