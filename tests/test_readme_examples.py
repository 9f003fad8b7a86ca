"""What the README and `examples/` show runs as it stands."""

import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from actstore.cli import COMMANDS, _parser
from actstore.ingest.demo.tour import run_tour
from tests.ingest.test_demo_tour import CONFIG, SHAPE

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.S | re.M)
PYTHON = [text for language, text in BLOCKS if language == "python"]
SHELL = [text for language, text in BLOCKS if not language]
COMMAND_LINES = [
    line
    for block in SHELL
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("actstore ")
]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="module")
def beside_a_demo_store(tmp_path_factory):
    """A folder with a `demo.store` as the demo makes it, from models that were hardly trained."""
    from dataclasses import replace

    from actstore.ingest.demo.train import TrainConfig

    folder = tmp_path_factory.mktemp("readme")
    shape = {**SHAPE, "layers": 3}
    config = replace(
        CONFIG, models={n: TrainConfig(seed=i, **shape) for i, n in enumerate(("tiny-a", "tiny-b"))}
    )
    run_tour(folder / "demo.store", config, Console(file=io.StringIO(), width=120))
    return folder


@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_run(beside_a_demo_store, block):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block],
        cwd=beside_a_demo_store,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_command_lines_are_understood(line):
    arguments = shlex.split(line, comments=True)[1:]
    assert arguments[0] in COMMANDS
    assert callable(_parser(arguments).parse_args(arguments).run)


def test_there_is_something_to_test():
    assert len(PYTHON) >= 2
    assert len(COMMAND_LINES) >= 6


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_examples_run(script, tmp_path):
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
