"""Writes tests/data/conformance/*.json from the rules of FORMAT.md alone, without any code of actstore.

    python -m tests.log.make_conformance

Each case is a list of objects (key to text) and what a reader must make of them: the expected state, spelled out by hand
below, or the kind of the error. Only framing and hashing are computed here, with the standard library.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "data" / "conformance"
FP_CONFIG = {"rows_per_unit": 4, "name": "é"}
A, B = "aa" * 16, "bb" * 16
SHA = "01" * 32

Plain = dict[str, Any]


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def framed(value: object) -> bytes:
    line = canonical(value) + b"\n"
    return line + b"%08x\n" % zlib.crc32(line)


def state_hash(entries: Sequence[Plain]) -> str:
    total = sum(int(hashlib.sha256(canonical(entry)).hexdigest(), 16) for entry in entries)
    return f"{total % 2**256:064x}"


FP = hashlib.sha256(canonical(FP_CONFIG)).hexdigest()


def obj(key: str, nbytes: int = 10) -> Plain:
    return {"key": key, "nbytes": nbytes, "sha256": SHA}


def create(id: str = "r", config: Plain = FP_CONFIG) -> Plain:
    return {"op": "create", "kind": "run", "id": id, "config": config, "info": {"by": "hand"}}


def add(unit: int, rows: int, attempt: str = A, **changes: Any) -> Plain:
    plain = {
        "op": "add",
        "kind": "run",
        "id": "r",
        "epoch": 0,
        "fingerprint": FP,
        "unit": unit,
        "rows": rows,
        "nonfinite": 0,
    }
    return {
        **plain,
        "attempt": attempt,
        "objects": [obj(f"runs/r/{unit}-{attempt}")],
        "meta": {"n": unit},
        **changes,
    }


def seal(units: int, rows: int, **changes: Any) -> Plain:
    plain = {"op": "seal", "kind": "run", "id": "r", "epoch": 0, "units": units, "rows": rows}
    return {**plain, "objects": [obj("runs/r/zarr.json", 7)], "meta": {}, **changes}


def fence(epoch: int) -> Plain:
    return {"op": "fence", "kind": "run", "id": "r", "epoch": epoch}


def tomb(*keys: str) -> Plain:
    return {"op": "tomb", "keys": list(keys), "not_before": "2026-02-01T00:00:00Z"}


FORMAT = {"op": "format", "reader_min": 1, "writer_min": 1, "features": []}


def e_format() -> Plain:
    return {"entry": "format", **FORMAT}


def e_collection(version: int = 1) -> Plain:
    return {
        "entry": "collection", "kind": "run", "id": "r", "config": FP_CONFIG, "info": {"by": "hand"}, "version": version
    }  # fmt: skip


def e_unit(unit: int, rows: int, version: int, attempt: str = A) -> Plain:
    plain = {k: v for k, v in add(unit, rows, attempt).items() if k not in ("op", "epoch", "fingerprint")}
    return {"entry": "unit", **plain, "version": version}


def e_txns(n: int) -> list[Plain]:
    return [{"entry": "txn", "txn": f"t{v}", "version": v} for v in range(n)]


def after(collections: int, units: int, rows: int, nbytes: int, entries: Sequence[Plain]) -> Plain:
    return {
        "collections": collections,
        "units": units,
        "rows": rows,
        "bytes": nbytes,
        "state": state_hash(entries),
    }


Step = tuple[list[Plain], Plain]


def chain(steps: Sequence[Step], change: Callable[[int, Plain], None] | None = None) -> dict[str, str]:
    """Return key to text of the manifests with these actions and `after`; `change` may spoil one before it is framed."""
    objects: dict[str, str] = {}
    parent = None
    for v, (acts, end) in enumerate(steps):
        plain = {
            "fmt": "AM-1", "v": v, "parent": parent, "txn": f"t{v}", "t": "2026-01-01T00:00:00Z", "acts": acts, "after": end,
            "writer": {"host": "h", "pid": 1, "version": "0.1.0"},
        }  # fmt: skip
        if change is not None:
            change(v, plain)
        data = framed(plain)
        parent = hashlib.sha256(data).hexdigest()
        objects[f"manifests/{v:020}.json"] = data.decode()
    return objects


START: Step = ([FORMAT], after(0, 0, 0, 0, [e_format(), *e_txns(1)]))
CREATED: Step = ([create()], after(1, 0, 0, 0, [e_format(), e_collection(), *e_txns(2)]))
ONE: Step = ([add(3, 4)], after(1, 1, 4, 10, [e_format(), e_collection(), e_unit(3, 4, 2), *e_txns(3)]))
E_ONE = [e_format(), e_collection(), e_unit(3, 4, 2)]
E_SEAL = {"entry": "seal", **seal(2, 6)}
E_EPOCH = {"entry": "epoch", "kind": "run", "id": "r", "epoch": 2}
E_TOMB = {"entry": "tomb", "key": f"runs/r/9-{B}", "not_before": "2026-02-01T00:00:00Z"}
TWO_SEALED: Step = (
    [add(0, 2, B), seal(2, 6)],
    after(1, 2, 6, 27, [*E_ONE, e_unit(0, 2, 3, B), E_SEAL, *e_txns(4)]),
)
FENCED: Step = ([fence(2)], after(1, 1, 4, 10, [*E_ONE, E_EPOCH, *e_txns(4)]))
TOMBED: Step = ([tomb(f"runs/r/9-{B}")], after(1, 1, 4, 10, [*E_ONE, E_TOMB, *e_txns(4)]))


def state(
    version: int,
    units: dict[str, list[Any]],
    *,
    epoch: int = 0,
    sealed: bool = False,
    tombs: Sequence[str] = (),
) -> Plain:
    run = {"fingerprint": FP, "epoch": epoch, "sealed": sealed, "units": units}
    return {"version": version, "collections": {"run/r": run}, "tombs": list(tombs)}


GOOD: dict[str, tuple[Sequence[Step], Plain]] = {
    "empty-store": ((START,), {"version": 0, "collections": {}, "tombs": []}),
    "created": ((START, CREATED), state(1, {})),
    "one-unit": ((START, CREATED, ONE), state(2, {"3": [4, A, 2]})),
    "sealed": ((START, CREATED, ONE, TWO_SEALED), state(3, {"0": [2, B, 3], "3": [4, A, 2]}, sealed=True)),
    "fenced": ((START, CREATED, ONE, FENCED), state(3, {"3": [4, A, 2]}, epoch=2)),
    "tombed": ((START, CREATED, ONE, TOMBED), state(3, {"3": [4, A, 2]}, tombs=[f"runs/r/9-{B}"])),
}

BASE = (START, CREATED, ONE)
ANY = after(1, 1, 4, 10, [])


def then(*acts: Plain) -> dict[str, str]:
    return chain((*BASE, (list(acts), ANY)))


def spoilt(version: int, **fields: Any) -> dict[str, str]:
    return chain(BASE, lambda v, plain: plain.update(fields) if v == version else None)


def text(change: Callable[[str], str], version: int = 2) -> dict[str, str]:
    objects = chain(BASE)
    key = f"manifests/{version:020}.json"
    return {**objects, key: change(objects[key])}


def without(version: int) -> dict[str, str]:
    objects = chain((*BASE, TWO_SEALED))
    del objects[f"manifests/{version:020}.json"]
    return objects


def hinted(**fields: Any) -> dict[str, str]:
    objects = chain(BASE)
    sha256 = hashlib.sha256(objects[f"manifests/{2:020}.json"].encode()).hexdigest()
    return {**objects, "_hint": framed({"v": 2, "sha256": sha256, "checkpoint": None, **fields}).decode()}


def reframed(line: str) -> str:
    body = line.encode() + b"\n"
    return (body + b"%08x\n" % zlib.crc32(body)).decode()


def shuffled(manifest: str) -> str:
    plain = json.loads(manifest.split("\n")[0])
    return reframed(json.dumps(dict(reversed(plain.items())), separators=(",", ":"), ensure_ascii=False))


def spaced(manifest: str) -> str:
    return reframed(manifest.split("\n")[0].replace('"v":2', '"v": 2'))


BROKEN, DAMAGED, NEW, CUT = "invariant-broken", "manifest-damaged", "format-too-new", "history-truncated"
BAD: dict[str, tuple[dict[str, str], str]] = {
    "wrong-parent": (spoilt(2, parent="00" * 32), BROKEN),
    "wrong-state-hash": (spoilt(2, after={**ONE[1], "state": "00" * 32}), BROKEN),
    "wrong-row-count": (spoilt(2, after={**ONE[1], "rows": 5}), BROKEN),
    "wrong-byte-count": (spoilt(2, after={**ONE[1], "bytes": 11}), BROKEN),
    "transaction-twice": (spoilt(2, txn="t1"), BROKEN),
    "format-twice": (then(FORMAT), BROKEN),
    "no-format": (chain((([create()], START[1]),)), BROKEN),
    "unit-live-twice": (then(add(3, 4, B)), BROKEN),
    "unit-twice-in-one-version": (then(add(5, 1), add(5, 1, B)), BROKEN),
    "unknown-collection": (then(add(5, 1, id="other")), BROKEN),
    "wrong-fingerprint": (then(add(5, 1, fingerprint="00" * 32)), BROKEN),
    "epoch-from-nowhere": (then(add(5, 1, epoch=1)), BROKEN),
    "add-by-a-fenced-writer": (then(fence(2), add(5, 1, epoch=1)), BROKEN),
    "seal-by-a-fenced-writer": (then(fence(2), seal(1, 4, epoch=1)), BROKEN),
    "fence-backwards": (then(fence(2), fence(1)), BROKEN),
    "fence-to-the-same-epoch": (then(fence(2), fence(2)), BROKEN),
    "seal-with-wrong-units": (then(seal(2, 4)), BROKEN),
    "seal-with-wrong-rows": (then(seal(1, 5)), BROKEN),
    "sealed-twice": (then(seal(1, 4), seal(1, 4)), BROKEN),
    "add-after-seal": (then(seal(1, 4), add(5, 1)), BROKEN),
    "created-twice": (then(create()), BROKEN),
    "created-twice-but-for-case": (then(create("R")), BROKEN),
    "tomb-of-a-live-object": (then(tomb(f"runs/r/3-{A}")), BROKEN),
    "add-of-a-tombstoned-object": (then(tomb(f"runs/r/5-{A}"), add(5, 1)), BROKEN),
    "tombed-twice": (then(tomb("runs/r/x"), tomb("runs/r/x")), BROKEN),
    "version-in-another-place": (spoilt(2, v=3), DAMAGED),
    "no-parent": (spoilt(2, parent=None), DAMAGED),
    "version-0-with-a-parent": (spoilt(0, parent="00" * 32), DAMAGED),
    "trailing-byte": (text(lambda t: t + "\n"), DAMAGED),
    "without-its-last-byte": (text(lambda t: t[:-1]), DAMAGED),
    "empty-line-before": (text(lambda t: "\n" + t), DAMAGED),
    "crc-in-capitals": (text(lambda t: t[:-9] + t[-9:].upper()), DAMAGED),
    "keys-in-another-order": (text(shuffled), DAMAGED),
    "a-space": (text(spaced), DAMAGED),
    "no-actions": (spoilt(2, acts=[]), DAMAGED),
    "not-an-object": (text(lambda t: reframed("[]")), DAMAGED),
    "missing-field": (then({k: v for k, v in add(5, 1).items() if k != "meta"}), DAMAGED),
    "negative-rows": (then(add(5, -1)), DAMAGED),
    "float-rows": (then(add(5, 1.0)), DAMAGED),
    "key-leaves-the-store": (then(add(5, 1, objects=[obj("../outside")])), DAMAGED),
    "absolute-key": (then(add(5, 1, objects=[obj("/etc/passwd")])), DAMAGED),
    "key-in-the-log": (then(add(5, 1, objects=[obj(f"manifests/{9:020}.json")])), DAMAGED),
    "tomb-in-the-log": (then(tomb(f"manifests/{1:020}.json")), DAMAGED),
    "empty-object": (then(add(5, 1, objects=[obj("runs/r/x", 0)])), DAMAGED),
    "object-twice": (then(add(5, 1, objects=[obj("runs/r/x"), obj("runs/r/x")])), DAMAGED),
    "bad-id": (then(create("../x")), DAMAGED),
    "reserved-id": (then(create("nul")), DAMAGED),
    "newer-manifest": (spoilt(2, fmt="AM-2"), NEW),
    "newer-operation": (then({"op": "replace", "units": [3]}), NEW),
    "newer-field": (then(add(5, 1, compressed=True)), NEW),
    "newer-reader": (chain((([{**FORMAT, "reader_min": 2, "writer_min": 2}], START[1]),)), NEW),
    "unknown-feature": (chain((([{**FORMAT, "features": ["quantized"]}], START[1]),)), NEW),
    "first-version-gone": (without(0), CUT),
    "middle-version-gone": (without(2), CUT),
    "hint-beyond-the-end": (hinted(v=3), CUT),
    "hint-of-another-history": (hinted(sha256="00" * 32), CUT),
}


def main(folder: Path = FOLDER) -> None:
    """Write one file per case."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = {name: {"objects": chain(steps), "state": end} for name, (steps, end) in GOOD.items()}
    cases["one-unit-with-hint"] = {"objects": hinted(), "state": GOOD["one-unit"][1]}
    cases["damaged-hint"] = {"objects": {**hinted(), "_hint": "x"}, "state": GOOD["one-unit"][1]}
    cases |= {name: {"objects": objects, "error": kind} for name, (objects, kind) in BAD.items()}
    for name, case in cases.items():
        (folder / f"{name}.json").write_text(
            json.dumps(case, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        )


if __name__ == "__main__":
    main()
