import numpy as np
import pytest

import actstore
from actstore.pooled_tables import spanning_documents
from tests.ingest.kept import HOOK_POINTS, KeptRun, tokenized

H = "layers.0.resid_post"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pooled")
    store = actstore.open(str(folder / "store"), create=True)
    tokenization = tokenized(store, folder / "tokenizer", n=60)
    whole = KeptRun(store, "whole", tokenization, keep=("pooled",)).finish()
    part = KeptRun(store, "part", tokenization, keep=("pooled",)).finish(without=(2,), seal=False)
    open_ = KeptRun(store, "open", tokenization, keep=("pooled",)).finish(seal=False)
    return {"whole": whole, "part": part, "open": open_}


@pytest.mark.parametrize("name", ["whole", "part", "open"])
def test_some_documents_are_as_all_of_them_have_them(runs, name):
    pooled = runs[name].pooled(H)
    everything = pooled.to_numpy(include_empty=True)
    vectors = {int(d): v for d, v in zip(everything.doc_ids, everything.vectors, strict=True)}
    n_tokens = dict(zip(everything.doc_ids.tolist(), everything.n_tokens.tolist(), strict=True))
    spanning = [d for d, _ in spanning_documents(runs[name].tokenization.units)]
    assert len(spanning) > 5
    rng = np.random.default_rng(1)
    picks = [rng.choice(60, int(rng.integers(1, 30)), replace=False) for _ in range(20)]
    for pick in [*picks, spanning, spanning[:1], spanning[-1:], range(60), [], [59], [7, 7, 3]]:
        wanted = sorted(d for d in set(map(int, pick)) if n_tokens.get(d, 0))
        found = pooled.documents(list(pick))
        assert found.doc_ids.tolist() == wanted
        assert found.vectors.shape == (len(wanted), HOOK_POINTS[H])
        assert found.n_tokens.tolist() == [n_tokens[d] for d in wanted]
        if wanted:
            np.testing.assert_array_equal(found.vectors, np.stack([vectors[d] for d in wanted]))
        docs = np.unique(np.array(pick, np.int64))
        scanned = list(pooled.scan(include_empty=True, docs=docs))
        there = [d for d in docs.tolist() if d in n_tokens]
        assert [d for part in scanned for d in part.doc_ids.tolist()] == there


def test_what_is_read_is_told(runs):
    for run in runs.values():
        pooled = run.pooled(H)
        assert {o.key for o in pooled.objects()} >= {o.key for o in pooled.objects(np.arange(10))}
        assert not pooled.objects(np.empty(0, np.int64))
        first = pooled.to_numpy().doc_ids[:1]
        assert 0 < len(pooled.objects(first)) < len(pooled.objects())
