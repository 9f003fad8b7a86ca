"""Sources that are damaged, cut short, changed or not what they say; and imports that are killed at every operation."""

import contextlib
import os
import pickle
import shutil
import uuid
from pathlib import Path

import numpy as np
import pytest

import actstore
from actstore.errors import ActstoreError, ConflictError, ErrorKind, InvalidInputError, NotFoundError
from actstore.ingest.foreign import import_run
from actstore.ingest.foreign.safetensors_file import open_safetensors
from actstore.log import CommitLog, fsck
from actstore.objects import ObjectReader
from actstore.storage import MemoryStorage, Storage
from actstore.store import Store
from actstore.testing.faults import Fault, FaultStorage, Killed
from tests.ingest.foreign_sources import (
    random_documents,
    stored,
    token_columns,
    write_saelens,
    write_table,
    write_vllm,
)

WIDTH = 4
ARRAY = {"hook_points": "embed"}


def refused(store: Path, source: Path, match: str, **asked) -> InvalidInputError:
    """The import is refused, and leaves no run behind."""
    with pytest.raises(InvalidInputError, match=match) as caught:
        import_run(str(store), "r", source, **asked)
    if store.exists():
        found = actstore.open(str(store))
        assert not any(run.is_complete for run in found.runs())
        assert fsck(found.storage, deep=True).is_clean
    return caught.value


def saelens(folder: Path, n: int = 12) -> Path:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 50, (n, 8)).astype(np.int32)
    return write_saelens(folder, "hook_embed", rng.normal(size=(n, 8, WIDTH)).astype(np.float32), ids)


def vllm(folder: Path, n: int = 5) -> Path:
    import torch

    documents = random_documents(np.random.default_rng(1), n, 50, 12)
    return write_vllm(folder, documents, [torch.randn(len(d), 2, WIDTH).bfloat16() for d in documents])


def arrays(folder: Path, n: int = 5) -> Path:
    folder.mkdir()
    documents = random_documents(np.random.default_rng(2), n, 50, 12)
    rows = sum(map(len, documents))
    np.save(folder / "hook_embed.npy", np.random.default_rng(3).normal(size=(rows, WIDTH)).astype(np.float32))
    write_table(folder / "tokens.parquet", token_columns(documents))
    return folder


MAKERS = {
    "saelens": (saelens, None),
    "vllm": (vllm, ["embed", "layers.0.resid_post"]),
    "arrays": (arrays, None),
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, "last byte", "last eight"])
def test_cut_files(tmp_path, kind, share):
    make, names = MAKERS[kind]
    folder = make(tmp_path / "source")
    victim = sorted(p for p in folder.iterdir() if p.suffix in (".arrow", ".safetensors", ".npy"))[-1]
    data = victim.read_bytes()
    kept = (
        {"last byte": len(data) - 1, "last eight": len(data) - 8}.get(share)
        if isinstance(share, str)
        else None
    )
    victim.write_bytes(data[: int(len(data) * share) if kept is None else kept])
    error = refused(tmp_path / "s", folder, "whole|cut short", hook_points=names, format=kind)
    assert error.kind is ErrorKind.BAD_ACTIVATIONS
    assert str(victim) in str(error)


@pytest.mark.parametrize("kind", MAKERS)
def test_grown_or_missing_files(tmp_path, kind):
    make, names = MAKERS[kind]
    folder = make(tmp_path / "source")
    victim = sorted(p for p in folder.iterdir() if p.suffix in (".arrow", ".safetensors", ".npy"))[-1]
    with victim.open("ab") as file:
        file.write(b"\0" * 16)
    refused(tmp_path / "s", folder, "whole|cut short|goes on behind", hook_points=names, format=kind)
    victim.unlink()
    if kind != "vllm":  # a folder of requests without one of them is another folder
        with pytest.raises((InvalidInputError, NotFoundError)):
            import_run(str(tmp_path / "s"), "r", folder, hook_points=names, format=kind)


