"""Language-model activations, kept and asked.

    import actstore
    store = actstore.open("my.store")
    run = store.run("pythia@demo")
    run.examples(actstore.neuron("layers.3.mlp_act", 7), k=20)

Reading a store needs neither torch nor Ray. Writing lives in `actstore.ingest`, answering in `actstore.query`.
"""

import importlib
from types import ModuleType

from actstore.errors import (
    ActstoreError,
    ConflictError,
    ErrorKind,
    FormatError,
    InvalidInputError,
    MissingDependencyError,
    NotFoundError,
    StorageError,
)
from actstore.patterns import fires
from actstore.result import Result
from actstore.run import Run
from actstore.store import Store
from actstore.store import open_store as open  # noqa: A004 - the name users know from every store of this kind
from actstore.targets import direction, document, latent, neuron, parse_target

__version__ = "0.1.0"

__all__ = [
    "ActstoreError",
    "ConflictError",
    "ErrorKind",
    "FormatError",
    "InvalidInputError",
    "MissingDependencyError",
    "NotFoundError",
    "Result",
    "Run",
    "StorageError",
    "Store",
    "direction",
    "document",
    "fires",
    "latent",
    "neuron",
    "open",
    "parse_target",
]


def __getattr__(name: str) -> ModuleType:
    """Return `actstore.ingest` or `actstore.query`, imported when first named: reading needs neither."""
    if name in ("ingest", "query"):
        return importlib.import_module(f"actstore.{name}")
    raise AttributeError(f"module 'actstore' has no attribute {name!r}")
