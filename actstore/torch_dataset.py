"""How does a torch training loop read shuffled activations, with any number of loader workers?

Workers must be spawned, not forked: connections to object storage do not survive `fork()`. A dataset pickles, and every worker
opens its own storage handles.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from actstore.activations import Activations
from actstore.errors import ErrorKind, MissingDependencyError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import IterableDataset


def make_torch_dataset(
    activations: Activations,
    *,
    batch_rows: int = 4096,
    seed: int = 0,
    epoch: int = 0,
    start_batch: int = 0,
    buffer_bytes: int = 256 << 20,
    drop_last: bool = False,
) -> "IterableDataset[Any]":
    """Return a dataset of whole batches `(rows, values)`: int64 `[n]` and float32 `[n, d_model]` tensors.

    Give it to a loader as it is: `DataLoader(dataset, batch_size=None, num_workers=4,
    multiprocessing_context="spawn")`. The batches and their order are those of `activations.shuffled(...)` for any number of
    workers. Each worker holds two groups of `buffer_bytes` and reads all groups.

    Args:
        activations: What to read.
        batch_rows: Rows of a batch.
        seed: Of the order.
        epoch: Which epoch's order; set `dataset.epoch` for the next one.
        start_batch: First batch, to resume in the middle of an epoch; for one pass, then set `dataset.start_batch = 0`.
        buffer_bytes: Stored bytes that are mixed with each other.
        drop_last: Leave out a last batch that is not full.

    Raises:
        MissingDependencyError: torch is not installed.
    """
    try:
        from torch import from_numpy
        from torch.utils.data import IterableDataset, get_worker_info
    except ImportError as error:
        raise MissingDependencyError(
            ErrorKind.MISSING_DEPENDENCY, "make_torch_dataset() needs torch: pip install 'actstore[ingest]'"
        ) from error
    options = {"batch_rows": batch_rows, "seed": seed, "buffer_bytes": buffer_bytes, "drop_last": drop_last}
    activations.shuffled(**options)  # type: ignore[arg-type]  # refuses bad options here, not in a worker

    class ShuffledRows(IterableDataset[Any]):  # type: ignore[misc]  # torch has no types here
        """Batches of shuffled rows; see `make_torch_dataset`."""

        def __init__(self) -> None:
            self.epoch = epoch
            self.start_batch = start_batch

        def __reduce__(self) -> tuple[Any, ...]:
            return _remake, (activations, {**options, "epoch": self.epoch, "start_batch": self.start_batch})

        def __iter__(self) -> Iterator[tuple["Tensor", "Tensor"]]:
            worker = get_worker_info()
            index, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
            # The loader takes one batch of each worker in turn, from worker 0 on.
            shuffled = activations.shuffled(
                **options,  # type: ignore[arg-type]
                worker_index=(self.start_batch + index) % count,
                num_workers=count,
            )
            shuffled.load_state({**shuffled.state(), "epoch": self.epoch, "next_batch": self.start_batch})
            for rows, values in shuffled:
                yield from_numpy(rows), from_numpy(values)

    return ShuffledRows()


def _remake(activations: Activations, options: dict[str, Any]) -> "IterableDataset[Any]":
    return make_torch_dataset(activations, **options)
