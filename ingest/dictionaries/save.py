"""How does a dictionary come into a store, all at once? (FORMAT.md, section 9.1)

Its weights are written as one object under a key of this attempt's own, and one commit creates, fills and seals the
collection: before it there is no dictionary, behind it a whole one.
"""

import uuid
from collections.abc import Mapping
from typing import Any

from actstore.dictionary import Dictionary
from actstore.dictionary_data import DictionaryData
from actstore.dictionary_file import pack_weights
from actstore.errors import ConflictError, ErrorKind, NotFoundError
from actstore.log import fingerprint
from actstore.log.values import Action, Add, Collection, Create, Seal
from actstore.names import check_name
from actstore.storage import write_new
from actstore.store import Store

KIND = "dictionary"


def save_dictionary(store: Store, name: str, data: DictionaryData) -> Dictionary:
    """Return the dictionary `name` of the store, which now holds `data`, durably; moves `store` to its newest version.

    Idempotent: a dictionary of that name with the same settings and weights is success and writes nothing (its `info` stays).

    Args:
        store: Where to.
        name: 1 to 64 characters of `A-Z a-z 0-9 _ . @ -`; codes are named after it, so rather without `@`.
        data: What to store.

    Raises:
        InvalidInputError: a name that cannot be.
        ConflictError: CONFIG_DIFFERS: the name is taken by another dictionary.
        StorageError: it could not be written.
    """
    check_name(name, what="dictionary name")
    config = data.spec.config(data.weights_sha256)
    existing = find_same(store, name, config)
    if existing is not None:
        return existing
    attempt = uuid.uuid4().hex
    obj = write_new(
        store.storage, f"dictionaries/{name}/weights-{attempt}.safetensors", pack_weights(data.weights)
    )
    n_latents = data.spec.n_latents
    actions: list[Action] = [
        Create(KIND, name, config, data.info),
        Add(KIND, name, 0, fingerprint(config), 0, n_latents, 0, attempt, (obj,)),
        Seal(KIND, name, 0, 1, n_latents, ()),
    ]
    try:
        store.log.commit(actions, txn=uuid.uuid4().hex)
    except ConflictError:
        existing = find_same(
            store, name, config
        )  # someone saved the name meanwhile: perhaps the same dictionary
        if existing is None:
            raise
        return existing
    return store.refresh().dictionary(name)


def find_same(store: Store, name: str, config: Mapping[str, Any]) -> Dictionary | None:
    """Return the dictionary `name` if the newest version has it with this configuration, None if it has none of that name.

    Raises:
        ConflictError: it has another one.
    """
    try:
        found = store.refresh().state.collection(KIND, name)
    except NotFoundError:
        return None
    if found.fingerprint != fingerprint(config):
        raise ConflictError(
            ErrorKind.CONFIG_DIFFERS,
            f"dictionary {name!r} exists and is another one ({_differences(found, config)}): take another name",
        )
    return Dictionary(found, store.objects)


def _differences(found: Collection, config: Mapping[str, Any]) -> str:
    keys = [k for k in config if found.config.get(k) != config[k]] + [
        k for k in found.config if k not in config
    ]
    shown = [f"{k}: {found.config.get(k)!r:.60} there, {config.get(k)!r:.60} here" for k in keys[:3]]
    return "; ".join([*shown, *([f"and {len(keys) - 3} more"] if len(keys) > 3 else [])])
