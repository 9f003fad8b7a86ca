"""Jobs in which units fail for good, commits fail, or the process is told to end: what is committed, said and left open."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import actstore
from actstore.errors import ErrorKind, InvalidInputError, StorageError
from actstore.ingest import run as run_ingest
from actstore.ingest.events import Collector
from actstore.log import fsck
from tests.ingest import synthetic

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def made(tmp_path):
    url = str(tmp_path / "store")
    return url, synthetic.make_corpus(url, tmp_path / "tokenizer")


def ingest(url, tokenizer, backend=None, *, collector=None, stop=None, progress=None, **changes):
    return run_ingest(
        url, synthetic.config(tokenizer, **changes), backend=backend or synthetic.SyntheticBackend(),
        collector=collector, stop=stop, progress=progress,
    )  # fmt: skip


def failing(*units, error=lambda unit: InvalidInputError(ErrorKind.NON_FINITE, f"planted in {unit}")):
    def fault(unit):
        if unit in units:
            raise error(unit)

    return synthetic.SyntheticBackend(fault=fault)


def documents_of(url, unit):
    run = actstore.open(url).run("syn")
    return sorted(set(run.tokenization.unit_table(unit)["doc_id"].to_pylist()))


def rows_of(url, unit):
    return actstore.open(url).run("syn").tokenization.unit_table(unit).num_rows


def test_one_bad_unit_fails_the_job_at_its_end_and_names_its_documents(made):
    url, tokenizer = made
    with pytest.raises(
        InvalidInputError, match=r"1 of \d+ units of run 'syn' failed, 0 may be left out"
    ) as caught:
        ingest(url, tokenizer, failing(3))
    assert caught.value.kind is ErrorKind.NON_FINITE
    first = documents_of(url, 3)[0]
    assert f"unit 3 ({rows_of(url, 3)} rows, {len(documents_of(url, 3))} documents: {first}" in str(
        caught.value
    )
    assert "after 1 try: planted in 3" in str(caught.value)
    run = actstore.open(url).run("syn")
    assert sorted(set(range(len(run.tokenization.units))) - set(run.collection.units)) == [3]
    assert not run.is_complete
    assert ingest(url, tokenizer).units_this_job == 1
    synthetic.check_complete(actstore.open(url))


def test_so_many_units_as_are_allowed_are_left_out_and_listed(made):
    url, tokenizer = made
    collector = Collector()
    report = ingest(url, tokenizer, failing(1, 4), allow_failed=2, collector=collector)
    assert report.is_complete
    assert list(report.quarantined) == [1, 4]
    assert report.quarantined[4] == "InvalidInputError: planted in 4 [non-finite]"
    assert [(f.unit, f.rows, f.tries) for f in report.failures] == [(u, rows_of(url, u), 1) for u in (1, 4)]
    assert [f.n_documents for f in report.failures] == [len(documents_of(url, u)) for u in (1, 4)]
    assert report.counters.imbalance() is None
    assert report.counters.rows_failed == rows_of(url, 1) + rows_of(url, 4)
    assert collector.value("units_failed", kind="non-finite") == 2
    store = actstore.open(url)
    run = store.run("syn")
    assert run.is_complete
    assert set(run.collection.units) == set(range(report.n_units_planned)) - {1, 4}
    assert fsck(store.storage, deep=True).is_clean
    with pytest.raises(actstore.NotFoundError):
        run.activations("layers.0.resid_post")[64]
    again = ingest(url, tokenizer)
    assert again.quarantined == report.quarantined
    assert again.version == report.version


def test_one_more_than_allowed_fails_the_job(made):
    url, tokenizer = made
    with pytest.raises(InvalidInputError, match=r"3 of \d+ units of run 'syn' failed, 2 may"):
        ingest(url, tokenizer, failing(1, 4, 6), allow_failed=2)
    assert not actstore.open(url).run("syn").is_complete


def test_a_run_of_which_nothing_is_left_is_not_completed(tmp_path):
    url = str(tmp_path / "store")
    tokenizer = synthetic.make_corpus(url, tmp_path / "tokenizer", n_documents=5)
    n = len(actstore.open(url).state.collections)
    with pytest.raises(StorageError, match="nothing to seal"):
        ingest(url, tokenizer, failing(*range(10)), allow_failed=10)
    assert len(actstore.open(url).state.collections) == n + 1
    assert not actstore.open(url).run("syn").is_complete


def test_tries_are_counted_and_what_passes_is_tried_again(made):
    url, tokenizer = made
    seen = {}

    def error(unit):
        seen[unit] = seen.get(unit, 0) + 1
        if unit == 2 and seen[unit] == 3:
            return None
        return RuntimeError("the device is busy")

    def fault(unit):
        if unit in (2, 5) and (raised := error(unit)):
            raise raised

    report = ingest(url, tokenizer, synthetic.SyntheticBackend(fault=fault), allow_failed=1)
    assert seen == {2: 3, 5: 3}
    assert list(report.quarantined) == [5]
    assert (
        "unit 5 failed 3 times, the last time with RuntimeError: the device is busy" in report.quarantined[5]
    )
    assert report.retries == 4


def test_commits_that_fail_for_a_while_lose_nothing(made):
    url, tokenizer = made

    class Flaky(synthetic.SyntheticBackend):
        n = 0

        def commit(self, units):
            self.n += 1
            if self.n in (1, 2, 4):
                raise StorageError(ErrorKind.STORAGE_FAILED, "503 slow down")
            super().commit(units)

    collector = Collector()
    report = ingest(url, tokenizer, Flaky(), commit_units=4, retry_s=30.0, collector=collector)
    assert report.is_complete
    assert collector.value("commit_retries") == 3
    synthetic.check_complete(actstore.open(url))


def test_a_unit_whose_rows_were_not_all_seen_fails_the_job(made):
    url, tokenizer = made

    def lose(written):
        """A token of unit 2 was left out of the forward pass."""
        return dataclasses.replace(written, rows_forwarded=written.rows_forwarded - (written.unit == 2))

    with pytest.raises(StorageError, match=r"unit 2 has (\d+) token rows, but \1 were read") as caught:
        ingest(url, tokenizer, synthetic.SyntheticBackend(change=lose, threads=1))
    assert f"and {rows_of(url, 2) - 1} went through the model" in str(caught.value)
    assert 2 not in actstore.open(url).run("syn").collection.units


def test_the_numbers_of_a_job(made):
    url, tokenizer = made
    collector = Collector()
    report = ingest(url, tokenizer, collector=collector)
    n = report.n_rows
    assert collector.value("tokens_forwarded") == collector.value("tokens_committed") == n
    assert collector.value("units_committed", run="syn") == report.n_units
    assert collector.value("bytes_written") == report.counters.nbytes
    assert collector.value("units_failed") == collector.value("unit_retries") == 0
    assert collector.value("commit_backlog") == collector.value("units_in_flight") == 0
    assert set(report.timings_s) >= {"read", "forward", "encode", "write", "all"}
    assert report.timings_s["all"] == pytest.approx(collector.value("unit_seconds", stage="all"))
    assert 0 <= report.idle_share <= 1
    counters = report.counters
    assert (counters.planned, counters.written, counters.committed) == (report.n_units,) * 3
    assert (
        counters.rows_planned == counters.rows_read == counters.rows_forwarded == counters.rows_committed == n
    )
    assert json.loads(json.dumps(dataclasses.asdict(report)))["counters"]["committed"] == report.n_units


def test_log_lines_have_their_pairs(made, caplog):
    url, tokenizer = made
    with caplog.at_level("INFO", logger="actstore.ingest"):
        ingest(url, tokenizer, failing(3), allow_failed=1)
    events = [r.actstore for r in caplog.records if hasattr(r, "actstore")]
    assert events[0]["event"] == "begun"
    assert events[-1]["event"] == "ended"
    assert {e["unit"] for e in events if e["event"] == "unit_written"} == set(
        actstore.open(url).run("syn").collection.units
    )
    (failed,) = (r for r in caplog.records if getattr(r, "actstore", {}).get("event") == "unit_failed")
    assert failed.getMessage() == "unit_failed run=syn unit=3 tries=1 error='planted in 3 [non-finite]'"
    assert failed.levelname == "ERROR"


def test_nothing_is_printed_unless_logging_is_set_up(made):
    url, tokenizer = made
    code = (
        "import sys; from tests.ingest import synthetic, test_ingest_failures as t;"
        "t.ingest(sys.argv[1], sys.argv[2], t.failing(3), allow_failed=1)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, url, tokenizer],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout + done.stderr == ""


def child(url, tokenizer):
    """A job whose units 0 to 2 are quick and whose others hang until they are interrupted."""
    interrupted = threading.Event()

    def fault(unit):
        if unit > 2:
            print("hanging", flush=True)
            interrupted.wait(float(sys.argv[3]))

    try:
        backend = synthetic.SyntheticBackend(fault=fault, interrupt=interrupted.set)
        report = ingest(url, tokenizer, backend, commit_units=1, commit_interval_s=0.0)
        print("stopped" if not report.is_complete else "complete", report.n_units, flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)


def start_child(url, tokenizer, hang_s):
    code = "import sys; from tests.ingest import test_ingest_failures as t; t.child(sys.argv[1], sys.argv[2])"
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, url, tokenizer, str(hang_s)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    while process.stdout.readline().strip() != "hanging":
        assert process.poll() is None
    return process


def test_termination_finishes_the_units_that_run(made):
    url, tokenizer = made
    process = start_child(url, tokenizer, 2)
    process.send_signal(signal.SIGTERM)
    word, n = process.communicate(timeout=60)[0].split()[-2:]
    assert (word, process.returncode) == ("stopped", 0)
    assert 3 < int(n) <= 5
    assert len(actstore.open(url).run("syn").collection.units) == int(n)
    assert ingest(url, tokenizer).is_complete
    synthetic.check_complete(actstore.open(url))


def test_a_second_interrupt_stops_at_once(made):
    url, tokenizer = made
    process = start_child(url, tokenizer, 300)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None, "the first interrupt must let units end"
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0].split()[-1] == "interrupted"
    assert time.monotonic() - began < 30
    assert len(actstore.open(url).run("syn").collection.units) >= 2
    assert ingest(url, tokenizer).is_complete
    synthetic.check_complete(actstore.open(url))


def test_stopping_in_the_last_step_leaves_the_run_open(made):
    url, tokenizer = made
    stop = threading.Event()

    class Checked(synthetic.SyntheticBackend):
        def call(self, method, *args):
            raise AssertionError("asked for after the job was stopped")

    n = len(actstore.open(url).tokenization(actstore.open(url).tokenizations()[0].id).units)

    def progress(p):
        if p.units_done == n:
            stop.set()

    report = ingest(url, tokenizer, Checked(), self_check=1.0, stop=stop, progress=progress)
    assert not report.is_complete
    assert report.n_units == n
    assert ingest(url, tokenizer).is_complete
    assert os.path.exists(url)
