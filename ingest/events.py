"""What happens in an ingest, as log lines for operators and numbers for monitoring?

Log lines go to the logger `actstore.ingest`, one event each: its name, then `key=value` pairs; the same pairs are the
record's attribute `actstore` (a dict with `event`), for handlers that write JSON. Nothing is shown unless the program sets
up logging, as with any library: `logging.basicConfig(level="INFO")` does.

Numbers, all labelled with `run`; in Prometheus counters end in `_total` and Ray puts `ray_` before every name:

| name | kind | what |
|---|---|---|
| `actstore_ingest_tokens_forwarded` | counter | token rows that went through the model, by the tries that counted |
| `actstore_ingest_tokens_committed` | counter | token rows of committed units |
| `actstore_ingest_units_committed` | counter | |
| `actstore_ingest_units_failed` | counter | given up for good; label `kind` |
| `actstore_ingest_unit_retries` | counter | tries that failed and were followed by another; label `kind` |
| `actstore_ingest_unit_copies` | counter | second copies of slow units |
| `actstore_ingest_bytes_written` | counter | stored bytes of committed units |
| `actstore_ingest_commit_retries` | counter | commits tried again |
| `actstore_ingest_workers` | gauge | workers ready |
| `actstore_ingest_units_in_flight` | gauge | |
| `actstore_ingest_commit_backlog` | gauge | units written and not committed yet |
| `actstore_ingest_worker_idle_share` | gauge | 1 - time in the forward pass / time that ready workers had |
| `actstore_ingest_commit_seconds` | histogram | |
| `actstore_ingest_unit_seconds` | histogram | label `stage`: read, forward, encode, ..., or `all`: submission to result |

Ray's agent counts a histogram's buckets and estimates its sum from them; the sums in this process are exact.

They are kept in this process by a `Collector` (the same with and without Ray) and, where Ray runs and this process is a
driver in the cluster, exported by Ray's metrics agent too. Through Ray Client (`ray://`) they stay here.
"""

import bisect
import logging
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from actstore.errors import ActstoreError

from .unit import WrittenUnit

logger = logging.getLogger("actstore.ingest")

PREFIX = "actstore_ingest_"
SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Upper bounds of histogram buckets; one more is without bound."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One number that is kept."""

    kind: str
    """`counter`, `gauge` or `histogram`."""
    help: str
    labels: tuple[str, ...] = ()
    """Besides `run`."""


METRICS: Mapping[str, Metric] = {
    "tokens_forwarded": Metric("counter", "Token rows that went through the model"),
    "tokens_committed": Metric("counter", "Token rows of committed units"),
    "units_committed": Metric("counter", "Units committed"),
    "units_failed": Metric("counter", "Units given up for good", ("kind",)),
    "unit_retries": Metric("counter", "Failed tries of units that were followed by another", ("kind",)),
    "unit_copies": Metric("counter", "Second copies of slow units"),
    "bytes_written": Metric("counter", "Stored bytes of committed units"),
    "commit_retries": Metric("counter", "Commits tried again"),
    "workers": Metric("gauge", "Workers ready"),
    "units_in_flight": Metric("gauge", "Units in flight"),
    "commit_backlog": Metric("gauge", "Units written and not committed yet"),
    "worker_idle_share": Metric("gauge", "Share of the workers' time without a forward pass"),
    "commit_seconds": Metric("histogram", "Seconds per commit, its retries included"),
    "unit_seconds": Metric("histogram", "Seconds per unit and stage", ("stage",)),
}


_TICK_S = 0.2


class Sink(Protocol):
    """Where numbers go."""

    def record(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        """Add to a counter, set a gauge, or observe into a histogram."""


@dataclass(slots=True)
class Histogram:
    """Counts per bucket of `SECONDS`, and one more for what is longer."""

    count: int = 0
    sum: float = 0.0
    buckets: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))


class Collector:
    """Keeps the numbers in this process. Safe for threads; its size is the number of metrics and labels."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float | Histogram] = {}

    def record(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        """Add to a counter, set a gauge, or observe into a histogram."""
        key = name, tuple(sorted(labels.items()))
        with self._lock:
            kind = METRICS[name].kind
            if kind == "gauge":
                self._values[key] = value
            elif kind == "counter":
                known = self._values.get(key, 0.0)
                assert isinstance(known, float)
                self._values[key] = known + value
            else:
                histogram = self._values.setdefault(key, Histogram())
                assert isinstance(histogram, Histogram)
                histogram.count += 1
                histogram.sum += value
                histogram.buckets[bisect.bisect_left(SECONDS, value)] += 1

    def value(self, name: str, **labels: str) -> float:
        """Return a counter's or gauge's value, or a histogram's sum, over all labels that are not given; 0.0 if unknown."""
        asked = set(labels.items())
        with self._lock:
            found = [v for (n, has), v in self._values.items() if n == name and asked <= set(has)]
        return sum(v.sum if isinstance(v, Histogram) else v for v in found)

    def stages(self) -> dict[str, float]:
        """Return the seconds spent in each stage of the units."""
        with self._lock:
            return {
                dict(labels)["stage"]: v.sum
                for (name, labels), v in self._values.items()
                if name == "unit_seconds" and isinstance(v, Histogram)
            }


