"""What does the store hold at one version? The values of the version log (FORMAT.md, section 4).

A store is a set of *collections*: corpora, tokenizations, runs, and whatever later capabilities add. All follow one life:
`Create` fixes a configuration and its fingerprint; `Add` makes one unit of it live; `Seal` says that it is complete and
lists the objects that belong to the whole. `Fence` gives it a new epoch, so that writers of an older epoch can commit
nothing more. `Tomb` announces the deletion of objects that nothing refers to. A manifest is one list of such actions, and
the state is their fold.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Json: TypeAlias = Mapping[str, Any]
"""A JSON object: strings, integers, finite floats, booleans, None, lists and objects."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One object as the manifest promises it; every reader checks it against this."""

    key: str
    """Relative key, see `actstore.names.check_key`."""

    nbytes: int
    """Length in bytes."""

    sha256: str
    """SHA-256 of its bytes, 64 lower-case hex digits."""


@dataclass(frozen=True, slots=True)
class Format:
    """The first action of version 0: who may read and write this store."""

    reader_min: int
    writer_min: int
    features: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Create:
    """A new, empty collection at epoch 0."""

    kind: str
    """`corpus`, `tokenization`, `run`; later capabilities add kinds."""

    id: str
    """Unique per kind, also when case is ignored."""

    config: Json
    """Everything that shapes the data. Its canonical JSON is hashed to the collection's fingerprint."""

    info: Json
    """What a person wants to know and nothing depends on: paths, times, host, versions."""


@dataclass(frozen=True, slots=True)
class Fence:
    """From here on only writers of `epoch` (or later) commit to the collection."""

    kind: str
    id: str
    epoch: int
    """Must be greater than the collection's present epoch."""


@dataclass(frozen=True, slots=True)
class Add:
    """One unit becomes live, unless it is live already: the first committed attempt wins."""

    kind: str
    id: str
    epoch: int
    fingerprint: str
    """Of the configuration the writer worked by; must be the collection's."""

    unit: int
    rows: int
    """Token rows of a tokenization or run, documents of a corpus."""

    nonfinite: int
    """NaN or infinite values among the unit's numbers, all hook points together."""

    attempt: str
    """UUID of the attempt that wrote the unit, 32 hex digits."""

    objects: tuple[StoredObject, ...]
    meta: Json = field(default_factory=dict)
    """What readers need to plan without opening the objects."""


@dataclass(frozen=True, slots=True)
class Seal:
    """The collection is complete: no unit is ever added again."""

    kind: str
    id: str
    epoch: int
    units: int
    """Number of live units; must be right."""

    rows: int
    """Sum of their rows; must be right."""

    objects: tuple[StoredObject, ...]
    meta: Json = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Tomb:
    """These keys, referred to by nothing live, may be deleted after `not_before`."""

    keys: tuple[str, ...]
    not_before: str
    """RFC 3339, UTC. It only delays a deletion; no decision about data rests on it."""


Action: TypeAlias = Format | Create | Fence | Add | Seal | Tomb


@dataclass(frozen=True, slots=True)
class Unit:
    """A live unit."""

    unit: int
    rows: int
    nonfinite: int
    attempt: str
    objects: tuple[StoredObject, ...]
    meta: Json
    version: int
    """The version that made it live."""


@dataclass(frozen=True, slots=True)
class Collection:
    """One collection as of a version."""

    kind: str
    id: str
    config: Json
    fingerprint: str
    """SHA-256 of the canonical JSON of `config`, hex."""

    info: Json
    version: int
    """The version that created it."""

    epoch: int = 0
    units: Mapping[int, Unit] = field(default_factory=dict)
    """Live units by number; what `State` hands out iterates in ascending order."""

    seal: Seal | None = None
    rows: int = 0
    """Sum over live units."""

    nbytes: int = 0
    """Stored bytes of live units and of the seal."""

    nonfinite: int = 0

    @property
    def is_sealed(self) -> bool:
        """Whether the collection is complete."""
        return self.seal is not None
