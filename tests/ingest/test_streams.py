"""Do units that are computed at once on a CPU become the same rows as units computed one after the other?"""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import actstore
from actstore.ingest import IngestConfig, import_corpus
from actstore.ingest import run as run_ingest
from actstore.ingest.capture import Capturer
from tests.ingest import tiny_models

HOOK_POINTS = ["layers.0.mlp_out", "layers.1.resid_post"]


def ingest(tmp_path: Path, name: str, family: str) -> dict[str, np.ndarray]:
    folder = tmp_path / family
    if not folder.exists():
        tiny_models.build(family, str(folder))
    store = actstore.open(tmp_path / f"{name}.store", create=True)
    import_corpus(store, "c", ({"text": f"a story of the number {i} " * (1 + i % 7)} for i in range(120)))
    config = IngestConfig(
        corpus="c", model=str(folder), hook_points=HOOK_POINTS, run="r", device="cpu", ray_address=None,
        window=32, rows_per_unit=256, batch_tokens=64,
    )  # fmt: skip
    report = run_ingest(store, config)
    assert report.n_units > 4
    run = store.refresh().run("r")
    return {hook_point: run.activations(hook_point)[:] for hook_point in run.hook_points}


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral"])
def test_two_streams_store_what_one_stores(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, most = 0, 0
    lock = threading.Lock()
    plain = Capturer.capture_unit

    def counted(self: Capturer, *args: object, **options: object) -> object:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        try:
            return plain(self, *args, **options)  # type: ignore[arg-type]
        finally:
            with lock:
                at_once -= 1

    monkeypatch.setattr(Capturer, "capture_unit", counted)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ingest(tmp_path, "one", family)
        assert most == 1
        torch.set_num_threads(2)  # two streams of one thread each
        two = ingest(tmp_path, "two", family)
        assert most == 2
        assert torch.get_num_threads() == 2
        torch.set_num_threads(3)  # no multiple of the streams
        ingest(tmp_path, "three", family)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    for hook_point, rows in one.items():
        assert np.array_equal(rows, two[hook_point]), hook_point
