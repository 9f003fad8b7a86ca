"""`actstore ingest` as a user types it: a file, options over it, what is printed, and exit codes."""

import dataclasses
import json

import pytest

import actstore
from actstore.cli import main
from actstore.ingest import import_corpus
from actstore.ingest.cli.ingest import print_report
from actstore.ingest.flow import Counters
from actstore.ingest.report import IngestReport
from tests.ingest import synthetic, tiny_models


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    url = str(folder / "store")
    import_corpus(actstore.open(url, create=True), "c", synthetic.documents(12, seed=1))
    toml = folder / "run.toml"
    toml.write_text(
        f"store = '{url}'\ncorpus = 'c'\nmodel = '{tiny_models.cached('gpt2')}'\nhook_points = ['layers.*.resid_post']\n"
        "run = 'a'\nrows_per_unit = 128\nwindow = 16\ndevice = 'cpu'\nray_address = 'none'\nself_check = 0.2\n"
    )
    return url, str(toml)


def test_a_file_is_enough_and_options_win(made, capsys):
    url, toml = made
    assert (
        main(
            [
                "ingest",
                "--config",
                toml,
                "--run",
                "b",
                "--hook-points",
                "embed,layers.{0..1}.mlp_out",
                "layers.2.attn_out",
            ]
        )
        == 0
    )
    printed = capsys.readouterr()
    assert "run b: " in printed.out
    assert "self-check: 2 documents (" in printed.out
    assert f"next: actstore info {url} b" in printed.out
    assert "computing" in printed.err
    run = actstore.open(url).run("b")
    assert run.hook_points == ["embed", "layers.0.mlp_out", "layers.1.mlp_out", "layers.2.attn_out"]

    assert main(["ingest", "--config", toml, "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert printed.err == ""
    run = actstore.open(url).run("a")
    assert (found["run"], found["is_complete"], found["n_rows"]) == ("a", True, run.n_rows)
    assert found["self_check"]["n_documents"] == 2
    assert found["rows_per_s"] > 0


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--config", "no.toml"], 3, "'no.toml' does not exist"),
        (["--corpus", "c"], 2, "no store was named"),
        (
            ["STORE", "--corpus", "c"],
            2,
            "an ingest needs model, hook_points, run: give --model, --hook-points, --run",
        ),
        (["TOML", "--workers", "2"], 2, "workers must be 1 without Ray"),
        (["TOML", "--sample", "2"], 2, "sample must be a share above 0 and at most 1, got 2.0"),
        (["TOML", "--corpus", "none"], 3, "none"),
        (["TOML", "--submit", "ray://h:1"], 2, "http://host:8265"),
    ],
)
def test_what_cannot_be_is_one_line_and_a_code(made, capsys, words, code, message):
    given = [
        w
        for word in words
        for w in (["--config", made[1]] if word == "TOML" else [made[0] if word == "STORE" else word])
    ]
    assert main(["ingest", *given]) == code
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert main(["ingest", *given, "--json"]) == code
    assert message in json.loads(capsys.readouterr().out)["error"]["message"]


def test_hostile_reasons_do_not_reach_the_terminal(capsys):
    report = IngestReport(
        "r",
        3,
        True,
        10,
        30,
        5,
        6,
        7,
        5,
        10,
        1,
        2.0,
        {u: f"\x1b[2Jbad {u}\u202e" for u in range(20)},
        (),
        Counters(),
    )
    print_report(report, "my store")
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert "\x1b" not in printed
    assert "20 units could not be computed" in printed
    assert "... and 10 more" in printed
    assert "next: actstore info 'my store' r" in printed
    print_report(dataclasses.replace(report, is_complete=False, quarantined={}), "s")
    assert "stopped: run the same command again" in capsys.readouterr().out
