"""Python run in a process of its own: to be killed, limited, or stripped of rights."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

PRELUDE = """
import os, resource, sys
from actstore.errors import ActstoreError
from actstore.storage import *
"""


def start(code: str, *args: str, wrap: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    """Return a running child; `wrap` is a command that is given the child's command line."""
    return subprocess.Popen(
        [*wrap, sys.executable, "-c", PRELUDE + code, *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def run(code: str, *args: str, wrap: tuple[str, ...] = ()) -> str:
    """Return what the child prints; fail with its standard error if it fails."""
    with start(code, *args, wrap=wrap) as child:
        out, err = child.communicate(timeout=100)
    assert child.returncode == 0, err
    return out
