"""Runs imported from three formats, against the numbers and tokens that were written."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import actstore
from actstore.errors import ConflictError, ErrorKind, InvalidInputError, NotFoundError
from actstore.ingest import import_corpus
from actstore.ingest.foreign import import_run
from actstore.log import fsck
from tests.ingest import foreign_sources
from tests.ingest.foreign_sources import (
    random_documents,
    stored,
    token_columns,
    write_saelens,
    write_table,
    write_vllm,
)

WIDTH = 8


@pytest.fixture(scope="module")
def tokenizer():
    return foreign_sources.byte_level()


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


def check_tokens(tokens: pa.Table, documents, *, store: str, run: str) -> None:
    """Every row is the token that was given, at its place, and the units are packed."""
    lengths = [len(d) for d in documents]
    np.testing.assert_array_equal(tokens["token_id"].to_numpy(), np.concatenate(documents))
    np.testing.assert_array_equal(tokens["doc_id"].to_numpy(), np.repeat(np.arange(len(documents)), lengths))
    np.testing.assert_array_equal(
        tokens["window_position"].to_numpy(), np.concatenate([np.arange(n) for n in lengths])
    )
    found = actstore.open(store).run(run)
    assert found.n_rows == sum(lengths)
    for unit in found.tokenization.units:
        assert unit.rows <= found.tokenization.rows_per_unit
    corpus = found.tokenization.corpus
    texts = corpus.documents(range(corpus.n_documents), ["text"])["text"].to_pylist()
    n_chars = np.array([len(t) for t in texts])[tokens["doc_id"].to_numpy()]
    starts, ends = tokens["char_start"].to_numpy(), tokens["char_end"].to_numpy()
    assert ((starts >= 0) & (starts <= ends) & (ends <= n_chars)).all()
    assert fsck(actstore.open(store).storage, deep=True).is_clean


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_saelens_round_trip(tmp_path, tokenizer, dtype):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, tokenizer.get_vocab_size(), (37, 16)).astype(np.int32)
    acts = rng.normal(size=(37, 16, WIDTH)).astype(dtype)
    folder = write_saelens(tmp_path / "cache", "blocks.3.hook_resid_post", acts, ids, n_files=3)
    store = str(tmp_path / "s")
    report = import_run(store, "r", folder, tokenizer=tokenizer, rows_per_unit=96, model="tiny")
    assert (report.format, report.hook_points, report.dtype) == ("saelens", ("layers.3.resid_post",), dtype)
    assert (report.n_documents, report.n_rows, report.n_units) == (37, 592, 7)
    tokens, rows = stored(store, "r", "layers.3.resid_post")
    np.testing.assert_array_equal(bits(rows), bits(acts.reshape(-1, WIDTH)))
    check_tokens(tokens, list(ids), store=store, run="r")
    found = actstore.open(store).run("r")
    assert found.model["name"] == "tiny"
    assert found.model["imported"]["format"] == "saelens"
    special = {tokenizer.token_to_id(t) for t in ("<s>", "<|end of text|>")}
    assert {
        t for t, s in zip(ids.ravel().tolist(), tokens["is_special"].to_pylist(), strict=True) if s
    } <= special
    assert sum(tokens["is_special"].to_pylist()) == np.isin(ids, list(special)).sum() > 0
    texts = found.tokenization.corpus.documents(range(37), ["text"])["text"].to_pylist()
    assert texts == [tokenizer.decode(row.tolist(), skip_special_tokens=False) for row in ids]


def test_saelens_hook_points_of_one_dataset_share_their_rows(tmp_path, tokenizer):
    """SAELens caches one hook point at a time: two caches of the same tokens become runs over one tokenization."""
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 300, (10, 16)).astype(np.int32)
    store = str(tmp_path / "s")
    for layer in range(2):
        acts = rng.normal(size=(10, 16, WIDTH)).astype(np.float32)
        folder = write_saelens(tmp_path / f"c{layer}", f"model.layers.{layer}", acts, ids, n_files=layer + 1)
        with pytest.raises(InvalidInputError, match="is named like no hook point"):
            import_run(store, f"r{layer}", folder, tokenizer=tokenizer, corpus="c")
        named = {f"model.layers.{layer}": f"layers.{layer}.resid_post"}
        import_run(store, f"r{layer}", folder, tokenizer=tokenizer, corpus="c", hook_points=named)
        _, rows = stored(store, f"r{layer}", f"layers.{layer}.resid_post")
        np.testing.assert_array_equal(rows, acts.reshape(-1, WIDTH))
    opened = actstore.open(store)
    assert len(opened.tokenizations()) == len(opened.corpora()) == 1


def test_saelens_same_whether_datasets_is_imported(tmp_path):
    """`datasets` registers an Arrow type of its own once it is imported; the reader knows the columns with and without."""
    import subprocess
    import sys

    rng = np.random.default_rng(2)
    ids = rng.integers(0, 300, (5, 8)).astype(np.int32)
    acts = rng.normal(size=(5, 8, WIDTH)).astype(np.float32)
    folder = write_saelens(tmp_path / "cache", "blocks.0.hook_resid_pre", acts, ids)
    import_run(str(tmp_path / "with"), "r", folder)
    code = (
        "import sys; from actstore.ingest.foreign import import_run;"
        f"import_run({str(tmp_path / 'without')!r}, 'r', {str(folder)!r}); assert 'datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
    for name in ("with", "without"):
        _, rows = stored(str(tmp_path / name), "r", "layers.0.resid_pre")
        np.testing.assert_array_equal(rows, acts.reshape(-1, WIDTH))


def vllm_states(rng, documents, layers: int, dtype: str = "bfloat16"):
    import torch

    raw = [rng.normal(size=(len(d), layers, WIDTH)).astype(np.float32) for d in documents]
    return [torch.tensor(r).to(getattr(torch, dtype)) for r in raw]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_vllm_round_trip_bit_for_bit(tmp_path, tokenizer, dtype):
    import torch

    rng = np.random.default_rng(3)
    documents = random_documents(rng, 23, tokenizer.get_vocab_size(), 40)
    states = vllm_states(rng, documents, 3, dtype)
    if dtype == "bfloat16":  # every pattern of bits that is a finite number, signed zeros and denormals too
        every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
        every = every[torch.isfinite(every.view(torch.bfloat16))]
        documents.append(np.zeros(len(every) // (3 * WIDTH), np.int32))
        states.append(every[: len(documents[-1]) * 3 * WIDTH].view(torch.bfloat16).reshape(-1, 3, WIDTH))
    folder = write_vllm(tmp_path / "hs", documents, states)
    (folder / "hs_3.safetensors.lock").touch()
    store = str(tmp_path / "s")
    report = import_run(store, "r", folder, layer_ids=[0, 2, 4], tokenizer=tokenizer, rows_per_unit=4096)
    names = ("layers.0.resid_pre", "layers.1.resid_post", "layers.3.resid_post")
    assert (report.format, report.hook_points, report.dtype) == ("vllm", names, dtype)
    for layer, name in enumerate(names):
        tokens, rows = stored(store, "r", name)
        expected = torch.cat([s[:, layer] for s in states])
        expected = (
            expected.view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else expected.numpy()
        )
        np.testing.assert_array_equal(bits(rows), bits(expected))
    check_tokens(tokens, documents, store=store, run="r")
    keys = actstore.open(store).corpus("r").documents([0, 10], ["source_key"])["source_key"].to_pylist()
    assert keys == ["hs_0", "hs_10"]


def test_vllm_selects_and_names_layers(tmp_path):
    rng = np.random.default_rng(4)
    documents = random_documents(rng, 4, 100, 10)
    states = vllm_states(rng, documents, 3, "float32")
    folder = write_vllm(tmp_path / "hs", documents, states)
    with pytest.raises(InvalidInputError, match="does not say which"):
        import_run(str(tmp_path / "s"), "r", folder)
    with pytest.raises(InvalidInputError, match=r"2 hook points were named, .* has 3 arrays"):
        import_run(str(tmp_path / "s"), "r", folder, hook_points=["embed", "layers.0.resid_post"])
    with pytest.raises(InvalidInputError, match="ascending"):
        import_run(str(tmp_path / "s"), "r", folder, layer_ids=[3, 1, 2])
    import_run(str(tmp_path / "s"), "r", folder, hook_points={2: "module:model.norm"})
    assert actstore.open(str(tmp_path / "s")).run("r").hook_points == ["module:model.norm:output"]
    _, rows = stored(str(tmp_path / "s"), "r", "module:model.norm")
    np.testing.assert_array_equal(rows, np.concatenate([s[:, 2].numpy() for s in states]))


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_arrays_round_trip(tmp_path, tokenizer, suffix):
    """Several arrays of an `.npy` and of a safetensors file; tables of tokens as files."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(5)
    documents = random_documents(rng, 200, tokenizer.get_vocab_size(), 30)
    n_rows = sum(map(len, documents))
    pre = rng.normal(size=(n_rows, WIDTH)).astype(np.float16)
    post = rng.normal(size=(n_rows, 5)).astype(np.float16)
    folder = tmp_path / "arrays"
    folder.mkdir()
    np.save(folder / "blocks.0.hook_resid_pre.npy", pre)
    save_file({"acts": post, "other": np.zeros((3, 2, 1), np.float32)}, folder / "more.safetensors")
    write_table(folder / f"tokens{suffix}", token_columns(documents))
    store = str(tmp_path / "s")
    named = {"acts": "layers.7.mlp_act", "blocks.0.hook_resid_pre": "layers.0.resid_pre"}
    report = import_run(store, "r", folder, hook_points=named, tokenizer=tokenizer, rows_per_unit=128)
    assert report.hook_points == ("layers.0.resid_pre", "layers.7.mlp_act")
    for name, expected in (("layers.0.resid_pre", pre), ("layers.7.mlp_act", post)):
        tokens, rows = stored(store, "r", name)
        np.testing.assert_array_equal(bits(rows), bits(expected))
    check_tokens(tokens, documents, store=store, run="r")


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", [">f4", "<f8", "<u2", "|V2"])
def test_arrays_of_other_types(tmp_path, kind, order):
    """Big-endian and column-major arrays, float64 on request, bfloat16 as the bits that numpy has no type for."""
    rng = np.random.default_rng(6)
    documents = random_documents(rng, 9, 50, 20)
    values = rng.normal(size=(sum(map(len, documents)), WIDTH))
    raw = values.astype(np.float32).view(np.uint32) >> 16 if kind in ("<u2", "|V2") else values
    array = raw.astype("<u2").view(kind) if kind == "|V2" else raw.astype(kind)
    np.save(tmp_path / "a.npy", np.asarray(array, order=order))
    dtype = {">f4": None, "<f8": "float32"}.get(kind, "bfloat16")
    asked = {"hook_points": "embed", "tokens": token_columns(documents)}
    if dtype is not None:
        with pytest.raises(InvalidInputError):
            import_run(str(tmp_path / "s"), "r", tmp_path / "a.npy", **asked)
    import_run(str(tmp_path / "s"), "r", tmp_path / "a.npy", dtype=dtype, **asked)
    _, rows = stored(str(tmp_path / "s"), "r", "embed")
    np.testing.assert_array_equal(
        rows, raw.astype(np.uint16) if dtype == "bfloat16" else values.astype(np.float32)
    )