@pytest.mark.parametrize("kind", MAKERS)
def test_any_byte_of_a_header_may_be_wrong(tmp_path, kind):
    """No altered byte ends in anything but an error of ours, or in a run that is whole and sound."""
    make, names = MAKERS[kind]
    rng = np.random.default_rng(4)
    pristine = make(tmp_path / "pristine")
    victim = sorted(p.name for p in pristine.iterdir() if p.suffix in (".arrow", ".safetensors", ".npy"))[-1]
    n_refused = 0
    for i in range(20):
        folder = tmp_path / f"c{i}"
        shutil.copytree(pristine, folder)
        data = bytearray((folder / victim).read_bytes())
        data[int(rng.integers(0, min(400, len(data))))] ^= 1 << int(rng.integers(0, 8))
        (folder / victim).write_bytes(data)
        store = str(tmp_path / f"s{i}")
        try:
            import_run(store, "r", folder, hook_points=names, format=kind)
        except ActstoreError:
            n_refused += 1
        else:
            assert fsck(actstore.open(store).storage, deep=True).is_clean
    assert n_refused > 0


def test_pickles_are_never_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "opened"),))

    np.save(tmp_path / "a.npy", np.array([Trap()], object), allow_pickle=True)
    columns = {"doc_id": [0], "token_id": [0]}
    refused(tmp_path / "s", tmp_path / "a.npy", "no whole .npy file of numbers", tokens=columns, **ARRAY)
    (tmp_path / "b.npy").write_bytes(pickle.dumps([Trap()]))
    refused(tmp_path / "s", tmp_path / "b.npy", "no whole .npy file of numbers", tokens=columns, **ARRAY)
    np.savez(tmp_path / "c.npz", a=np.zeros((1, 2)))
    (tmp_path / "c.npz").rename(tmp_path / "c.npy")
    refused(tmp_path / "s", tmp_path / "c.npy", "no whole .npy file of numbers", tokens=columns, **ARRAY)
    assert not (tmp_path / "opened").exists()


def test_prefix_cached_requests_are_refused(tmp_path):
    import torch
    from safetensors.torch import save_file

    folder = vllm(tmp_path / "hs")
    save_file(
        {"hidden_states": torch.zeros(5, 2, WIDTH).bfloat16(), "token_ids": torch.arange(9)},
        folder / "hs_2.safetensors",
    )
    error = refused(tmp_path / "s", folder, "9 tokens and 5 hidden states", layer_ids=[1, 2])
    assert "enable_prefix_caching=False" in str(error)
    save_file(
        {"hidden_states": torch.zeros(2, 9, WIDTH).bfloat16(), "token_ids": torch.arange(9)},
        folder / "hs_2.safetensors",
    )
    refused(tmp_path / "s", folder, "swap its axes", layer_ids=[1, 2])


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"hidden_states": (9, 2, 4), "token_ids": (9,), "dtype": "float32"}, "the first file BF16"),
        ({"hidden_states": (9, 3, 4), "token_ids": (9,)}, "the first file BF16"),
        ({"hidden_states": (0, 2, 4), "token_ids": (0,)}, "has no token"),
        ({"hidden_states": (9, 2, 4)}, "no tensor 'token_ids'"),
        ({"hidden_states": (9, 2, 4), "token_ids": (9, 1)}, "must be"),
        ({"hidden_states": (9, 2, 4), "token_ids": (9,), "dtype": "float8_e4m3fn"}, "F8_E4M3"),
        ({"hidden_states": (9, 2, 4), "token_ids": (9,), "first": -1}, "token id -1"),
        ({"hidden_states": (9, 2, 4), "token_ids": (9,), "first": 1 << 31}, "token id 2147483648"),
    ],
)
def test_requests_that_do_not_fit(tmp_path, tensors, said):
    import torch
    from safetensors.torch import save_file

    folder = vllm(tmp_path / "hs")
    dtype = getattr(torch, tensors.get("dtype", "bfloat16"))
    made = {"hidden_states": torch.zeros(tensors["hidden_states"]).to(dtype)}
    if "token_ids" in tensors:
        made["token_ids"] = torch.zeros(tensors["token_ids"], dtype=torch.int64)
        if "first" in tensors:
            made["token_ids"][0] = tensors["first"]
    save_file(made, folder / "hs_3.safetensors")
    refused(tmp_path / "s", folder, said, layer_ids=[1, 2])


