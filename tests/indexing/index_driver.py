"""Builds an index in a process of its own, slowly, so that a test can kill it."""

import sys
import time
from pathlib import Path

from actstore.ingest.indexing import build_index, task


class SlowWriter(task.IndexWriter):
    def __call__(self, unit):
        time.sleep(0.2)
        return super().__call__(unit)


def main() -> None:
    url, hook_point, done = sys.argv[1:4]
    task.IndexWriter = SlowWriter
    build_index(
        url,
        "run",
        hook_point,
        kind="ivf_sq8",
        n_lists=8,
        shard_rows=100,
        n_queries=20,
        progress=lambda p: Path(done).write_text(str(p.units_done)),
    )


if __name__ == "__main__":
    main()
