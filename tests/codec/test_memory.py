"""Reading much takes little memory: measured in a child process, whose high-water mark is its own."""

import json
import subprocess
import sys
import textwrap

import pytest

CHILD = textwrap.dedent(
    """
    import json, resource, sys
    from actstore.activations import Activations
    from actstore.codec.spec import ShardSpec
    from actstore.storage.local import LocalStorage
    from actstore.testing.runs import make_run

    folder, codec, way = sys.argv[1:]
    storage = LocalStorage(folder)
    spec = ShardSpec(8192, 512, 512, "bfloat16", codec)
    run = make_run(storage, spec=spec, rows_per_unit=8192, unit_rows={unit: 8000 for unit in range(16)})
    acts = Activations(storage, run, "layers.0.resid_post", memory_bytes=16 << 20)
    acts[[0, 1]]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    n_rows = 0
    batches = acts.scan(2048) if way == "scan" else acts.shuffled(2048, buffer_bytes=8 << 20)
    for rows, values in batches:
        n_rows += len(rows)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"rows": n_rows, "grown_bytes": (after - before) * 1024}))
    """
)


@pytest.mark.parametrize(
    ("codec", "way", "limit"),
    [("hot", "scan", 40 << 20), ("cold", "scan", 40 << 20), ("hot", "shuffled", 48 << 20)],
)
def test_rows_of_128_mib_pass_through_a_few(tmp_path, codec, way, limit):
    """16 MiB of buffers (two groups of 8 MiB when shuffled), the batch in hand and the threads' own."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), codec, way],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    report = json.loads(done.stdout)
    assert report["rows"] == 16 * 8000
    assert report["grown_bytes"] < limit, report