def test_datasets_that_do_not_fit(tmp_path):
    import datasets

    def save(name: str, columns: dict, features=None) -> Path:
        datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / name))
        return tmp_path / name

    acts = np.zeros((2, 3, WIDTH), np.float32).tolist()
    ids = [[1, 2, 3], [4, 5, 6]]
    for name, columns, said in (
        ("no ids", {"hook_embed": acts}, "no column 'token_ids'"),
        ("no acts", {"token_ids": ids, "hook_embed": ids}, "no column of"),
        ("short", {"token_ids": [[1, 2, 3], [4, 5]], "hook_embed": acts}, "2 tokens and 3 activations"),
        ("ragged", {"token_ids": ids, "hook_embed": [acts[0], [[0.0], [1.0], [2.0]]]}, "of 1 to 4 numbers"),
        ("null", {"token_ids": ids, "hook_embed": [acts[0], [[0.0] * 3 + [None]] * 3]}, "null"),
        ("null ids", {"token_ids": [[1, None, 3], [4, 5, 6]], "hook_embed": acts}, "null"),
        ("empty", {"token_ids": [[], [1, 2, 3]], "hook_embed": [[], acts[0]]}, "has no activation"),
        ("empty later", {"token_ids": [[1, 2, 3], []], "hook_embed": [acts[0], []]}, "has no token"),
        ("text ids", {"token_ids": [["a", "b", "c"]], "hook_embed": acts[:1]}, "not lists of integers"),
    ):
        refused(tmp_path / f"s {name}", save(name, columns), said, dtype="float32")
    folder = saelens(tmp_path / "fine")
    (folder / "state.json").write_text('{"_data_files": [{"filename": "../secret.arrow"}]}')
    refused(tmp_path / "s", folder, "outside of its folder")
    (folder / "state.json").write_text("{")
    refused(tmp_path / "s", folder, "state.json cannot be read")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"token_id": None}, "lacks token_id"),
        ({"doc_id": None}, "lacks doc_id"),
        ({"char_start": [0, 0, 0, 0]}, "lacks char_end"),
        ({"doc_id": [0, 1, 0, 1]}, "comes back"),
        ({"doc_id": ["a", "b", "b", "a"]}, "comes back"),
        ({"token_id": [1, 2, 3]}, "3 rows, .* 4 activations|no table"),
        ({"token_id": [1, 2, None, 4]}, "row 2: 'token_id' is missing"),
        ({"token_id": [1, 2, -3, 4]}, "row 2: token id -3"),
        ({"token_id": [1.0, 2.0, 3.0, 4.5]}, "not integers"),
        ({"position": [0, 0, 0, 1]}, "row 1: position 0 does not come after"),
        ({"position": [-1, 0, 0, 1]}, "row 0: position -1"),
    ],
)
def test_tables_of_tokens_that_do_not_fit(tmp_path, change, said):
    np.save(tmp_path / "a.npy", np.ones((4, 2), np.float32))
    columns = {"doc_id": [0, 0, 1, 1], "token_id": [1, 2, 3, 4], **change}
    columns = {name: values for name, values in columns.items() if values is not None}
    refused(tmp_path / "s", tmp_path / "a.npy", said, tokens=columns, **ARRAY)


def test_tables_and_arrays_of_different_lengths(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((5, 2), np.float32))
    path = write_table(tmp_path / "t.csv", {"doc_id": [0, 0], "token_id": [1, 2]})
    refused(tmp_path / "s", tmp_path / "a.npy", "2 rows, .* 5 activations", tokens=path, **ARRAY)
    np.save(tmp_path / "b.npy", np.ones((4, 2), np.float32))
    names = {"a": "embed", "b": "layers.0.mlp_out"}
    refused(tmp_path / "s", tmp_path, "different lengths", tokens=path, hook_points=names)
    for shape in ((4,), (2, 2, 2), (0, 3)):
        np.save(tmp_path / "b.npy", np.ones(shape, np.float32))
        refused(tmp_path / "s", tmp_path / "b.npy", "has shape", tokens=path, **ARRAY)
    np.save(tmp_path / "b.npy", np.ones((2, 2), np.int32))
    refused(tmp_path / "s", tmp_path / "b.npy", "holds int32", tokens=path, **ARRAY)
    path.write_text("doc_id,token_id\n0,1\n0,x\n")
    refused(tmp_path / "s", tmp_path / "a.npy", "cannot be read", tokens=path, **ARRAY)
    with pytest.raises(NotFoundError):
        import_run(str(tmp_path / "s"), "r", tmp_path / "nothing")
    (tmp_path / "other").mkdir()
    refused(tmp_path / "s", tmp_path / "other", "is neither")


