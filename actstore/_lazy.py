"""How does the core reach the two folders that build on it, without importing them?

`actstore` imports neither `actstore.ingest` nor `actstore.query`, so that reading a store needs no torch and no Ray. Where a
convenience of the core (`store.sql`, `run.examples`) lives in one of them, it is looked up by name at the first call.
"""

import importlib
from types import ModuleType

from actstore.errors import ErrorKind, MissingDependencyError


def lazy_import(module: str, *, needed_for: str, extra: str) -> ModuleType:
    """Return `module`, imported now.

    Args:
        module: Absolute module name.
        needed_for: What the user asked for, as the error should call it.
        extra: The extra of the distribution that brings the missing package.

    Raises:
        MissingDependencyError: a package that `module` needs is not installed.

    >>> lazy_import("json", needed_for="this example", extra="query").__name__
    'json'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing(error.name or module, needed_for=needed_for, extra=extra) from error


def missing(package: str, *, needed_for: str, extra: str) -> MissingDependencyError:
    """Return the error that says which extra brings `package`."""
    return MissingDependencyError(
        ErrorKind.MISSING_DEPENDENCY,
        f"{needed_for} needs {package}, which is not installed: pip install 'actstore[{extra}]'",
    )
