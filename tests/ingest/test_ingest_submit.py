"""An ingest as a Ray Job, on a real job server that asks for a token; and what of it can be tested without."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

import actstore
from actstore.errors import ConflictError, ErrorKind, InvalidInputError, StorageError
from actstore.ingest import IngestConfig, import_corpus
from actstore.ingest.submit import (
    _MAX_ENTRYPOINT_BYTES,
    _attempt,
    cluster_config,
    cluster_store,
    follow,
    make_entrypoint,
    open_client,
    submission_prefix,
    submit_ingest,
)
from tests.ingest import synthetic, tiny_models

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "a-token-that-must-not-be-printed-0123456789"


def config(**changes):
    return IngestConfig(**{"corpus": "c", "model": "m", "hook_points": ["embed"], "run": "r", **changes})


@pytest.mark.parametrize(
    "address",
    [
        "",
        "auto",
        "127.0.0.1:8265",
        "ray://h:10001",
        "file:///etc/passwd",
        "os://x",
        "http://",
        "http://u:p@h:8265",
        "http://h/?q=1",
    ],
)
def test_an_address_is_only_ever_http(address):
    with pytest.raises(InvalidInputError, match="http://host:8265") as caught:
        open_client(address)
    assert "p@h" not in str(caught.value)


def test_nobody_there_is_said(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    # What is set for another cluster must not be asked instead, and stays set.
    monkeypatch.setenv("RAY_ADDRESS", "http://192.0.2.1:1")
    with pytest.raises(StorageError, match=f"job server at 'http://127.0.0.1:{port}' cannot be used"):
        open_client(f"http://127.0.0.1:{port}")
    assert "RAY_API_SERVER_ADDRESS" not in os.environ


def test_folders_are_given_by_their_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    asked = cluster_config(config(model="model", tokenizer="hub/name", ray_address="local"))
    assert (asked.model, asked.tokenizer, asked.ray_address) == (str(tmp_path / "model"), "hub/name", "auto")
    assert cluster_store("my.store") == str(tmp_path / "my.store")
    assert cluster_store("s3://bucket/my.store") == "s3://bucket/my.store"
    with pytest.raises(InvalidInputError, match="memory:// store lives in one process"):
        cluster_store("memory://x")
    with pytest.raises(InvalidInputError, match="credentials as storage_options") as caught:
        cluster_store("s3://key:secret@bucket/x")
    assert "secret" not in str(caught.value)


def test_a_command_is_bounded_and_has_no_zero_byte():
    with pytest.raises(InvalidInputError, match="name hook points by patterns") as caught:
        make_entrypoint("/s", config(hook_points=["x" * _MAX_ENTRYPOINT_BYTES]), python="python")
    assert caught.value.kind is ErrorKind.TOO_LARGE
    with pytest.raises(InvalidInputError, match="zero byte"):
        make_entrypoint("/s", config(model="a\0b"), python="python")


def test_attempts_of_one_run_count_and_others_do_not():
    prefix = submission_prefix("s3://bucket/s", "run@1")
    assert _attempt(prefix, f"{prefix}12") == 12
    for other in (None, "", prefix, f"{prefix}x", f"{prefix}1x", "raysubmit_abc", f"{prefix}²"):
        assert _attempt(prefix, other) == 0
    assert submission_prefix("s3://bucket/s", "run-1") != prefix
    assert submission_prefix("s3://bucket/t", "run@1") != prefix


class BrokenLines:
    """A job server whose connections break: each tail gives a part of the log, some of it again."""

    def __init__(self, log, cuts, *, whole_at_end):
        self.log, self.cuts, self.whole_at_end, self.asked = log, list(cuts), whole_at_end, 0

    async def tail_job_logs(self, _id):
        cut = self.cuts.pop(0) if self.cuts else None
        for start in range(0, len(self.log) if cut is None else cut, 7):
            stop = min(start + 7, len(self.log) if cut is None else cut)
            await asyncio.sleep(0)
            yield self.log[start:stop]
        if cut is not None:
            raise RuntimeError("WebSocket connection closed unexpectedly")

    def get_job_logs(self, _id):
        return self.log if self.whole_at_end else ""

    def get_job_info(self, _id):
        status = "RUNNING" if self.cuts else "SUCCEEDED"
        return SimpleNamespace(status=status, message="done", driver_exit_code=0)


@pytest.mark.parametrize("whole_at_end", [True, False])
def test_a_log_is_printed_once_whatever_breaks(monkeypatch, whole_at_end):
    monkeypatch.setattr("actstore.ingest.submit._POLL_S", 0.0)
    log = "".join(f"line {i}\n" for i in range(40))
    printed = []
    found = follow(BrokenLines(log, [0, 13, 100, 60], whole_at_end=whole_at_end), "j", write=printed.append)
    assert "".join(printed) == (log if whole_at_end else log[:100])
    assert (found.status, found.exit_code) == ("SUCCEEDED", 0)
    printed.clear()
    follow(BrokenLines(log, [], whole_at_end=False), "j", write=printed.append)
    assert "".join(printed) == log


class JobServer:
    """Keeps jobs as a job server does: an id is taken once, whoever was first."""

    def __init__(self):
        self.jobs, self.rivals = {}, []

    def list_jobs(self):
        return list(self.jobs.values())

    def submit_job(self, *, entrypoint, submission_id, runtime_env, metadata):
        if self.rivals:
            self.add(submission_id, self.rivals.pop(), "RUNNING")
        if submission_id in self.jobs:
            raise RuntimeError(f"Request failed: Job with submission_id {submission_id} already exists.")
        assert TOKEN not in json.dumps([entrypoint, runtime_env, metadata])
        return self.add(submission_id, entrypoint, "PENDING")

    def add(self, submission_id, entrypoint, status):
        job = SimpleNamespace(submission_id=submission_id, entrypoint=entrypoint, status=status)
        self.jobs[submission_id] = job
        return submission_id


def test_the_same_submission_is_one_job_until_it_ends(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    server, prefix = JobServer(), submission_prefix("s3://bucket/s", "r")
    server.add(None, "something else", "RUNNING")
    server.add("raysubmit_x", "something else", "RUNNING")
    first = submit_ingest(server, "s3://bucket/s", config())
    assert first.submission_id == f"{prefix}1"
    assert first.is_new
    again = submit_ingest(server, "s3://bucket/s", config())
    assert (again.submission_id, again.is_new) == (f"{prefix}1", False)
    with pytest.raises(InvalidInputError, match=r"with other settings .* stop it first"):
        submit_ingest(server, "s3://bucket/s", config(batch_tokens=3))
    elsewhere = submit_ingest(server, "s3://bucket/other", config())
    assert elsewhere.is_new
    server.jobs[f"{prefix}1"].status = "FAILED"
    assert submit_ingest(server, "s3://bucket/s", config(batch_tokens=3)).submission_id == f"{prefix}2"
    server.jobs[f"{prefix}2"].status = "STOPPED"
    # Another process submits the same between looking and submitting: that one is followed.
    server.rivals = [make_entrypoint("s3://bucket/s", cluster_config(config()), python="python")]
    late = submit_ingest(server, "s3://bucket/s", config())
    assert (late.submission_id, late.is_new) == (f"{prefix}3", False)


def test_a_server_that_refuses_is_quoted():
    class Refuses(JobServer):
        def submit_job(self, **_):
            raise RuntimeError("Request failed with status code 500: no room\nTraceback ...")

    with pytest.raises(StorageError, match="refused: Request failed with status code 500: no room") as caught:
        submit_ingest(Refuses(), "s3://bucket/s", config())
    assert "Traceback" not in str(caught.value)


def free_ports(n):
    sockets = [socket.socket() for _ in range(n)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


@pytest.fixture(scope="module")
def cluster():
    """A head node with a job server on loopback that wants a token; its process group is ended at the end."""
    folder = tempfile.mkdtemp(prefix="asj", dir="/tmp")
    port, dashboard, client, agent, agent_grpc, env_agent = free_ports(6)
    environment = {
        **os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    process = subprocess.Popen(
        [
            str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
            f"--port={port}", "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
            f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
            f"--dashboard-agent-grpc-port={agent_grpc}", f"--runtime-env-agent-port={env_agent}", "--num-cpus=2",
            f"--temp-dir={folder}", "--object-store-memory=100000000", "--disable-usage-stats",
        ],
        env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for(lambda: answers(address), seconds=60)
        yield SimpleNamespace(address=address, environment=environment)
    finally:
        for number, patience in ((signal.SIGTERM, 4), (signal.SIGKILL, 10)):
            try:
                os.killpg(process.pid, number)
                process.wait(patience)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        shutil.rmtree(folder, ignore_errors=True)


def answers(address):
    request = urllib.request.Request(f"{address}/api/version", headers={"Authorization": f"Bearer {TOKEN}"})
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def wait_for(condition, *, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.2)


def submit(cluster, url, *words, environment=None, **options):
    command = [sys.executable, "-m", "actstore.cli", "ingest", url, *words, "--submit", cluster.address]
    command += ["--entrypoint-python", sys.executable]
    return subprocess.run(
        command,
        env=environment or cluster.environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        **options,
    )


@pytest.mark.ray
@pytest.mark.timeout(240)  # half a minute alone; two jobs start two Ray drivers each
def test_an_ingest_runs_as_a_job(cluster, tmp_path):
    url, model = str(tmp_path / "a store"), tiny_models.cached("gpt2")
    import_corpus(actstore.open(url, create=True), "c", synthetic.documents(20, seed=1))
    toml = tmp_path / "run.toml"
    toml.write_text(
        f"corpus = 'c'\nmodel = '{model}'\nhook_points = ['layers.*.resid_post']\nrun = 'job@1'\n"
        "rows_per_unit = 128\nwindow = 16\ndevice = 'cpu'\n"
    )
    words = ["--config", str(toml)]
    without = {k: v for k, v in cluster.environment.items() if not k.startswith("RAY_AUTH")}
    refused = submit(cluster, url, *words, environment={**without, "RAY_AUTH_MODE": "disabled"})
    assert refused.returncode == StorageError.exit_code, refused
    assert "RAY_AUTH_TOKEN" in refused.stderr

    done = submit(cluster, url, *words)
    assert done.returncode == 0, (done.stdout, done.stderr)
    prefix = submission_prefix(url, "job@1")
    assert f"submitted job {prefix}1: " in done.stdout
    assert "run job@1:" in done.stdout, "the job's own output"
    assert "succeeded" in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    run = actstore.open(url).run("job@1")
    assert run.is_complete
    assert run.n_rows == run.tokenization.n_rows

    # The same with a setting that the run contradicts is another job, and its error's exit code is this command's.
    other = submit(cluster, url, *words, "--batch-tokens", "64", "--json")
    assert json.loads(other.stdout)["submission_id"] == f"{prefix}2"
    assert other.returncode == ConflictError.exit_code, (other.stdout, other.stderr)
    assert "batch_tokens: 8192 -> 64" in other.stderr
