"""What does each Ray worker reserve, and what can be said when a cluster has no place for it?"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any


def actor_options(
    nodes: Sequence[Mapping[str, float]], *, workers: int, device: str, gpus_per_worker: int | None = None
) -> dict[str, Any]:
    """Return what each worker reserves: as much as lets all of them run at once, each on one node.

    With GPUs, workers go where the GPUs are, each to one GPU or a share of it. `gpus_per_worker` is taken as it is, whatever
    the cluster has now: an autoscaler may bring it, and workers wait for it. So is a device that only a GPU can be.

    Args:
        nodes: Resources of every node, as Ray names them.
        workers: Actors to place.
        device: Of the ingest; `auto` takes GPUs where there are some, `cuda` and `cuda:N` must have them.
        gpus_per_worker: GPUs of each worker; None for one or, where there are too few, a share of one.

    >>> actor_options([{"CPU": 4.0}, {"CPU": 4.0}], workers=1, device="auto")
    {'num_cpus': 4.0}
    >>> actor_options([{"CPU": 8.0, "GPU": 3.0}], workers=4, device="auto")
    {'num_cpus': 2.0, 'num_gpus': 0.5}
    >>> actor_options([{"CPU": 8.0, "GPU": 8.0}], workers=2, device="auto", gpus_per_worker=4)
    {'num_cpus': 4.0, 'num_gpus': 4.0}
    """
    options: dict[str, Any] = {}
    slots = [workers] * len(nodes)
    index = device_index(device)
    needs_gpu = device.startswith("cuda") if gpus_per_worker is None else gpus_per_worker > 0
    least = max(gpus_per_worker or 1, 1 if index is None else index + 1)
    with_gpu = [n for n in nodes if n.get("GPU", 0.0) >= least]
    if needs_gpu or (gpus_per_worker is None and device == "auto" and with_gpu):
        share = _gpu_share(with_gpu, workers, gpus_per_worker)
        options["num_gpus"] = _rounded(share)
        slots = [_fitting(n, "GPU", share) for n in with_gpu]
        nodes = with_gpu
    options = {"num_cpus": _cpu_share(nodes, slots, workers), **options}
    if index is not None and "num_gpus" in options:
        # Ray shows an actor only the GPUs it reserved, numbered from 0: a GPU asked for by number must be visible.
        options["runtime_env"] = {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}
    return options


def device_index(device: str) -> int | None:
    """Return the number in `cuda:N`; None for other devices.

    >>> device_index("cuda:1"), device_index("cuda"), device_index("cpu")
    (1, None, None)
    """
    name, _, number = device.partition(":")
    return int(number) if name == "cuda" and number.isdigit() else None


def cluster_summary(nodes: Sequence[Mapping[str, float]]) -> str:
    """Return in words what a cluster has, nodes that are alike together.

    >>> cluster_summary([{"CPU": 4.0}, {"CPU": 8.0, "GPU": 1.0, "memory": 1e9}, {"CPU": 4.0}])
    '3 nodes: 2 with CPU 4; 1 with CPU 8, GPU 1'
    """
    kinds: dict[str, int] = {}
    for node in nodes:
        has = (
            ", ".join(f"{name} {node[name]:g}" for name in ("CPU", "GPU") if node.get(name))
            or "nothing to work with"
        )
        kinds[has] = kinds.get(has, 0) + 1
    listed = "; ".join(f"{n} with {has}" for has, n in kinds.items())
    return f"{len(nodes)} node{'s' * (len(nodes) != 1)}: {listed}" if nodes else "no nodes"


def _gpu_share(nodes: Sequence[Mapping[str, float]], workers: int, asked: int | None) -> Fraction:
    if asked is not None:
        return Fraction(asked)
    shares = (s for s in _shares(1, workers) if sum(_fitting(n, "GPU", s) for n in nodes) >= workers)
    return next(shares, Fraction(1))


def _cpu_share(nodes: Sequence[Mapping[str, float]], slots: Sequence[int], workers: int) -> float:
    """Return the most CPUs that let the workers, or as many as have GPUs, run at once."""
    workers = min(workers, sum(slots))
    most = max((int(n.get("CPU", 0.0)) for n in nodes), default=0)
    if not most or not workers:
        return 1.0  # no node that may work yet: an autoscaler answers to this
    for share in _shares(most, workers):
        if sum(min(_fitting(n, "CPU", share), s) for n, s in zip(nodes, slots, strict=True)) >= workers:
            return _rounded(share)
    return 0.0


def _shares(most: int, workers: int) -> list[Fraction]:
    """Return the amounts that a worker might get, largest first: whole ones, then parts of one."""
    return [*map(Fraction, range(most, 0, -1)), *(Fraction(1, n) for n in range(2, workers + 1))]


def _fitting(node: Mapping[str, float], resource: str, share: Fraction) -> int:
    return int(Fraction(node.get(resource, 0.0)) / share)


def _rounded(share: Fraction) -> float:
    """Ray counts in ten-thousandths: rounded down, or the last worker would find no place."""
    return int(share * 10_000) / 10_000
