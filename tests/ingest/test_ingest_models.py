"""The main job on real models: what is stored equals a plain transformers forward with the test's own hooks."""

import json

import numpy as np
import pytest
import torch
import zarr
from transformers import AutoModel, AutoTokenizer

import actstore
from actstore.cli import main
from actstore.errors import ErrorKind, InvalidInputError, NotFoundError
from actstore.ingest import IngestConfig, import_corpus
from actstore.ingest import run as run_ingest
from tests.ingest import tiny_models

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and then it does so again.",
    "x",
    "A list is a mutable sequence; a tuple is not. " * 12,  # longer than the context: several windows
    "",
    "Naïve café, 東京, 🙂: characters beyond ASCII.",
    "def f(x):\n    return x + 1\n",
]


def own_hooks(model, names):
    """Modules of the test's own choosing for each hook point: (module, which side)."""
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    found = {}
    for name in names:
        if name == "embed":
            found[name] = (model.get_input_embeddings(), "out")
        else:
            _, i, part = name.split(".")
            found[name] = (layers[int(i)], {"resid_pre": "in", "resid_post": "out"}[part])
    return found


def expected_rows(folder, names, ids, dtype):
    """Activations of one window alone, float32 [t, width], by hooks registered here."""
    model = AutoModel.from_pretrained(folder, dtype=dtype).eval()
    grabbed = {}

    def grab(name, side):
        def pre(_m, args, kwargs):
            grabbed[name] = (args[0] if args else kwargs["hidden_states"]).detach().clone()

        def post(_m, _args, out):
            grabbed[name] = (out[0] if isinstance(out, tuple) else out).detach().clone()

        return pre if side == "in" else post

    for name, (module, side) in own_hooks(model, names).items():
        if side == "in":
            module.register_forward_pre_hook(grab(name, side), with_kwargs=True)
        else:
            module.register_forward_hook(grab(name, side))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    return {name: grabbed[name][0].float().numpy() for name in names}


@pytest.fixture(scope="module")
def corpus_store(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("models") / "store")
    store = actstore.open(url, create=True)
    import_corpus(store, "texts", [{"text": t, "n": i} for i, t in enumerate(TEXTS)])
    return url


CASES = [(family, "float32") for family in tiny_models.FAMILIES]
CASES += [(family, "bfloat16") for family in ("gpt2", "gpt_neox", "llama", "gemma2", "bert")]
CASES += [("llama", "float16"), ("gpt_neox", "float16")]


@pytest.mark.parametrize(("family", "dtype"), CASES)
@pytest.mark.parametrize("batch_tokens", [1, 4096], ids=["alone", "padded"])
def test_stored_rows_equal_a_plain_forward(corpus_store, family, dtype, batch_tokens):
    folder = tiny_models.cached(family, dtype=dtype)
    name = f"{family}-{dtype}-{batch_tokens}"
    wanted = ["layers.*.resid_post", "layers.0.resid_pre", "embed"]
    config = IngestConfig(
        corpus="texts", model=folder, hook_points=wanted, run=name, batch_tokens=batch_tokens, device="cpu",
        rows_per_unit=128, ray_address=None,
    )  # fmt: skip
    assert run_ingest(corpus_store, config).is_complete
    run = actstore.open(corpus_store).run(name)
    assert run.config["dtype"] == dtype
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = run.store.sql(
        "SELECT * FROM tokens WHERE tokenization = ? ORDER BY row", [run.tokenization.id]
    ).to_pandas()
    # The tokens are the tokenizer's own, document by document (windows of the long one joined without their edges).
    for doc_id, text in enumerate(TEXTS):
        mine = tokens[(tokens.doc_id == doc_id) & ~tokens.is_special].token_id.tolist()
        assert mine == tokenizer(text, add_special_tokens=False)["input_ids"]
    acts = {h: run.activations(h) for h in run.hook_points}
    for _, window in tokens.groupby(["doc_id", "window"]):
        expected = expected_rows(folder, run.hook_points, window.token_id.tolist(), getattr(torch, dtype))
        for hook_point, rows in expected.items():
            got = acts[hook_point][window.row.to_numpy()]
            if batch_tokens == 1:
                np.testing.assert_array_equal(got, rows, err_msg=hook_point)
            else:
                scale = np.abs(rows).max()
                tolerance = {"float32": 2e-5, "float16": 2e-2, "bfloat16": 8e-2}[dtype]
                np.testing.assert_allclose(got, rows, atol=tolerance * scale, rtol=0, err_msg=hook_point)
    check_plain_zarr(corpus_store, run, tokens.row.to_numpy())


def check_plain_zarr(url, run, rows):
    for hook_point in run.hook_points:
        array = zarr.open_array(f"{url}/{run.array_path(hook_point)}", mode="r")
        plain = array[:][rows]
        stored = run.activations(hook_point).read(rows, dtype="stored")
        np.testing.assert_array_equal(plain, stored)
        logical = array.attrs["actstore"]["logical_dtype"]
        assert logical == run.config["dtype"]
        if logical == "bfloat16":
            widened = torch.from_numpy(plain.view(np.int16)).view(torch.bfloat16).float().numpy()
            np.testing.assert_array_equal(widened, run.activations(hook_point)[rows])


