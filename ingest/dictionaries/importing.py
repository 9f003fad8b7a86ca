"""How does a dictionary that another library trained come into a store?"""

import os
from dataclasses import dataclass
from typing import Final

from actstore.dictionary_data import DictionaryData
from actstore.errors import ErrorKind, InvalidInputError
from actstore.names import check_name
from actstore.store import Store, open_store

from .dictionary_learning import read_dictionary_learning
from .foreign import Notes, Wanted
from .locate import SourceFiles, find_dictionary
from .saelens import read_saelens
from .save import save_dictionary
from .sparsify import read_sparsify

_READERS: Final = {
    "saelens": read_saelens,
    "sparsify": read_sparsify,
    "dictionary_learning": read_dictionary_learning,
}


@dataclass(frozen=True, slots=True)
class ImportDictionaryReport:
    """What `import_dictionary` did."""

    dictionary: str
    format: str
    """Which library's files they were."""
    kind: str
    activation: str
    d_in: int
    d_out: int
    n_latents: int
    k: int | float | None
    hook_point: str
    hook_point_out: str | None
    commit: str | None
    """Commit on the hub; None for a local folder."""
    nbytes: int
    """Stored bytes."""
    version: int
    """The version that has it."""
    is_new: bool
    """False if the store had exactly this."""
    notes: tuple[str, ...]
    """What a person should know before using it."""


def import_dictionary(
    store: Store | str | os.PathLike[str],
    source: str | os.PathLike[str],
    name: str,
    *,
    format: str = "auto",
    revision: str | None = None,
    hook_point: str | None = None,
    hook_point_out: str | None = None,
    norm_factor: float | None = None,
    center: bool = False,
    cache_dir: str | None = None,
    offline: bool = False,
) -> ImportDictionaryReport:
    """Store a dictionary that SAELens, sparsify or dictionary_learning trained, and return what was done.

    Codes are then those of the library's own `encode`, in float32. Idempotent: the same dictionary again writes nothing.
    Memory: twice the weights as float32.

    Args:
        store: The store, or where it is (made if absent).
        source: Folder of one dictionary, or `owner/repository[/folder]` on the Hugging Face hub.
        name: What to call it.
        format: `saelens`, `sparsify` or `dictionary_learning`; `auto` goes by the names of the files.
        revision: On the hub: branch, tag or commit; the commit is recorded.
        hook_point: Where its rows come from, if its files do not say or are wrong.
        hook_point_out: Where a transcoder's output belongs, likewise.
        norm_factor: What rows are multiplied with first, for SAELens's `expected_average_only_in`.
        center: Whether each row's mean is taken from it first, for dictionaries trained on a model whose writing weights
            TransformerLens centred.
        cache_dir: Folder of the hub's cache; None for its default.
        offline: Whether to look in that cache only.

    Raises:
        NotFoundError: no such folder, or nothing to be had from the hub.
        InvalidInputError: pickled or damaged files, an architecture that is not known, weights that do not fit the configuration
            or are not finite, or no hook point.
        ConflictError: the name is taken by another dictionary.
        StorageError: the store cannot be written.
    """
    check_name(name, what="dictionary name")
    files = find_dictionary(source, format=format, revision=revision, cache_dir=cache_dir, offline=offline)
    notes = Notes()
    data = read_dictionary(files, Wanted(hook_point, hook_point_out, norm_factor, center), notes)
    where = {"source": os.fspath(source), **({"commit": files.commit} if files.commit else {})}
    data = DictionaryData(data.spec, data.weights, {**data.info, **where})
    opened = store if isinstance(store, Store) else open_store(store, create=True)
    before = opened.refresh().version
    saved = save_dictionary(opened, name, data)
    spec = saved.spec
    return ImportDictionaryReport(
        dictionary=name,
        format=files.format,
        kind=spec.kind,
        activation=spec.activation,
        d_in=spec.d_in,
        d_out=spec.d_out,
        n_latents=spec.n_latents,
        k=spec.k,
        hook_point=spec.hook_point,
        hook_point_out=spec.hook_point_out,
        commit=files.commit,
        nbytes=saved.collection.nbytes,
        version=saved.collection.version,
        is_new=saved.collection.version > before,
        notes=tuple(notes.lines),
    )


def read_dictionary(files: SourceFiles, wanted: Wanted, notes: Notes) -> DictionaryData:
    """Return the dictionary that another library's files hold; things worth knowing are added to `notes`.

    Raises:
        InvalidInputError: damaged or unknown files.
    """
    try:
        return _READERS[files.format](files, wanted, notes)
    except InvalidInputError as error:
        if error.kind is not ErrorKind.BAD_ARGUMENT:
            raise
        raise InvalidInputError(
            ErrorKind.BAD_MODEL,
            f"the {files.format} dictionary in {files.folder!r} cannot be used: {error.message}",
        ) from error
