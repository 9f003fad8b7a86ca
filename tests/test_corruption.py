"""Damage any stored object in any way: reading gives a named error or the right answer, never a wrong one."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest

import actstore
from actstore import FormatError
from actstore.ingest import run as run_ingest
from actstore.log import fsck
from actstore.storage import open_storage
from tests.ingest import synthetic


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    url = str(folder / "store")
    tokenizer = synthetic.make_corpus(url, folder / "tokenizer", n_documents=16)
    for name, codec, dtype in (("syn", "hot", "auto"), ("lz4", "lz4", "auto"), ("cold", "cold", "bf16")):
        config = synthetic.config(tokenizer, run=name, codec=codec, dtype=dtype)
        run_ingest(url, config, backend=synthetic.SyntheticBackend())
    return Path(url), everything(url)


def everything(url) -> dict[str, object]:
    """Read all that a store can say, in plain values that can be compared."""
    store = actstore.open(url)
    answer: dict[str, object] = {"version": store.version}
    for corpus in store.corpora():
        answer[f"corpus {corpus.id}"] = corpus.documents(range(corpus.n_documents)).to_pylist()
    for tokenization in store.tokenizations():
        for unit in tokenization.units:
            answer[f"tokens {unit.unit}"] = tokenization.unit_table(unit.unit).to_pylist()
        answer["vocabulary"] = tokenization.vocabulary().to_pylist()
        answer["tokenizer"] = tokenization.tokenizer_json()
    for run in store.runs():
        for hook_point in run.hook_points:
            acts = run.activations(hook_point)
            answer[f"rows {run.id} {hook_point}"] = np.concatenate([a for _, a in acts.scan()]).tobytes()
            some = [start for start, _ in acts.row_ranges] + [stop - 1 for _, stop in acts.row_ranges]
            answer[f"some {run.id} {hook_point}"] = acts[some].tobytes()
            answer[f"mean {run.id} {hook_point}"] = run.stats(hook_point).mean.tobytes()
    answer["sql"] = store.sql("SELECT doc_id, count(*) AS n FROM tokens GROUP BY ALL ORDER BY ALL").to_dicts()
    answer["joined"] = store.sql(
        "SELECT kind, token, count(*) AS n FROM tokens JOIN documents USING (doc_id) GROUP BY ALL ORDER BY ALL"
    ).to_dicts()
    top = store.run("syn").examples(actstore.neuron("layers.1.mlp_act", 3), k=5)
    answer["top"] = [(r["row"], r["value"], r["context"]["text"]) for r in top.to_dicts()]
    return answer


def objects(store: Path) -> list[Path]:
    return sorted(p for p in store.rglob("*") if p.is_file() and ".tmp" not in p.parts)


def kind_of(path: Path, store: Path) -> str:
    """The objects' kinds: manifest, hint, documents, tokens, shard, sums, stats, zarr.json, ..."""
    parts = path.relative_to(store).parts
    if parts[0] == "runs":
        return (
            f"{parts[1]}/{'shard' if parts[3] == 'c' else parts[3]}"
            if len(parts) > 4
            else f"{parts[1]}/{parts[2]}"
        )
    return "/".join(parts[:1] + parts[2:3])


def mutations(data: bytes, rng: random.Random, sibling: bytes) -> list[tuple[str, bytes | None]]:
    flipped = []
    for _ in range(4):
        bit = rng.randrange(len(data) * 8)
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        flipped.append((f"bit {bit} flipped", bytes(changed)))
    cut = rng.randrange(len(data))
    zeroed = bytearray(data)
    zeroed[cut : cut + 64] = bytes(len(zeroed[cut : cut + 64]))
    return [
        *flipped,
        ("emptied", b""),
        (f"cut to {cut}", data[:cut]),
        ("cut by one", data[:-1]),
        ("extended", data + b"\n"),
        (f"zeros at {cut}", bytes(zeroed)),
        ("swapped with its sibling", sibling),
        ("deleted", None),
    ]


@pytest.mark.timeout(400)
def test_no_damage_gives_a_wrong_answer(whole, tmp_path):
    store, truth = whole
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    by_kind: dict[str, list[Path]] = {}
    for path in objects(copy):
        by_kind.setdefault(kind_of(path, copy), []).append(path)
    assert len(by_kind) >= 8, sorted(by_kind)
    caught, harmless = 0, 0
    for paths in by_kind.values():
        for path in rng.sample(paths, 1):
            data = path.read_bytes()
            sibling = next((p.read_bytes() for p in paths if p != path), b"other")
            for what, changed in mutations(data, rng, sibling):
                if changed == data:
                    continue
                replace(path, changed)
                try:
                    answer = everything(copy)
                except FormatError:
                    caught += 1
                else:
                    assert answer == truth, f"{path} {what}: a wrong answer"
                    assert is_unread(path) or what == "extended", f"{path} {what} went unseen"
                    assert path.name == "_hint" or not fsck(open_storage(str(copy)), deep=True).is_clean
                    harmless += 1
                replace(path, data)
    assert everything(copy) == truth
    print(f"{caught} damages named, {harmless} harmless")


def is_unread(path: Path) -> bool:
    """Whether readers of a finished store never look at the object: derived ones, metadata for other tools, and the units'
    statistics once the run's are merged. Their damage changes no answer, and fsck sees it."""
    merged = path.parent.name == "stats" and not path.name.startswith("all-")
    return path.name in {"_hint", "zarr.json"} or "checkpoints" in path.parts or merged


def replace(path: Path, data: bytes | None) -> None:
    path.unlink(missing_ok=True)
    if data is not None:
        path.write_bytes(data)