def test_mixed_types_become_float32_on_request(tmp_path):
    import torch
    from safetensors.torch import save_file

    documents = [np.array([1, 2, 3], np.int32)]
    half, brain = torch.randn(3, 4).half(), torch.randn(3, 4).bfloat16()
    save_file({"embed": half, "layers.0.mlp_out": brain}, tmp_path / "a.safetensors")
    asked = {"tokens": token_columns(documents)}
    with pytest.raises(InvalidInputError, match="dtype='float32'"):
        import_run(str(tmp_path / "s"), "r", tmp_path / "a.safetensors", **asked)
    with pytest.raises(InvalidInputError, match="only float32 is converted to"):
        import_run(str(tmp_path / "s"), "r", tmp_path / "a.safetensors", dtype="float16", **asked)
    import_run(str(tmp_path / "s"), "r", tmp_path / "a.safetensors", dtype="float32", **asked)
    for name, expected in (("embed", half), ("layers.0.mlp_out", brain)):
        np.testing.assert_array_equal(stored(str(tmp_path / "s"), "r", name)[1], expected.float().numpy())


def test_words_positions_and_numbers(tmp_path):
    """Texts of tokens make the documents' text; positions are kept; without texts tokens are called by number."""
    documents = [np.array([4, 4, 9], np.int32), np.array([2], np.int32)]
    np.save(tmp_path / "a.npy", np.arange(16, dtype=np.float32).reshape(4, 4))
    columns = token_columns(documents, position=[1, 2, 7, 0], token=["né", "é ", "🎉", "x"])
    store = str(tmp_path / "s")
    import_run(store, "r", tmp_path / "a.npy", hook_points="embed", tokens=pa.table(columns), special_ids=[9])
    tokens, _ = stored(store, "r", "embed")
    found = actstore.open(store).run("r").tokenization
    assert found.corpus.documents([0, 1], ["text"])["text"].to_pylist() == ["néé 🎉", "x"]
    assert tokens["position"].to_pylist() == [1, 2, 7, 0]
    assert tokens["window_position"].to_pylist() == [0, 1, 2, 0]
    assert tokens["char_start"].to_pylist() == [0, 2, 4, 0]
    assert tokens["char_end"].to_pylist() == [2, 4, 5, 1]
    assert tokens["is_special"].to_pylist() == [False, False, True, False]
    assert found.vocabulary().to_pydict() == {"token_id": [2, 4, 9], "token": ["x", "né", "🎉"]}
    del columns["token"]
    import_run(store, "n", tmp_path / "a.npy", hook_points="embed", tokens=columns)
    found = actstore.open(store).run("n").tokenization
    assert found.corpus.documents([0, 1], ["text"])["text"].to_pylist() == ["<4> <4> <9>", "<2>"]
    assert found.vocabulary()["token"].to_pylist() == ["<2>", "<4>", "<9>"]


