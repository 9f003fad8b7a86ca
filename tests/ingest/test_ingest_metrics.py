"""The numbers of a job, as Ray's agent serves them to Prometheus."""

import time
import urllib.request
import warnings

import pytest

from actstore.ingest import run as run_ingest
from actstore.ingest.events import METRICS, Collector
from tests.ingest import synthetic

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings(
        "ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
    ),
]


@pytest.fixture(scope="module")
def agent(monkeypatch_module):
    """Address of the metrics of a Ray that this process drives."""
    monkeypatch_module.setenv("RAY_metrics_report_interval_ms", "500")  # ten seconds otherwise
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray

        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
        (node,) = ray.nodes()
        yield f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        ray.shutdown()


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def scrape(address: str, run: str) -> dict[str, float]:
    """Samples of actstore with that run, by name and labels other than the run."""
    found = {}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for line in opener.open(address, timeout=10).read().decode().splitlines():
        if "actstore_ingest_" in line and f'run="{run}"' in line:
            name, _, value = line.rpartition(" ")
            name, _, labels = name.partition("{")
            stage = labels.partition('stage="')[2].partition('"')[0]
            bound = labels.partition('le="')[2].partition('"')[0]
            found[":".join(filter(None, (name, stage, bound)))] = float(value)
    return found


def test_prometheus_sees_what_the_collector_saw(agent, tmp_path):
    url = str(tmp_path / "store")
    tokenizer = synthetic.make_corpus(url, tmp_path / "tokenizer", n_documents=30)
    collector = Collector()
    report = run_ingest(
        url, synthetic.config(tokenizer), backend=synthetic.SyntheticBackend(), collector=collector
    )
    wanted = {
        "ray_actstore_ingest_tokens_committed_total": report.n_rows,
        "ray_actstore_ingest_tokens_forwarded_total": report.n_rows,
        "ray_actstore_ingest_units_committed_total": report.n_units,
        "ray_actstore_ingest_bytes_written_total": report.counters.nbytes,
        "ray_actstore_ingest_unit_seconds_count:all": report.n_units,
        "ray_actstore_ingest_unit_seconds_count:forward": report.n_units,
        "ray_actstore_ingest_workers": 1,
        "ray_actstore_ingest_commit_backlog": 0,
        "ray_actstore_ingest_units_in_flight": 0,
    }
    deadline = time.monotonic() + 60
    found = {}
    while {name: found.get(name) for name in wanted} != wanted and time.monotonic() < deadline:
        time.sleep(0.25)
        found = scrape(agent, "syn")
    assert {name: found.get(name) for name in wanted} == wanted
    n_commits = found["ray_actstore_ingest_commit_seconds_count"]
    assert n_commits == found["ray_actstore_ingest_commit_seconds_bucket:+Inf"] >= 1
    for name, value in found.items():
        base = name.removeprefix("ray_actstore_ingest_").split(":")[0]
        assert any(
            base.removesuffix(end) in METRICS for end in ("", "_total", "_bucket", "_count", "_sum")
        ), name
        assert value >= 0
