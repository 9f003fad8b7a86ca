"""Which errors does actstore raise on purpose, and what does a handler do with each?

    ActstoreError
    |- NotFoundError (KeyError)             a corpus, run, hook point or row that is not in the store
    |- InvalidInputError (ValueError)       an argument, a file or a model output that the caller can fix
    |- ConflictError                        another writer was first, or fenced this one off: re-read, then retry
    |- StorageError (OSError)               the storage failed or refuses to be written; often worth a retry
    |- FormatError                          stored bytes are not what FORMAT.md says: damaged, missing or too new
    `- MissingDependencyError (ImportError) an optional package is not installed

Every error has a `kind`, a stable code for programs; the class says what to do, the kind what happened.
"""

from enum import StrEnum


class ErrorKind(StrEnum):
    """Stable codes for `ActstoreError.kind`: new ones may be added, none is renamed or reused."""

    # NotFoundError
    STORE_NOT_FOUND = "store-not-found"
    COLLECTION_NOT_FOUND = "collection-not-found"
    HOOK_POINT_NOT_FOUND = "hook-point-not-found"
    ROW_NOT_FOUND = "row-not-found"
    VERSION_NOT_FOUND = "version-not-found"
    MODEL_NOT_FOUND = "model-not-found"
    SOURCE_NOT_FOUND = "source-not-found"
    # InvalidInputError
    BAD_NAME = "bad-name"
    BAD_ARGUMENT = "bad-argument"
    BAD_URL = "bad-url"
    BAD_SQL = "bad-sql"
    BAD_DOCUMENT = "bad-document"
    BAD_MODEL = "bad-model"
    BAD_TOKENIZER = "bad-tokenizer"
    MISSING_COLUMN = "missing-column"
    NON_FINITE = "non-finite"
    OVERFLOW = "overflow"
    TOO_LARGE = "too-large"
    TIMED_OUT = "timed-out"
    SELF_TEST_FAILED = "self-test-failed"
    BAD_ACTIVATIONS = "bad-activations"
    # ConflictError
    ALREADY_EXISTS = "already-exists"
    CONFIG_DIFFERS = "config-differs"
    FENCED = "fenced"
    COMMIT_CONTENTION = "commit-contention"
    TOMBSTONED = "tombstoned"
    SEALED = "sealed"
    COUNT_DIFFERS = "count-differs"
    # StorageError
    READ_ONLY = "read-only"
    STORAGE_FAILED = "storage-failed"
    STORAGE_FULL = "storage-full"
    OUTCOME_UNKNOWN = "outcome-unknown"
    UNSAFE_STORE = "unsafe-store"
    INTERRUPTED = "interrupted"
    WORKER_FAILED = "worker-failed"
    # FormatError
    OBJECT_MISSING = "object-missing"
    OBJECT_DAMAGED = "object-damaged"
    MANIFEST_DAMAGED = "manifest-damaged"
    HISTORY_TRUNCATED = "history-truncated"
    FORMAT_TOO_NEW = "format-too-new"
    INVARIANT_BROKEN = "invariant-broken"
    # MissingDependencyError
    MISSING_DEPENDENCY = "missing-dependency"


class ActstoreError(Exception):
    """Base of all errors raised on purpose; pickles, so it survives a Ray call."""

    exit_code = 1

    def __init__(self, kind: ErrorKind, message: str) -> None:
        super().__init__(kind, message)
        self.kind = kind
        self.message = message

    def __str__(self) -> str:
        return f"{self.message} [{self.kind}]"


class NotFoundError(ActstoreError, KeyError):
    """A corpus, run, hook point, version or row that is not in the store."""

    exit_code = 3

    __str__ = ActstoreError.__str__


class InvalidInputError(ActstoreError, ValueError):
    """An argument, a file or a model output that the caller can fix."""

    exit_code = 2


class ConflictError(ActstoreError):
    """Another writer was first, or fenced this one off: re-read, then retry."""

    exit_code = 4


class StorageError(ActstoreError, OSError):
    """The storage failed, is full, or refuses to be written; often worth a retry."""

    exit_code = 5

    __str__ = ActstoreError.__str__


class FormatError(ActstoreError):
    """Stored bytes are not what FORMAT.md says: damaged, missing or of a newer format."""

    exit_code = 6


class MissingDependencyError(ActstoreError, ImportError):
    """An optional package is needed and not installed."""

    exit_code = 7

    __str__ = ActstoreError.__str__
