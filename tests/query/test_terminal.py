"""The command line where its output goes: pipes whose reader leaves, full disks, closed streams, poor encodings, signals."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from actstore.cli import main
from tests.query.make_store import add_run, make_store, random_values

H = "layers.0.resid_post"
ACTSTORE = [sys.executable, "-c", "import sys; from actstore.cli import main; sys.exit(main())"]


def start(*arguments, **options):
    environment = {**os.environ, "COLUMNS": "", **options.pop("env", {})}
    return subprocess.Popen(
        [*ACTSTORE, *arguments], stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(
    "arguments", [["runs"], ["sql", "FROM tokens"], ["sql", "FROM tokens", "--json"], ["fsck"]], ids=" ".join
)
def test_a_reader_that_leaves_is_no_error(made, arguments):
    command, *rest = arguments
    reader, writer = os.pipe()
    os.close(reader)
    child = start(command, made.url, *rest, stdout=writer)
    os.close(writer)
    assert child.communicate() == (None, "")
    assert child.returncode == 0


@pytest.mark.parametrize("arguments", [["runs"], ["runs", "--json"]], ids=" ".join)
def test_a_full_disk_under_the_output_is_told_in_one_line(made, arguments):
    command, *rest = arguments
    with open("/dev/full", "w") as full:
        child = start(command, made.url, *rest, stdout=full)
    message = child.communicate()[1]
    assert message.startswith("actstore: input or output failed: No space left on device")
    assert message.count("\n") == 1
    assert child.returncode == 5


def test_a_closed_output_is_none(made):
    done = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", *ACTSTORE, "runs", made.url], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_an_encoding_that_lacks_characters_gets_escapes(made):
    environment = {"PYTHONIOENCODING": "ascii"}
    child = start("sql", made.url, "SELECT '漢字é' AS t", stdout=subprocess.PIPE, env=environment)
    out, message = child.communicate()
    assert (child.returncode, message) == (0, "")
    assert "\\u6f22\\u5b57\\xe9" in out


def test_sigterm_ends_a_long_query_cleanly(made, tmp_path):
    query = "SELECT count(*) FROM range(100000) a, range(100000) b, range(100000) c WHERE a.range > b.range"
    child = start("sql", made.url, query, stdout=subprocess.PIPE, env={"TMPDIR": str(tmp_path)})
    # Starting up takes less than a second of processor time, so by then the query runs.
    try:
        while cpu_seconds(child.pid) < 3:
            assert child.poll() is None
        assert list(tmp_path.iterdir())
        child.send_signal(signal.SIGTERM)
        out, message = child.communicate(timeout=60)
    finally:
        child.kill()
    assert (child.returncode, out) == (130, "")
    assert message.startswith("interrupted: ")
    assert not list(tmp_path.iterdir())


def test_messages_and_names_do_not_act_on_the_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url = "a.store"
    made = make_store(url, seed=5, n_documents=3)
    widths = {H: 4}
    add_run(made, "run", widths, random_values(1, widths))
    hostile = tmp_path / "a\x1b[2J.npy"
    np.save(hostile, np.ones((2, 4)))
    assert main(["nearest", url, "run", "layers.0.\x1b[31mresid", "--row", "0"]) == 3
    assert main(["examples", url, "run", f"direction:{H}:{hostile}"]) == 2
    assert main(["info", url, "run"]) == 0
    assert main(["runs", url]) == 0
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err
    assert f"runs/run/{H}" in shown.out


def test_a_narrow_terminal_keeps_room_for_the_context(made, capsys, monkeypatch):
    shown = {}
    for columns in ("80", "160"):
        monkeypatch.setenv("COLUMNS", columns)
        assert main(["examples", made.url, "run", f"neuron:{H}:3", "-k", "2"]) == 0
        shown[columns] = capsys.readouterr().out
        assert max(map(len, shown[columns].splitlines())) <= int(columns)
    assert "token_id, token: in a wider terminal" in shown["80"]
    assert "wider" not in shown["160"]
    assert shown["80"].count("\n") < 30
