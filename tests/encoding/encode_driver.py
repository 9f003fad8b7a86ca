"""Encodes a run in a process of its own, slowly, so that a test can kill it."""

import sys
import time
from pathlib import Path

from actstore.ingest.encoding import codes_job
from actstore.ingest.encoding.encode import encode


class SlowEncoder(codes_job.UnitEncoder):
    def __call__(self, unit):
        time.sleep(0.2)
        return super().__call__(unit)


def main() -> None:
    url, done = sys.argv[1:3]
    codes_job.UnitEncoder = SlowEncoder
    encode(url, "sae", "r", progress=lambda p: Path(done).write_text(str(p.units_done)))


if __name__ == "__main__":
    main()