def test_characters_of_a_corpus_that_is_there(tmp_path):
    """A table with char_start names documents of an imported corpus, and may leave some out."""
    store = str(tmp_path / "s")
    texts = ["naïve text", "", "left out", "🎉 party"]
    import_corpus(store, "c", texts)
    columns = {
        "doc_id": [0, 0, 3, 3],
        "token_id": [1, 2, 3, 4],
        "char_start": [0, 5, 0, 1],
        "char_end": [5, 10, 1, 7],
    }
    values = np.random.default_rng(7).normal(size=(4, 3)).astype(np.float32)
    np.save(tmp_path / "a.npy", values)
    asked = {"hook_points": "embed", "corpus": "c", "rows_per_unit": 2}
    with pytest.raises(NotFoundError):
        import_run(store, "r", tmp_path / "a.npy", **{**asked, "corpus": "none"}, tokens=columns)
    report = import_run(store, "r", tmp_path / "a.npy", tokens=columns, **asked)
    assert (report.n_documents, report.n_units) == (2, 2)
    tokens, rows = stored(store, "r", "embed")
    np.testing.assert_array_equal(rows, values)
    spans = [
        texts[d][a:b]
        for d, a, b in zip(
            *(tokens[c].to_pylist() for c in ("doc_id", "char_start", "char_end")), strict=True
        )
    ]
    assert spans == ["naïve", " text", "🎉", " party"]
    assert tokens["doc_id"].to_pylist() == [0, 0, 3, 3]
    for change, said in (
        ({"char_end": [5, 11, 1, 7]}, "ends at character 11"),
        ({"doc_id": [0, 0, 4, 4]}, "has document 4"),
        ({"doc_id": [3, 3, 0, 0], "char_end": [5, 7, 1, 7]}, "comes after document 3"),
        ({"char_start": [6, 5, 0, 1]}, "are no range"),
    ):
        with pytest.raises(InvalidInputError, match=said):
            import_run(store, "x", tmp_path / "a.npy", tokens={**columns, **change}, **asked)