def test_the_command_line_does_the_whole_job(tmp_path, capsys):
    store, folder = str(tmp_path / "s"), tiny_models.cached("gpt2")
    source = tmp_path / "docs.jsonl"
    source.write_text(
        "".join(json.dumps({"body": t, "lang": "en", "n": i}) + "\n" for i, t in enumerate(TEXTS))
    )
    assert main(["import", store, "texts", str(source), "--text-column", "body"]) == 0
    command = [
        "ingest",
        store,
        "--corpus",
        "texts",
        "--model",
        folder,
        "--run",
        "g",
        "--no-ray",
        "--dtype",
        "bf16",
    ]
    command += ["--hook-points", "layers.{0..1}.resid_post,blocks.2.mlp.hook_post"]
    assert main(command) == 0
    capsys.readouterr()
    assert main(["runs", store, "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [(r["run"], r["complete"], r["dtype"]) for r in runs] == [("g", True, "bfloat16")]
    assert main(["info", store, "g", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert [h["hook_point"] for h in info["hook_points"]] == [
        "layers.0.resid_post", "layers.1.resid_post", "layers.2.mlp_act",
    ]  # fmt: skip
    assert main(["sql", store, "SELECT count(*) AS n FROM tokens", "--json"]) == 0
    assert str(info["rows"]) in capsys.readouterr().out
    assert main(["examples", store, "g", "neuron:layers.2.mlp_act:3", "-k", "4", "--json"]) == 0
    assert main(["nearest", store, "g", "layers.1.resid_post", "--row", "3", "-k", "4", "--json"]) == 0
    assert main(["nearest", store, "g", "layers.1.resid_post", "--text", "a lazy dog", "-k", "4"]) == 0
    assert main(["fsck", store, "--deep"]) == 0
    assert main(command) == 0, "running the same command again is not an error"
    assert main([*command, "--batch-tokens", "99"]) == 4
    assert "batch_tokens: 8192 -> 99" in capsys.readouterr().err


def test_a_text_query_finds_itself(corpus_store):
    folder = tiny_models.cached("llama")
    config = IngestConfig(
        corpus="texts", model=folder, hook_points=["layers.1.resid_post"], run="text-query", ray_address=None,
        rows_per_unit=128,
    )  # fmt: skip
    run_ingest(corpus_store, config)
    run = actstore.open(corpus_store).run("text-query")
    (best,) = run.nearest("layers.1.resid_post", TEXTS[0], k=1, mask_sinks=False).to_dicts()
    rows = run.store.sql(
        "SELECT max(row) AS last FROM tokens WHERE tokenization = ? AND doc_id = 0", [run.tokenization.id]
    )
    assert best["row"] == rows.to_dicts()[0]["last"]
    assert best["value"] == pytest.approx(1.0, abs=1e-5)


def test_fp16_overflow_is_named_and_nothing_is_stored(corpus_store, tmp_path):
    folder = tmp_path / "loud"
    tiny_models.build("llama", folder)
    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        model.embed_tokens.weight[:] = 1e6
    model.save_pretrained(folder)
    config = IngestConfig(
        corpus="texts",
        model=str(folder),
        hook_points=["layers.0.resid_post"],
        run="loud",
        dtype="fp16",
        ray_address=None,
    )
    with pytest.raises(InvalidInputError) as caught:
        run_ingest(corpus_store, config)
    assert caught.value.kind is ErrorKind.OVERFLOW
    assert "layers.0.resid_post" in str(caught.value)
    assert actstore.open(corpus_store).run("loud").n_units == 0


def test_nan_weights_are_refused_or_counted(corpus_store, tmp_path):
    folder = tmp_path / "sick"
    tiny_models.build("gpt2", folder)
    (token_id,) = AutoTokenizer.from_pretrained(folder)("x")["input_ids"]
    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        model.wte.weight[token_id, 3] = float("nan")
    model.save_pretrained(folder)
    settings = {"corpus": "texts", "model": str(folder), "hook_points": ["embed"], "ray_address": None}
    with pytest.raises(InvalidInputError) as caught:
        run_ingest(corpus_store, IngestConfig(**settings, run="sick"))
    assert caught.value.kind is ErrorKind.NON_FINITE
    report = run_ingest(corpus_store, IngestConfig(**settings, run="masked", nonfinite="mask"))
    store = actstore.open(corpus_store)
    sick = store.sql(
        "SELECT row FROM tokens WHERE tokenization = ? AND token_id = ?",
        [store.run("masked").tokenization.id, token_id],
    ).to_dicts()
    assert report.nonfinite == len(sick) > 0
    everything = store.run("masked").examples(
        actstore.neuron("embed", 3), k=1000, mask_special=False, mask_sinks=False, fold=None
    )
    assert not {r["row"] for r in sick} & {r["row"] for r in everything.to_dicts()}
    assert len(everything) == store.run("masked").n_rows - len(sick)


@pytest.mark.parametrize(
    ("change", "error", "shown"),
    [
        ({"model": "/nowhere/at/all"}, NotFoundError, "/nowhere/at/all"),
        ({"model": "no-such-owner/no-such-model"}, NotFoundError, "no-such-owner/no-such-model"),
        ({"hook_points": ["layers.0.resid_pst"]}, NotFoundError, "layers.0.resid_post"),
        ({"hook_points": ["layers.99.resid_post"]}, NotFoundError, "layers.99.resid_post"),
        ({"run": "../escape"}, InvalidInputError, "run name"),
        ({"window": 100_000}, InvalidInputError, "context"),
    ],
)
def test_bad_requests_are_named_before_any_work(corpus_store, change, error, shown):
    settings = {
        "corpus": "texts", "model": tiny_models.cached("gpt2"), "hook_points": ["embed"], "run": "never", "ray_address": None
    }  # fmt: skip
    version = actstore.open(corpus_store).version
    with pytest.raises(error, match=shown.replace("/", "/")):
        run_ingest(corpus_store, IngestConfig(**{**settings, **change}))
    assert actstore.open(corpus_store).version == version
