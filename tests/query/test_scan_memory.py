"""A scan's memory does not grow with the run: measured in a process of its own, over 100 MB of rows with 8 MiB to use."""

import subprocess
import sys

from tests.query.make_store import add_run, make_store, random_values

H = "layers.0.resid_post"

CHILD = """
import sys
import numpy as np
import actstore

def peak():
    # VmHWM, not ru_maxrss: the latter starts from the parent's.
    return next(int(line.split()[1]) >> 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

run, h, small = actstore.open(sys.argv[1]).run("run"), "layers.0.resid_post", 8 << 20
targets = [actstore.neuron(h, 3), actstore.direction(h, np.ones(2048))]
run.examples(targets, 5, rows=range(64), memory_bytes=small)
run.nearest(h, np.ones(2048), 5, rows=range(64), memory_bytes=small)
before = peak()
rows = [r["row"] for r in run.examples(targets, 5, memory_bytes=small)]
rows += [r["row"] for r in run.nearest(h, np.ones(2048), 5, memory_bytes=small)]
print(before, peak(), rows)
"""


def test_memory_is_bounded(tmp_path):
    widths = {H: 2048}
    made = make_store(str(tmp_path / "s"), n_documents=700, window=64, rows_per_unit=2048)
    add_run(made, "run", widths, random_values(0, widths))
    nbytes = len(made.tokens) * 2048 * 4
    assert nbytes > 100e6
    done = subprocess.run(
        [sys.executable, "-c", CHILD, made.url], capture_output=True, text=True, check=True, timeout=100
    )
    before, after, *_ = done.stdout.split(maxsplit=2)
    assert int(after) - int(before) < 40, done.stdout