class RayMetrics:
    """Hands the numbers to Ray, whose agent on this machine serves them to Prometheus."""

    def __init__(self, metrics: Any) -> None:
        """Take `ray.util.metrics`."""
        kinds = {"counter": metrics.Counter, "gauge": metrics.Gauge}
        self._metrics: dict[str, Any] = {}
        for name, metric in METRICS.items():
            given: dict[str, Any] = {"description": metric.help, "tag_keys": ("run", *metric.labels)}
            self._metrics[name] = (
                metrics.Histogram(PREFIX + name, boundaries=list(SECONDS), **given)
                if metric.kind == "histogram"
                else kinds[metric.kind](PREFIX + name, **given)
            )

    def record(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        """Add to a counter, set a gauge, or observe into a histogram."""
        metric, kind = self._metrics[name], METRICS[name].kind
        if kind == "gauge":
            metric.set(value, tags=dict(labels))
        elif kind == "histogram":
            metric.observe(value, tags=dict(labels))
        elif value > 0:  # Ray refuses to count nothing
            metric.inc(value, tags=dict(labels))


def ray_sinks() -> list[Sink]:
    """Return the exporter to Ray if this process drives a Ray cluster it is part of, else nothing."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized() or ray.util.client.ray.is_connected():
        return []
    from ray.util import metrics

    return [RayMetrics(metrics)]


class JobEvents:
    """What a job tells as it goes: log lines, numbers, and now and then a line for the user."""

    def __init__(
        self,
        run: str,
        *,
        notice: Callable[[str], None] = lambda _: None,
        collector: Collector | None = None,
    ) -> None:
        """Make the events of one run.

        Args:
            run: Name of the run, the label of every number.
            notice: Called with a line of text when a user should know.
            collector: Keeps the numbers; None for a new one.
        """
        self.say = notice
        self.collector = collector or Collector()
        self._run = run
        self._sinks: list[Sink] = [self.collector]
        self._forward_s = 0.0
        self._worker_s = 0.0
        self._now_s: float | None = None
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())  # a library's warnings are not printed unasked

    def export(self, sinks: Sequence[Sink]) -> None:
        """Send the numbers there too."""
        self._sinks += sinks

    @property
    def idle_share(self) -> float | None:
        """Share of the workers' time without a forward pass; None before any time has passed."""
        return max(0.0, 1.0 - self._forward_s / self._worker_s) if self._worker_s else None

    def log(self, event: str, *, level: int = logging.INFO, **fields: object) -> None:
        """Write one line: the event and `key=value` pairs."""
        if logger.isEnabledFor(level):
            pairs = " ".join(f"{k}={_value(v)}" for k, v in fields.items())
            extra = {"actstore": {"event": event, "run": self._run, **fields}}
            logger.log(level, "%s run=%s %s", event, self._run, pairs, extra=extra)

    def written(self, unit: WrittenUnit, seconds: float) -> None:
        """Count the first result of a unit, `seconds` after it was submitted."""
        self._record("tokens_forwarded", unit.rows_forwarded)
        for stage, spent in {**unit.timings_s, "all": seconds}.items():
            self._record("unit_seconds", spent, stage=stage)
        self._forward_s += unit.timings_s.get("forward", 0.0)
        stages: dict[str, Any] = {f"{stage}_s": round(s, 3) for stage, s in unit.timings_s.items()}
        self.log("unit_written", unit=unit.unit, rows=unit.rows, nbytes=unit.nbytes, **stages)

    def committed(self, batch: Sequence[WrittenUnit], seconds: float) -> None:
        """Count a commit."""
        self._record("units_committed", len(batch))
        self._record("tokens_committed", sum(u.rows_forwarded for u in batch))
        self._record("bytes_written", sum(u.nbytes for u in batch))
        self._record("commit_seconds", seconds)
        self.log("committed", units=len(batch), seconds=round(seconds, 3))

    def commit_retried(self, batch: Sequence[WrittenUnit], error: BaseException, waited_s: float) -> None:
        """Count a commit that failed and will be tried again."""
        self._record("commit_retries", 1)
        self.log(
            "commit_failed", level=logging.WARNING, units=len(batch), waited_s=round(waited_s, 1), error=error
        )

    def unit_retried(self, unit: int, error: BaseException | None, tries: int) -> None:
        """Count a failed try that another follows."""
        self._record("unit_retries", 1, kind=_kind(error))
        self.log("unit_retried", level=logging.WARNING, unit=unit, tries=tries, error=error)

    def unit_failed(self, unit: int, error: BaseException | None, tries: int) -> None:
        """Count a unit that is given up."""
        self._record("units_failed", 1, kind=_kind(error))
        self.log("unit_failed", level=logging.ERROR, unit=unit, tries=tries, error=error)

    def unit_copied(self, unit: int, running_s: float) -> None:
        """Count a second copy."""
        self._record("unit_copies", 1)
        self.log("unit_copied", unit=unit, running_s=round(running_s, 1))

    def tick(
        self, now_s: float, *, workers: int, in_flight: int, backlog: int, at_once: bool = False
    ) -> None:
        """Take the state of now, at most five times a second unless `at_once`."""
        if self._now_s is not None:
            if now_s - self._now_s < _TICK_S and not at_once:
                return
            self._worker_s += workers * (now_s - self._now_s)
        self._now_s = now_s
        self._record("workers", workers)
        self._record("units_in_flight", in_flight)
        self._record("commit_backlog", backlog)
        if self.idle_share is not None:
            self._record("worker_idle_share", self.idle_share)

    def _record(self, name: str, value: float, **labels: str) -> None:
        for sink in self._sinks:
            sink.record(name, float(value), {"run": self._run, **labels})


def _value(value: object) -> str:
    text = str(value).replace("\n", " ")
    return repr(text) if " " in text or not text else text


def _kind(error: BaseException | None) -> str:
    return error.kind.value if isinstance(error, ActstoreError) else type(error).__name__
