"""What does a store hold, and how is it opened, pinned and asked?"""

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actstore._lazy import lazy_import
from actstore.checks import check_whole
from actstore.corpus import Corpus
from actstore.errors import ErrorKind, InvalidInputError
from actstore.log import CommitLog, State
from actstore.objects import ObjectReader
from actstore.run import Run
from actstore.storage import Storage, open_storage
from actstore.tokenization import Tokenization

if TYPE_CHECKING:
    from actstore.dictionary import Dictionary
    from actstore.result import Result

CACHE_BYTES = 8 << 30
"""Default bound of the local copies of a remote store's tables: about 2e9 tokens' tables."""


class Store:
    """One store at one version: everything asked of it is answered from exactly that version.

    Safe for use from many threads. Pickles by URL and version, so that Ray actors and spawned processes open their own.
    """

    def __init__(
        self,
        storage: Storage,
        state: State,
        *,
        log: CommitLog,
        objects: ObjectReader,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.storage = storage
        self.state = state
        self.log = log
        self.objects = objects
        self.storage_options = storage_options
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Store({self.storage.url!r}, version={self.version}, runs={[r.id for r in self.runs()]})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reopen, (self.storage.url, self.version, self.storage_options))

    @property
    def url(self) -> str:
        """Where the store is, without credentials."""
        return self.storage.url

    @property
    def version(self) -> int:
        """The version that every answer comes from."""
        return self.state.version

    def at(self, version: int) -> "Store":
        """Return the same store pinned at an earlier version.

        Raises:
            NotFoundError: there is no such version.
        """
        return self._with_state(self.log.at(_check_version(version)))

    def latest(self) -> "Store":
        """Return the same store at its newest version; one small read when nothing is new."""
        return self._with_state(self.log.refresh(self.state))

    def refresh(self) -> "Store":
        """Move this object to the newest version and return it; never back, whatever other threads do."""
        newest = self.log.refresh(self.state)
        with self._lock:
            if newest.version > self.state.version:
                self.state = newest
        return self

    def corpora(self) -> list[Corpus]:
        """Return every corpus, by name."""
        return [self.corpus(name) for name in self._ids("corpus")]

    def corpus(self, name: str) -> Corpus:
        """Return a corpus.

        Raises:
            NotFoundError: no corpus of that name; the message lists what there is.
        """
        return Corpus(self.state.collection("corpus", name), self.objects)

    def tokenizations(self) -> list[Tokenization]:
        """Return every tokenization, by id."""
        return [self.tokenization(name) for name in self._ids("tokenization")]

    def tokenization(self, name: str) -> Tokenization:
        """Return a tokenization by its id.

        Raises:
            NotFoundError: no such tokenization.
        """
        collection = self.state.collection("tokenization", name)
        return Tokenization(collection, self.corpus(collection.config["corpus"]), self.objects)

    def runs(self) -> list[Run]:
        """Return every run, by name; unfinished ones too."""
        return [self.run(name) for name in self._ids("run")]

    def run(self, name: str) -> Run:
        """Return a run by its name.

        Raises:
            NotFoundError: no run of that name; the message lists what there is.
        """
        return Run(self, self.state.collection("run", name))

    def dictionaries(self) -> list["Dictionary"]:
        """Return every dictionary, by name."""
        return [self.dictionary(name) for name in self._ids("dictionary")]

    def dictionary(self, name: str) -> "Dictionary":
        """Return a dictionary (a sparse autoencoder or transcoder) by its name; its weights are read when first asked for.

        Raises:
            NotFoundError: no dictionary of that name; the message lists what there is.
        """
        from actstore.dictionary import Dictionary

        return Dictionary(self.state.collection("dictionary", name), self.objects)

    def sql(self, query: str, params: Sequence[Any] | None = None, **options: Any) -> "Result":
        """Return the answer to one SELECT over the store's views; see `actstore.query.sql.sql`."""
        module = lazy_import("actstore.query.sql", needed_for="sql()", extra="query")
        answer: Result = module.sql(self, query, params, **options)
        return answer

    def _ids(self, kind: str) -> list[str]:
        return sorted(id for k, id in self.state.collections if k == kind)

    def _with_state(self, state: State) -> "Store":
        return Store(
            self.storage, state, log=self.log, objects=self.objects, storage_options=self.storage_options
        )


def open_store(
    url: str | os.PathLike[str],
    *,
    create: bool = False,
    version: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> Store:
    """Return the store at `url`.

    Args:
        url: A folder, or an s3://, gs:// or az:// URL without credentials in it.
        create: Make an empty store when there is none; an existing one is opened as it is.
        version: Pin this version instead of the newest.
        storage_options: Passed to the object store's client (endpoint, credentials); never stored or printed.
        cache_dir: Where checked copies of a remote store's tables are kept; default: the user's cache folder.
        cache_bytes: Bound of that cache.

    Raises:
        NotFoundError: there is no store at `url` (and `create` is false), or no such version.
        InvalidInputError: `url` is no path or URL of a store, or `version` no whole number.
        FormatError: the store is damaged, its history is cut short, or it is of a newer format.
        StorageError: the storage cannot be reached, or `create` on one that cannot be written safely.

    >>> store = open_store("memory://doctest-open", create=True)
    >>> store.version, store.runs()
    (0, [])
    """
    if version is not None:
        version = _check_version(version)
    storage = open_storage(_check_url(url), create=create, storage_options=storage_options)
    log = CommitLog(storage)
    state = log.create() if create else log.latest()
    if version is not None:
        state = log.at(version)
    cache = None if cache_dir is None else Path(cache_dir)
    objects = ObjectReader(storage, cache_dir=cache, cache_bytes=cache_bytes)
    return Store(storage, state, log=log, objects=objects, storage_options=storage_options)


def _check_url(url: str | os.PathLike[str]) -> str:
    path = os.fspath(url) if isinstance(url, str | os.PathLike) else url
    if not isinstance(path, str):
        raise InvalidInputError(
            ErrorKind.BAD_URL, f"a store is opened by its path or URL, got {url!r:.80}: give it as text"
        )
    return path


def _check_version(version: int) -> int:
    # Negative ones are told apart from those of the store where the store's are known.
    return check_whole(version, what="version", least=-(1 << 63))


def _reopen(url: str, version: int, storage_options: Mapping[str, Any] | None) -> Store:
    return open_store(url, version=version, storage_options=storage_options)