@pytest.mark.parametrize("n_documents", [1, 60])
def test_queries_on_an_imported_run_equal_numpy(tmp_path, tokenizer, n_documents):
    rng = np.random.default_rng(8)
    documents = random_documents(rng, n_documents, tokenizer.get_vocab_size(), 60)
    folder = write_vllm(tmp_path / "hs", documents, vllm_states(rng, documents, 1, "float32"))
    store = str(tmp_path / "s")
    import_run(store, "r", folder, hook_points="layers.2.resid_post", tokenizer=tokenizer, rows_per_unit=256)
    tokens, acts = stored(store, "r", "layers.2.resid_post")
    run = actstore.open(store).run("r")
    is_special = np.array(tokens["is_special"].to_pylist())
    rows = tokens["row"].to_numpy()
    asked = {"mask_sinks": False, "fold": None}
    neuron = run.examples(actstore.neuron("layers.2.resid_post", 3), 10, mask_special=True, **asked)
    order = np.lexsort((rows, -acts[:, 3].astype(np.float64)))
    expected = rows[order][~is_special[order]][:10]
    assert neuron.table["row"].to_pylist() == expected.tolist()
    contexts = neuron.table["context"].to_pylist()
    texts = run.tokenization.corpus.documents(neuron.table["doc_id"].to_pylist(), ["text"])[
        "text"
    ].to_pylist()
    assert all(c["text"] in t for c, t in zip(contexts, texts, strict=True))
    query = rng.normal(size=WIDTH)
    nearest = run.nearest(
        "layers.2.resid_post", query, 5, metric="cosine", mask_special=False, exact=True, **asked
    )
    wide = acts.astype(np.float64)
    cosine = wide @ query / np.linalg.norm(wide, axis=1) / np.linalg.norm(query)
    best = rows[np.lexsort((rows, -cosine))][:5]
    assert nearest.table["row"].to_pylist() == best.tolist()
    with pytest.raises(InvalidInputError, match="has no model that texts could go through"):
        run.encode_text(["hello"], "layers.2.resid_post")
    counted = actstore.open(store).sql("SELECT count(*) AS n, count(DISTINCT doc_id) AS d FROM tokens")
    assert counted.table.to_pylist() == [{"n": len(rows), "d": n_documents}]


