"""Do real processes that race on one local store, or are killed at any moment, lose or double anything?"""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run(*args: object) -> dict[str, Any]:
    program = [sys.executable, "-m", "tests.log.forks", *map(str, args)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return json.loads(done.stdout)


def test_eight_processes_commit_at_once(tmp_path: Path) -> None:
    result = run("race", tmp_path, 8, 15)
    assert result["wrong"] == []
    assert result["acknowledged"] == 8 * 15
    assert result["versions"] == 1 + 8 * 15


@pytest.mark.parametrize(
    "kills", [200, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])]
)
def test_killed_again_and_again(tmp_path: Path, kills: int) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    result = run("kill", tmp_path, kills, seed)
    assert result["wrong"] == []
    assert result["kills"] == kills
    assert result["acknowledged"] > kills / 20
