"""What of building an index runs on GPUs, where FAISS was installed with them (`actstore[gpu]`)?

Clustering on all of the machine's, and filling lists of 8 bits on the first one. FAISS has no GPU form of RaBitQ or FastScan.
"""

from collections.abc import Callable
from typing import Any

from actstore.errors import ErrorKind, InvalidInputError
from actstore.faiss_file import load_faiss


def check_device(device: str) -> None:
    """Raise InvalidInputError for what is no device, whichever machine it is for."""
    if device not in ("auto", "cpu", "cuda"):
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT, f"device {device!r:.80} cannot build an index: use auto, cpu or cuda"
        )


def resolve_device(device: str) -> str:
    """Return `cpu` or `cuda`; `auto` is `cuda` where FAISS finds a GPU.

    Raises:
        InvalidInputError: another device, or `cuda` where FAISS has no GPU.
    """
    check_device(device)
    if device == "cpu":
        return device
    faiss = load_faiss()
    n_gpus = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
    if device == "cuda" and not n_gpus:
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            "device='cuda' was asked for, and this FAISS finds no GPU: install actstore[gpu] instead of actstore[cpu] on a "
            "machine that has one, or use device='cpu'",
        )
    return "cuda" if n_gpus else "cpu"


def cluster_on_gpus(index: Any) -> Any:
    """Have an index's k-means assign vectors on all GPUs, and return what it does that with, to be held meanwhile."""
    faiss = load_faiss()
    on_gpus = faiss.index_cpu_to_all_gpus(faiss.IndexFlat(index.d, index.metric_type))
    index.clustering_index = on_gpus
    return on_gpus


def build_on_gpu(index: Any, fill: Callable[[Any], Any]) -> Any:
    """Return an index that was filled on the first GPU, as one of the CPU."""
    faiss = load_faiss()
    resources = faiss.StandardGpuResources()
    return faiss.index_gpu_to_cpu(fill(faiss.index_cpu_to_gpu(resources, 0, index)))
