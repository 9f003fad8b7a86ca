"""Where does a training go on from when it was stopped?

A checkpoint is one safetensors file: tensors, and in its header the JSON of everything else. It is written beside its name,
synced and renamed, and the one before it is deleted after that, so that there is always a whole one. A folder belongs to one
training at a time: a lock, which ends with the process, keeps others out.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actstore.errors import ConflictError, ErrorKind, FormatError, StorageError

if TYPE_CHECKING:
    import torch

_FORMAT = 1
_NAME = re.compile(r"step-(\d{9})\.safetensors")
_KEY = "actstore.training"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A training between two steps."""

    step: int
    """Steps done."""

    values: Mapping[str, Any]
    """JSON: identity, rows, counters."""

    tensors: Mapping[str, "torch.Tensor"]


def checkpoint_folder(checkpoint_dir: str | None, store_url: str, name: str) -> Path:
    """Return the folder of a training's checkpoints: the one given, or one in the user's cache folder for store and name."""
    if checkpoint_dir is not None:
        return Path(checkpoint_dir)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    where = hashlib.sha256(store_url.encode()).hexdigest()[:16]
    return base / "actstore" / "training" / f"{name}-{where}"


class CheckpointFolder:
    """The checkpoints of one training."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and keep other trainings out of it.

        Raises:
            ConflictError: another process trains here.
            StorageError: the folder cannot be made or written.
        """
        with self._failing("made or locked"):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConflictError(
                    ErrorKind.COMMIT_CONTENTION,
                    f"another process trains with the checkpoints of {str(self.folder)!r}: wait for it or stop it, or give "
                    "another name or checkpoint_dir",
                ) from error
            yield
        finally:
            os.close(lock)

    def load(self, device: "torch.device | str" = "cpu") -> Checkpoint | None:
        """Return the newest checkpoint, None if there is none.

        Raises:
            FormatError: it cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        found = sorted(self._files())
        if not found:
            return None
        step, path = found[-1]
        try:
            with safe_open(str(path), framework="pt", device=str(device)) as file:
                values = json.loads((file.metadata() or {})[_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise FormatError(
                ErrorKind.OBJECT_DAMAGED,
                f"checkpoint {str(path)!r} cannot be read ({error}): delete the folder to train from the beginning",
            ) from error
        if values.get("format") != _FORMAT:
            raise FormatError(
                ErrorKind.FORMAT_TOO_NEW,
                f"checkpoint {str(path)!r} has format {values.get('format')!r}, this version reads {_FORMAT}",
            )
        return Checkpoint(step, values, tensors)

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint durably, and delete those before it.

        Raises:
            StorageError: it could not be written; the one before it is still there.
        """
        from safetensors.torch import save_file

        path = self.folder / f"step-{checkpoint.step:09}.safetensors"
        partial = self.folder / f".partial-{os.getpid()}"
        values = json.dumps({**checkpoint.values, "format": _FORMAT})
        tensors = {name: t.detach().cpu().contiguous() for name, t in checkpoint.tensors.items()}
        with self._failing("written"):
            try:
                save_file(tensors, partial, metadata={_KEY: values})
                with partial.open("rb") as file:
                    os.fsync(file.fileno())
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
            self._sync()
            for step, old in self._files():
                if step != checkpoint.step:
                    old.unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete the checkpoints, and the folder if nothing else is in it."""
        for _, path in self._files():
            path.unlink(missing_ok=True)
        (self.folder / "lock").unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> list[tuple[int, Path]]:
        names = [(path, _NAME.fullmatch(path.name)) for path in self.folder.glob("step-*")]
        return [(int(match[1]), path) for path, match in names if match]

    def _sync(self) -> None:
        fd = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        from safetensors import SafetensorError

        try:
            yield
        except (OSError, SafetensorError) as error:
            raise StorageError(
                ErrorKind.STORAGE_FAILED,
                f"checkpoints in {str(self.folder)!r} could not be {what}: {error}. Make room, or give another "
                "checkpoint_dir",
            ) from error
