import json

import numpy as np
import pytest

import actstore
from actstore.cli import main

H = "layers.0.resid_post"


def run_json(capsys, *arguments):
    code = main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_examples(made, capsys):
    code, answer = run_json(
        capsys, "examples", made.url, "run", f"neuron:{H}:3", "-k", "4", "--sign", "abs", "--fold", "none"
    )
    wanted = made.run().examples(actstore.neuron(H, 3), 4, sign="abs", fold=None)
    assert code == 0
    assert [r["row"] for r in answer["rows"]] == wanted.table["row"].to_pylist()
    code, answer = run_json(
        capsys, "examples", made.url, "run", f"neuron:{H}:3", f"neuron:{H}:4", "-k", "2", "--where", "n < 9", "--keep-sinks",
        "--keep-special", "--before", "1", "--after", "0",
    )  # fmt: skip
    assert code == 0
    assert {r["target"] for r in answer["rows"]} == {f"neuron:{H}:3", f"neuron:{H}:4"}
    assert answer["meta"]["request"]["mask_sinks"] is False
    assert answer["meta"]["request"]["where"] == "n < 9"
    assert main(["examples", made.url, "run", f"neuron:{H}:3"]) == 0
    shown = capsys.readouterr().out
    assert "examples: 20 rows" in shown
    assert "\x1b" not in shown


def test_nearest(made, capsys, tmp_path):
    np.save(tmp_path / "q.npy", np.ones(12))
    row = next(t.row for t in made.tokens if t.window_position == 3)
    for query in (["--row", str(row)], ["--vector", str(tmp_path / "q.npy")]):
        code, answer = run_json(
            capsys, "nearest", made.url, "run", H, *query, "-k", "3", "--metric", "l2", "--exact"
        )
        assert code == 0
        assert len(answer["rows"]) == 3
    assert answer["rows"] == json.loads(made.run().nearest(H, np.ones(12), 3, metric="l2").to_json())["rows"]


def test_sql(made, capsys):
    code, answer = run_json(
        capsys, "sql", made.url, "SELECT count(*) AS n FROM tokens WHERE token = ?", "-p", "cat"
    )
    assert code == 0
    assert answer["rows"] == [{"n": sum(t.token_id == 2 for t in made.tokens)}]
    assert main(["sql", made.url, "SHOW TABLES"]) == 0
    assert "view_columns" in capsys.readouterr().out
    code, answer = run_json(capsys, "sql", made.url, "SELECT count(*) AS n FROM runs", "--at", "4")
    assert answer["rows"] == [{"n": 0}]
    assert answer["meta"]["version"] == 4


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["sql", "{url}", "DROP VIEW runs"], 2),
        (["sql", "{url}", "SELECT count(*) FROM range(100000000000)", "--timeout", "0.2"], 2),
        (["examples", "{url}", "run", "neuron:x"], 2),
        (["examples", "{url}", "no-run", f"neuron:{H}:1"], 3),
        (["examples", "{url}", "run", "latent:sae:1"], 3),
        (["nearest", "{url}", "run", H, "--vector", "/no/file.npy"], 3),
        (["nearest", "{url}", "run", H, "--row", "-5"], 3),
        (["sql", "{url}/absent", "FROM runs"], 3),
    ],
)
def test_exit_codes(made, capsys, arguments, code):
    assert main([a.replace("{url}", made.url) for a in arguments]) == code
    shown = capsys.readouterr()
    assert shown.err.startswith("actstore: ")
    assert not shown.out