@pytest.mark.parametrize("kind", MAKERS)
def test_numbers_that_are_not_finite(tmp_path, kind):
    import torch
    from safetensors.torch import load_file, save_file

    make, names = MAKERS[kind]
    folder = make(tmp_path / "source")
    if kind == "vllm":
        tensors = load_file(folder / "hs_2.safetensors")
        tensors["hidden_states"][0, 1, 2] = torch.inf
        save_file(tensors, folder / "hs_2.safetensors")
    elif kind == "arrays":
        acts = np.load(folder / "hook_embed.npy")
        acts[3, 1] = np.nan
        np.save(folder / "hook_embed.npy", acts)
    else:
        acts = np.zeros((3, 8, WIDTH), np.float32)
        acts[1, 2, 0] = -np.inf
        shutil.rmtree(folder)
        write_saelens(folder, "hook_embed", acts, np.zeros((3, 8), np.int32))
    error = refused(tmp_path / "s", folder, "NaN or infinite", hook_points=names)
    assert error.kind is ErrorKind.NON_FINITE
    report = import_run(str(tmp_path / "s"), "m", folder, hook_points=names, corpus="r", nonfinite="mask")
    assert report.nonfinite == 1


def test_float64_beyond_float32_counts_as_infinite(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[1e300, 1.0]]))
    asked = {"tokens": {"doc_id": [0], "token_id": [0]}, "dtype": "float32", **ARRAY}
    refused(tmp_path / "s", tmp_path / "a.npy", "NaN or infinite", **asked)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("how", ["full", "sampled"])
def test_a_changed_source_is_refused(tmp_path, kind, how):
    """An import that stopped in the middle does not go on from a source that is another by now."""
    make, names = MAKERS[kind]
    folder = make(tmp_path / "source", 60)
    asked = {"hook_points": names, "rows_per_unit": 16, "fingerprint_files": how}
    store = str(tmp_path / "s")

    def stop(progress):
        if progress.stage == "copy" and progress.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_run(store, "r", folder, progress=stop, **asked)
    assert not actstore.open(store).run("r").is_complete
    victim = sorted(p for p in folder.iterdir() if p.suffix in (".arrow", ".safetensors", ".npy"))[-1]
    data = bytearray(victim.read_bytes())
    data[-9 if kind == "saelens" else -1] ^= 1
    before = victim.read_bytes()
    victim.write_bytes(data)
    with pytest.raises(ConflictError, match="content_sha256"):
        import_run(store, "r", folder, **asked)
    victim.write_bytes(before)
    assert import_run(store, "r", folder, **asked).n_units == len(
        actstore.open(store).run("r").tokenization.units
    )


def test_a_source_that_changes_meanwhile_is_not_sealed(tmp_path):
    folder = arrays(tmp_path / "source", 60)
    data = (folder / "hook_embed.npy").read_bytes()

    def change(progress):
        if progress.stage == "copy" and progress.done == 1:
            os.utime(folder / "hook_embed.npy", ns=(1, 1))

    with pytest.raises(ConflictError, match="was written to"):
        import_run(str(tmp_path / "s"), "r", folder, rows_per_unit=16, progress=change)
    assert not actstore.open(str(tmp_path / "s")).run("r").is_complete
    (folder / "hook_embed.npy").write_bytes(data)
    assert import_run(str(tmp_path / "s"), "r", folder, rows_per_unit=16).units_this_job == 0


def test_tokens_that_change_meanwhile_are_noticed(tmp_path):
    """Not even one unit takes activations of other tokens."""
    folder = saelens(tmp_path / "source", 40)
    other = tmp_path / "other"
    rng = np.random.default_rng(9)
    write_saelens(
        other, "hook_embed", rng.normal(size=(40, 8, WIDTH)).astype(np.float32), rng.integers(0, 50, (40, 8))
    )

    def change(progress):
        if progress.stage == "tokens":
            for path in other.glob("*.arrow"):
                (folder / path.name).write_bytes(path.read_bytes())

    with pytest.raises(InvalidInputError, match="the source changed while it was imported"):
        import_run(str(tmp_path / "s"), "r", folder, rows_per_unit=512, progress=change)
    assert actstore.open(str(tmp_path / "s")).run("r").n_units == 0


def test_safetensors_with_holes_or_overlaps(tmp_path):
    import json

    def write(tensors: dict, nbytes: int) -> Path:
        header = json.dumps(tensors).encode()
        path = tmp_path / "x.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(nbytes))
        return path

    def entry(start: int, stop: int, shape=(2,), dtype="F32") -> dict:
        return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}

    fine = open_safetensors(write({"a": entry(0, 8), "b": entry(8, 16), "__metadata__": {"x": "y"}}, 16))
    assert fine.map("b").tolist() == [0.0, 0.0]
    for tensors, nbytes in (
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12),
        ({"a": entry(0, 8), "b": entry(12, 20)}, 20),
        ({"a": entry(0, 8)}, 12),
        ({"a": entry(0, 8)}, 4),
        ({"a": entry(0, 8, shape=(3,))}, 8),
        ({"a": entry(8, 0)}, 8),
        ({"a": entry(0, 8, shape=(-2, -1))}, 8),
        ({"a": {"dtype": "F32"}}, 8),
        ({"a": 3}, 8),
        ([1], 8),
    ):
        with pytest.raises(InvalidInputError, match="no whole safetensors file"):
            open_safetensors(write(tensors, nbytes))


