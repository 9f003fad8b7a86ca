"""How are Hugging Face datasets read: objects, folders that `save_to_disk` wrote, and names on the hub?

A corpus is one sequence of documents, so a dataset of several splits needs `split=`. Code of dataset repositories is never
run.
"""

import itertools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa

from actstore._lazy import lazy_import
from actstore.errors import ActstoreError, ErrorKind, InvalidInputError, NotFoundError, StorageError

from .records import BATCH_BYTES, BATCH_ROWS, BadDocuments, Records, Source
from .source_files import KNOWN_SUFFIXES

_STREAM_ROWS = 256
"""Rows taken at once of a stream that does not tell how large they are."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


def is_hub_name(text: str) -> bool:
    """Return whether `text` can be the name of a dataset on the hub rather than a misspelt path.

    >>> is_hub_name("allenai/c4"), is_hub_name("data/train.jsonl"), is_hub_name("./c4"), is_hub_name("a/b/c")
    (True, False, False, False)
    """
    return bool(_HUB_NAME.fullmatch(text)) and not text.lower().endswith(KNOWN_SUFFIXES)


def is_saved_dataset(path: str) -> bool:
    """Return whether `datasets` saved a Dataset or DatasetDict in this folder."""
    folder = Path(path)
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def saved_dataset_source(path: str, *, split: str | None) -> Source:
    """Return the source of a folder written by `save_to_disk`."""
    module = _datasets()
    try:
        dataset = module.load_from_disk(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InvalidInputError(
            ErrorKind.BAD_DOCUMENT,
            f"{path} looks like a dataset that `datasets` saved, but cannot be loaded ({error}): save it again",
        ) from error
    return dataset_source(dataset, description=os.path.basename(os.path.normpath(path)), split=split)


def hub_source(
    name: str, *, split: str | None, subset: str | None, revision: str | None, streaming: bool
) -> Source:
    """Return the source of a hub dataset, or of a downloaded copy of one.

    Streamed, it is read as it comes and takes no disk; otherwise `datasets` downloads and converts all of it first.

    Raises:
        NotFoundError: neither a path of that name nor a reachable dataset.
        InvalidInputError: several splits and none chosen, or an unknown split or subset.
    """
    module = _datasets()
    try:
        dataset = module.load_dataset(name, subset, split=split, revision=revision, streaming=streaming)
    except (OSError, ValueError, RuntimeError) as error:
        # `datasets` uses FileNotFoundError, ConnectionError and ValueError for what is one thing to the user.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NotFoundError(
            ErrorKind.SOURCE_NOT_FOUND,
            f"{name!r} is not a path here, and no dataset of that name could be opened on the hub ({reason}): check the "
            "spelling, split=, subset= and revision=, or download it and pass the folder",
        ) from error
    parts = [os.path.basename(os.path.normpath(name)) if os.path.isdir(name) else name]
    parts += [f":{subset}"] if subset else []
    parts += [f"@{revision}"] if revision else []
    parts += [f"[{split}]"] if split else []
    return dataset_source(dataset, description="".join(parts), split=None)


def dataset_source(dataset: Any, *, description: str, split: str | None) -> Source:
    """Return the source of a `datasets` object; of a dictionary of splits, the one named (or the only one).

    Raises:
        InvalidInputError: several splits and none chosen, or a split that is not there.
    """
    if isinstance(dataset, Mapping):
        splits = [str(s) for s in dataset]
        if split is None and len(splits) != 1:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"{description} has {len(splits)} splits ({', '.join(splits)}) and a corpus is one: choose with "
                f"split={splits[0]!r} or pass the dataset of one split"
                if splits
                else f"{description} has no split",
            )
        chosen = split if split is not None else splits[0]
        if chosen not in splits:
            raise InvalidInputError(
                ErrorKind.BAD_ARGUMENT,
                f"{description} has no split {chosen!r}: choose one of {', '.join(splits)}",
            )
        dataset = dataset[chosen]
        description = f"{description}[{chosen}]"
    if not hasattr(dataset, "with_format"):
        raise InvalidInputError(
            ErrorKind.BAD_ARGUMENT,
            f"{description} is not a Dataset, IterableDataset or dictionary of them: pass one of those",
        )
    features = dataset.features
    return DatasetSource(dataset, description, None if features is None else features.arrow_schema)


def _datasets() -> ModuleType:
    return lazy_import("datasets", needed_for="importing a Hugging Face dataset", extra="ingest")


@dataclass(frozen=True, slots=True)
class DatasetSource:
    """One split of a dataset. Keys are row numbers."""

    dataset: Any
    description: str
    schema: pa.Schema | None
    """None for a stream whose types nobody declared; then they are found out from the values."""

    warnings: tuple[str, ...] = ()

    def read(self, bad: BadDocuments) -> Iterator[Records]:  # noqa: ARG002
        """Yield the rows in order, typed by the dataset's features where it has them.

        Raises:
            StorageError: the dataset cannot be read to its end.
        """
        batches = self._untyped() if self.schema is None else self._typed()
        row = 0
        while True:
            try:
                rows = next(batches, None)
            except ActstoreError:
                raise
            except Exception as error:
                # What reads a dataset (network, decoders, the user's own map functions) raises errors of every kind.
                raise StorageError(
                    ErrorKind.STORAGE_FAILED,
                    f"{self.description} cannot be read beyond row {row} ({type(error).__name__}: {error}): check the network "
                    "and the dataset, and import again",
                ) from error
            if rows is None:
                return
            n = len(rows) if isinstance(rows, list) else rows.num_rows
            yield Records(rows, [str(row + i) for i in range(n)])
            row += n

    def _untyped(self) -> Iterator[list[Mapping[Any, Any]]]:
        records = iter(self.dataset.with_format(None))
        while batch := list(itertools.islice(records, _STREAM_ROWS)):
            yield batch

    def _typed(self) -> Iterator[pa.RecordBatch]:
        for table in self.dataset.with_format("arrow").iter(batch_size=self._batch_rows()):
            yield from table.combine_chunks().to_batches()

    def _batch_rows(self) -> int:
        data = getattr(self.dataset, "data", None)
        if data is None or not data.num_rows:
            return _STREAM_ROWS
        return int(max(1, min(BATCH_ROWS, BATCH_BYTES * data.num_rows // max(data.nbytes, 1))))
