"""A job on a Ray cluster that a test can watch and hurt: slow workers that leave their process ids, a driver process.

`python -m tests.ingest.chaos_driver ADDRESS URL TOKENIZER RUN FOLDER WORKERS` runs the job and prints its report as JSON, or
the kind of the error that ended it.
"""

import json
import os
import sys
import time
import warnings
from pathlib import Path

from actstore.errors import ActstoreError
from tests.ingest import synthetic


class SlowHost(synthetic.SyntheticHost):
    """Takes a while for each unit; `FOLDER/begun-UNIT-PID` says which process began which unit. `FOLDER` is `config.model`."""

    def __init__(self, config, *, threads) -> None:
        super().__init__(config, threads=threads)
        self._folder = Path(config.model)

    def run_job_unit(self, job, unit):
        (self._folder / f"begun-{unit:04}-{os.getpid()}").touch()
        time.sleep(0.2)
        return super().run_job_unit(job, unit)


def pids(folder: Path) -> dict[int, int]:
    """Worker processes to the number of units that they began."""
    counts: dict[int, int] = {}
    for path in folder.glob("begun-*"):
        pid = int(path.name.rsplit("-", 1)[1])
        counts[pid] = counts.get(pid, 0) + 1
    return counts


def make_config(tokenizer: str, run: str, folder: Path, **changes):
    folder.mkdir(exist_ok=True)
    settings = {"commit_units": 4, "commit_interval_s": 0.2, "max_attempts": 3, "retry_s": 60.0, "workers": 2}
    return synthetic.config(
        tokenizer, run=run, model=str(folder), ray_address="auto", **{**settings, **changes}
    )


def run_job(url: str, config, *, progress=None, stop=None, notice=None, collector=None):
    """Run the job in this process, which drives a Ray cluster already."""
    import actstore
    from actstore.ingest import run as run_ingest
    from actstore.ingest.events import JobEvents
    from actstore.ingest.ray_backend import RayBackend

    lines = []
    events = JobEvents(config.run, notice=notice or lines.append)
    backend = RayBackend(config, actstore.open(url), host=SlowHost, events=events)
    watch = None if progress is None else lambda p: progress(backend, p)
    return run_ingest(url, config, backend=backend, progress=watch, stop=stop, collector=collector)


def connect(address: str) -> None:
    """Join the cluster so that workers need not find the tests."""
    import ray
    from ray import cloudpickle

    ray.init(address=address, log_to_driver=False)
    cloudpickle.register_pickle_by_value(synthetic)
    cloudpickle.register_pickle_by_value(sys.modules[SlowHost.__module__])


def main() -> None:
    address, url, tokenizer, run, folder, workers = sys.argv[1:]
    warnings.simplefilter("ignore")
    connect(address)
    try:
        report = run_job(url, make_config(tokenizer, run, Path(folder), workers=int(workers)))
        print(
            json.dumps(
                {
                    "complete": report.is_complete,
                    "units": report.n_units,
                    "counters": report.counters.committed,
                }
            )
        )
    except ActstoreError as error:
        print(json.dumps({"error": error.kind}))


if __name__ == "__main__":
    main()
