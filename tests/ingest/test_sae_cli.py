"""`actstore sae COMMAND`: which command runs, and what its errors look like."""

import json

import pytest

from actstore.cli import COMMANDS, _parser, main
from actstore.ingest.cli import sae, sae_encode, sae_import, sae_train

NEW = {"sae", "latents", "active", "match", "neighbours"}


def test_the_overview_names_all_three(capsys):
    with pytest.raises(SystemExit):
        main(["sae", "--help"])
    shown = capsys.readouterr().out
    assert all(f"\n    {name} " in shown for name in sae.COMMANDS)
    assert set(COMMANDS) >= NEW


@pytest.mark.parametrize("flags", [([], []), (["--json"], []), ([], ["--json"])], ids=str)
def test_each_runs_its_own_module(flags):
    before, behind = flags
    for module, arguments in (
        (sae_train, ["train", "a.store", "run", "layers.1.resid_post", "--name", "sae"]),
        (sae_import, ["import", "a.store", "folder", "--name", "sae"]),
        (sae_encode, ["encode", "a.store", "sae", "run"]),
    ):
        line = ["sae", *before, *arguments, *behind]
        args = _parser(line).parse_args(line)
        assert args.run is sae.run
        assert args.run_subcommand is module.run
        assert args.json is bool(before or behind)


def test_errors_are_those_of_every_command(tmp_path, capsys):
    absent = str(tmp_path / "absent.store")
    assert main(["sae", "encode", absent, "sae", "run"]) == 3
    assert capsys.readouterr().err.startswith("actstore: ")
    assert main(["sae", "--json", "encode", absent, "sae", "run"]) == 3
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "store-not-found"
    with pytest.raises(SystemExit):
        main(["sae"])
    with pytest.raises(SystemExit):
        main(["sae", "bake"])
