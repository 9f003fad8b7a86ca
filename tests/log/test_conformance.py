"""Does the reader make of every conformance case what FORMAT.md says? The cases come from code that shares nothing with ours."""

import json
import uuid
from pathlib import Path
from typing import Any

import pytest

from actstore.errors import FormatError
from actstore.log import CommitLog, State, fsck
from actstore.storage import MemoryStorage, Storage
from tests.log import make_conformance

CASES = sorted(make_conformance.FOLDER.glob("*.json"))


def stored(objects: dict[str, str]) -> Storage:
    storage = MemoryStorage(f"case-{uuid.uuid4().hex[:12]}")
    for key, text in objects.items():
        storage.put_new(key, [text.encode()])
    return storage


def summary(state: State) -> dict[str, Any]:
    return {
        "version": state.version,
        "collections": {
            f"{c.kind}/{c.id}": {
                "fingerprint": c.fingerprint,
                "epoch": c.epoch,
                "sealed": c.is_sealed,
                "units": {str(u.unit): [u.rows, u.attempt, u.version] for u in c.units.values()},
            }
            for c in state.collections.values()
        },
        "tombs": sorted(state.tombs),
    }


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_case(path: Path) -> None:
    case = json.loads(path.read_text())
    storage = stored(case["objects"])
    if "state" in case:
        assert summary(CommitLog(storage).latest()) == case["state"]
        return
    with pytest.raises(FormatError) as caught:
        CommitLog(storage).latest()
    assert caught.value.kind == case["error"], caught.value
    assert not fsck(storage, deep=False).is_clean


def test_there_are_cases_of_both_sorts() -> None:
    sorts = [("state" in json.loads(path.read_text())) for path in CASES]
    assert sorts.count(True) >= 8
    assert sorts.count(False) >= 50


def test_the_cases_are_what_their_generator_writes(tmp_path: Path) -> None:
    make_conformance.main(tmp_path)
    assert {p.name: p.read_text() for p in tmp_path.glob("*")} == {p.name: p.read_text() for p in CASES}