def open_on(storage: Storage, cache: Path) -> Store:
    log = CommitLog(storage, sleep=lambda seconds: None)
    return Store(
        storage, log.latest(), log=log, objects=ObjectReader(storage, cache_dir=cache, cache_bytes=1 << 30)
    )


def content(store: Store) -> dict[str, object]:
    """What two stores must agree in to be equal: documents, tokens, shard bytes; not attempts, times or versions."""
    run = store.run("r")
    tokenization = run.tokenization
    corpus = tokenization.corpus
    return {
        "config": run.config,
        "sealed": run.is_complete,
        "documents": corpus.documents(range(corpus.n_documents)).to_pydict(),
        "tokens": [tokenization.unit_table(u.unit).to_pydict() for u in tokenization.units],
        "vocabulary": tokenization.vocabulary().to_pydict(),
        "shards": {
            u: [(o.key, o.nbytes, o.sha256) for o in unit.objects if "/c/" in o.key]
            for u, unit in run.collection.units.items()
        },
    }


def campaign(folder: Path, cache: Path, kind: str, *, keep) -> int:
    """A fault at every kept operation and mode; the same call again gives the store that no fault would have given."""
    names = MAKERS[kind][1]

    def attempt(storage: Storage) -> None:
        CommitLog(storage, sleep=lambda seconds: None).create()
        import_run(open_on(storage, cache), "r", folder, hook_points=names, rows_per_unit=16)

    probe = FaultStorage(MemoryStorage(f"foreign-{uuid.uuid4().hex}"), {})
    attempt(probe)
    undisturbed = content(open_on(probe, cache))
    assert len(undisturbed["shards"]) >= 3
    n_cases = 0
    for k in range(probe.n_operations):
        for mode in Fault:
            if not keep(k, mode):
                continue
            what = f"operation {k} {probe.operations[k]}, {mode}"
            inner = MemoryStorage(f"foreign-{uuid.uuid4().hex}")
            with contextlib.suppress(ActstoreError, Killed):
                attempt(FaultStorage(inner, {k: mode}))
            attempt(inner)
            store = open_on(inner, cache)
            assert content(store) == undisturbed, what
            assert fsck(inner, deep=True).is_clean, what
            n_cases += 1
    print(f"{n_cases} cases")
    return n_cases


@pytest.mark.timeout(300)
def test_killed_at_any_operation(tmp_path):
    """Every operation, the modes in turn."""
    modes = list(Fault)
    folder = vllm(tmp_path / "source", 6)
    assert (
        campaign(folder, tmp_path / "cache", "vllm", keep=lambda k, mode: modes[k % len(modes)] is mode) >= 30
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", MAKERS)
def test_killed_at_any_operation_in_every_mode(tmp_path, kind):
    folder = MAKERS[kind][0](tmp_path / "source", 9)
    assert campaign(folder, tmp_path / "cache", kind, keep=lambda k, mode: True) >= 200


def test_memory_does_not_grow_with_the_source(tmp_path):
    """Importing four times the rows takes no more of Python's and numpy's memory, a little for the index of files aside."""
    import tracemalloc

    peaks = []
    for n in (1_000, 4_000):
        rng = np.random.default_rng(0)
        ids = rng.integers(0, 50, (n, 16)).astype(np.int32)
        acts = rng.normal(size=(n, 16, 16)).astype(np.float32)
        folder = write_saelens(tmp_path / f"c{n}", "hook_embed", acts, ids, n_files=n // 500)
        del acts
        import_run(str(tmp_path / f"warm{n}"), "r", folder, rows_per_unit=2048)
        tracemalloc.start()
        import_run(str(tmp_path / f"s{n}"), "r", folder, rows_per_unit=2048)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        _, rows = stored(str(tmp_path / f"s{n}"), "r", "embed")
        assert len(rows) == n * 16
    print(peaks)
    assert peaks[1] < 1.5 * peaks[0]