def test_command_line(tmp_path, capsys):
    from actstore.cli import main

    rng = np.random.default_rng(9)
    documents = random_documents(rng, 5, 40, 9)
    folder = write_vllm(tmp_path / "hs", documents, vllm_states(rng, documents, 2))
    store = str(tmp_path / "s")
    asked = ["import-run", store, "r", str(folder), "--layer-ids", "1", "2", "--model", "m"]
    assert main([*asked, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["n_rows"], report["dtype"]) == (sum(map(len, documents)), "bfloat16")
    assert main(asked) == 0
    assert "unchanged" in capsys.readouterr().out
    assert main([*asked[:4], "--hook-point", "1=layers.1.resid_post"]) == 4
    assert (
        main(
            ["import-run", store, "r2", str(folder), "--hook-point", "1=layers.1.resid_post", "--corpus", "r"]
        )
        == 0
    )
    assert actstore.open(store).run("r2").hook_points == ["layers.1.resid_post"]
    assert main(["info", store, "r"]) == 0
    assert main(["runs", store]) == 0
    assert Path(store).is_dir()


def test_other_source_under_the_same_name_is_refused(tmp_path):
    rng = np.random.default_rng(10)
    documents = random_documents(rng, 5, 40, 9)
    store, first, second = str(tmp_path / "s"), tmp_path / "a", tmp_path / "b"
    write_vllm(first, documents, vllm_states(rng, documents, 1))
    write_vllm(second, documents, vllm_states(rng, documents, 1))
    import_run(store, "r", first, hook_points="embed")
    with pytest.raises(ConflictError, match="content_sha256") as caught:
        import_run(store, "r", second, hook_points="embed")
    assert caught.value.kind is ErrorKind.CONFIG_DIFFERS
    copied = tmp_path / "elsewhere"
    first.rename(copied)
    version = actstore.open(store).version
    assert import_run(store, "r", copied, hook_points="embed").version == version
    with pytest.raises(ConflictError):
        import_run(store, "r", copied, hook_points="embed", codec="lz4")
    with pytest.raises(ConflictError, match="rows_per_unit"):
        import_run(store, "r", copied, hook_points="embed", rows_per_unit=64)
