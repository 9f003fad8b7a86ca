"""What is captured equals a plain transformers forward of each document alone, seen by hooks written here."""

import numpy as np
import pytest
import torch
from transformers import AutoModel

from actstore.dtypes import count_nonfinite
from actstore.errors import ErrorKind, InvalidInputError, NotFoundError, StorageError
from actstore.ingest.capture import Capturer
from actstore.ingest.models import load_model
from tests.ingest.tiny_models import FAMILIES, MORE_FAMILIES, cached

DTYPES = ("float32", "float16", "bfloat16")
PARTS = ("resid_pre", "attn_out", "mlp_act", "mlp_out", "resid_post")
"""Parts that `own_forward` sees; the others are in test_capture_families.py."""
TOLERANCE = {"float32": 5e-6, "float16": 1e-2, "bfloat16": 6e-2}
"""Of a row's norm; of batches of other shapes than the document alone."""

LLAMA = ("layers", "self_attn", "mlp", "mlp.down_proj")
POST_NORM = ("layers", "post_attention_layernorm", "post_feedforward_layernorm", "mlp.down_proj")
# Where the activations are, by the reading of each model's source: (layers, attn_out, mlp_out, mlp_act is its input).
TREES = {
    "gpt2": ("h", "attn", "mlp", "mlp.c_proj"),
    "gpt_neox": ("layers", "attention", "mlp", "mlp.dense_4h_to_h"),
    "gpt_neox_serial": ("layers", "attention", "mlp", "mlp.dense_4h_to_h"),
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "mistral": LLAMA,
    "gemma": LLAMA,
    "gemma2": POST_NORM,
    "gemma3": POST_NORM,
    "olmo2": POST_NORM,
    "bert": ("encoder.layer", "attention.output.dense", "output.dense", "output.dense"),
    "roberta": ("encoder.layer", "attention.output.dense", "output.dense", "output.dense"),
    "opt": ("decoder.layers", "self_attn", "fc2", "fc2"),
    "qwen3_moe": ("layers", "self_attn", "mlp", None),
    "gptj": ("h", "attn", "mlp", "mlp.fc_out"),
    "bloom": ("h", "self_attention.dense", "mlp.dense_4h_to_h", "mlp.dense_4h_to_h"),
    "falcon": ("h", "self_attention.dense", "mlp.dense_4h_to_h", "mlp.dense_4h_to_h"),
    "modernbert": ("layers", "attn", "mlp", "mlp.Wo"),
}
MIXED = (17, 3, 1, 30, 8, 8, 1, 25, 2)


def own_forward(folder, dtype, documents, family, names=None):
    """Return hook point -> list of tensors, one per document: a plain call each, without mask, with hooks of our own."""
    model = AutoModel.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    layers, attn, mlp, act = TREES[family]
    seen = {}

    def keep(name, tensor):
        tensor = tensor[0] if isinstance(tensor, tuple) else tensor
        seen[name] = tensor.detach().clone().reshape(-1, tensor.shape[-1])

    def watch(name, module, *, before):
        if names is not None and name not in names:
            return
        if before:

            def look(_m, args, kwargs):
                keep(name, args[0] if args else kwargs["hidden_states"])

            module.register_forward_pre_hook(look, with_kwargs=True)
        else:

            def look(_m, args, output):
                keep(name, output)

            module.register_forward_hook(look)

    watch("embed", model.get_input_embeddings(), before=False)
    for i, layer in enumerate(model.get_submodule(layers)):
        watch(f"layers.{i}.resid_pre", layer, before=True)
        watch(f"layers.{i}.attn_out", layer.get_submodule(attn), before=False)
        watch(f"layers.{i}.mlp_out", layer.get_submodule(mlp), before=False)
        if act:
            watch(f"layers.{i}.mlp_act", layer.get_submodule(act), before=True)
        watch(f"layers.{i}.resid_post", layer, before=False)
    rows = {}
    for document in documents:
        with torch.no_grad():
            model(input_ids=torch.tensor(document)[None], use_cache=False)
        for name, tensor in seen.items():
            rows.setdefault(name, []).append(tensor)
    return {name: torch.cat(parts) for name, parts in rows.items()}


def make_documents(lengths, seed, vocab_size=512):
    rng = np.random.default_rng(seed)
    print("seed", seed)
    return [rng.integers(3, vocab_size, n).tolist() for n in lengths]


def capture(loaded, documents, hooks, stored_dtype, batch_tokens, **options):
    """Return hook point -> tensor of the stored rows."""
    capturer = Capturer(loaded, hooks, **options)
    ids = np.array([t for d in documents for t in d], np.int32)
    starts = np.cumsum([0, *map(len, documents)]).astype(np.int64)
    numpy_dtype = np.uint16 if stored_dtype == "bfloat16" else stored_dtype
    # Filled with a pattern that is NaN in each dtype: a row that is not written shows.
    out = {
        name: np.full((len(ids), w), 0xFF, np.uint8)
        .repeat(np.dtype(numpy_dtype).itemsize, 1)
        .view(numpy_dtype)
        for name, w in capturer.widths.items()
    }
    stats = capturer.capture_unit(ids, starts, out, batch_tokens=batch_tokens, stored_dtype=stored_dtype)
    assert (stats.n_tokens, stats.n_windows) == (len(ids), len(documents))
    if stored_dtype == "bfloat16":
        return {
            name: torch.from_numpy(a.view(np.int16)).view(torch.bfloat16) for name, a in out.items()
        }, stats
    return {name: torch.from_numpy(a) for name, a in out.items()}, stats


def assert_close(got, expected, dtype):
    got, expected = got.double(), expected.double()
    norms = expected.norm(dim=1)
    assert (norms > 0).all()
    assert ((got - expected).norm(dim=1) / norms).max() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_window_per_batch_is_exact_and_mixed_batches_are_close(family, dtype):
    folder = cached(family)
    loaded = load_model(folder, dtype=dtype)
    documents = make_documents(MIXED, seed=len(family))
    expected = own_forward(folder, dtype, documents, family)
    assert set(expected) == {"embed", *(f"layers.{i}.{part}" for i in range(3) for part in PARTS)}
    alone, stats = capture(loaded, documents, ["*"], dtype, batch_tokens=1)
    assert stats.n_batches == len(documents)
    assert list(alone) == list(Capturer(loaded, ["*"]).widths)
    for name, tensor in expected.items():
        assert torch.equal(alone[name], tensor), name
    together, stats = capture(loaded, documents, ["*"], dtype, batch_tokens=64)
    assert stats.n_batches < len(documents)
    for name, tensor in expected.items():
        assert_close(together[name], tensor, dtype)


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_other_shapes_of_models(family):
    folder = cached(family)
    documents = make_documents(MIXED, seed=1)
    expected = own_forward(folder, "float32", documents, family)
    loaded = load_model(folder)
    alone, _ = capture(loaded, documents, ["*"], "float32", batch_tokens=1)
    together, _ = capture(loaded, documents, ["*"], "float32", batch_tokens=100)
    assert set(expected) < set(alone)
    for name, tensor in expected.items():
        assert torch.equal(alone[name], tensor), name
        assert_close(together[name], tensor, "float32")


@pytest.mark.parametrize(
    ("lengths", "batch_tokens", "n_batches"),
    [
        ([20], 4096, 1),  # a single window
        ([1] * 40, 4096, 1),  # windows of one token
        ([1], 1, 1),
        ([12] * 5, 4096, 1),  # nothing to pad
        ([64, 1, 63], 4096, 1),  # the whole context
        ([9, 9, 9, 4, 4, 1], 18, 3),
    ],
)
@pytest.mark.parametrize("family", ["gpt2", "gemma3", "bert", "roberta"])
def test_padding_cases(family, lengths, batch_tokens, n_batches):
    documents = make_documents(lengths, seed=sum(lengths))
    expected = own_forward(cached(family), "float32", documents, family)
    got, stats = capture(load_model(cached(family)), documents, ["*"], "float32", batch_tokens)
    assert stats.n_batches == n_batches
    for name, tensor in expected.items():
        assert_close(got[name], tensor, "float32")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_residual_stream_is_transformers_own_hidden_states(family):
    model = AutoModel.from_pretrained(cached(family)).eval()
    (document,) = make_documents([21], seed=3)
    with torch.no_grad():
        states = model(
            input_ids=torch.tensor(document)[None], output_hidden_states=True, use_cache=False
        ).hidden_states
    got, _ = capture(load_model(cached(family)), [document], ["*"], "float32", batch_tokens=1)
    for i in range(3):
        assert torch.equal(got[f"layers.{i}.resid_pre"], states[i][0])
        if i < 2 or family == "bert":
            assert torch.equal(got[f"layers.{i}.resid_post"], states[i + 1][0])
        else:
            # The last of transformers' states is behind the final norm, and a layer's output is not.
            assert not torch.allclose(got[f"layers.{i}.resid_post"], states[i + 1][0], atol=1e-2)


def test_no_token_sees_another_document():
    """With one document changed, the rows of all others in its batch keep their bits."""
    loaded = load_model(cached("llama"))
    documents = make_documents(MIXED, seed=4)
    before, _ = capture(loaded, documents, ["*"], "float32", batch_tokens=4096)
    starts = np.cumsum([0, *MIXED])
    changed = [d if i != 3 else [(t + 7) % 500 for t in d] for i, d in enumerate(documents)]
    after, _ = capture(loaded, changed, ["*"], "float32", batch_tokens=4096)
    for name in before:
        same = (before[name] == after[name]).all(dim=1)
        assert not same[starts[3] : starts[4]].any()
        same[starts[3] : starts[4]] = True
        assert same.all()


def test_batches_are_computed_alike_each_time_and_hooks_leave_the_model_alone():
    loaded = load_model(cached("qwen3"), dtype="bfloat16")
    documents = make_documents(MIXED, seed=5)
    ids = torch.tensor(documents[0])[None]
    plain = loaded.model(input_ids=ids).last_hidden_state
    first, _ = capture(loaded, documents, ["*"], "bfloat16", batch_tokens=64)
    second, _ = capture(loaded, documents, ["*"], "bfloat16", batch_tokens=64)
    assert all(torch.equal(first[name], second[name]) for name in first)
    # No hook is left behind, and while they are on the model computes the same to the end.
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in loaded.model.modules())
    ends = []
    final = loaded.model.norm.register_forward_hook(lambda m, a, output: ends.append(output))
    with Capturer(loaded, ["*"]).hooked(lambda name, x: None, to_the_end=True) as forward:
        forward(ids.numpy(), None)
    final.remove()
    assert torch.equal(ends[-1], plain)


def test_the_forward_pass_stops_after_the_last_hook_point():
    loaded = load_model(cached("gpt2"))
    reached = []
    handles = [
        layer.register_forward_hook(lambda m, a, o, i=i: reached.append(i))
        for i, layer in enumerate(loaded.model.h)
    ]
    handles.append(loaded.model.ln_f.register_forward_hook(lambda m, a, o: reached.append("end")))
    capturer = Capturer(loaded, ["layers.0.resid_post", "layers.1.mlp_act", "module:h.0.ln_2"])
    ids, starts = np.arange(5, dtype=np.int32), np.array([0, 5])
    reached.clear()
    out = {name: np.empty((5, w), np.float32) for name, w in capturer.widths.items()}
    capturer.capture_unit(ids, starts, out, batch_tokens=8, stored_dtype="float32")
    assert reached == [0]
    # The model is whole again afterwards.
    reached.clear()
    loaded.model(input_ids=torch.tensor([[1, 2]]))
    assert reached == [0, 1, 2, "end"]
    for handle in handles:
        handle.remove()


def test_modules_by_path():
    loaded = load_model(cached("qwen3_moe"))
    documents = make_documents((4, 7), seed=6)
    hooks = [
        "module:model.layers.*.mlp.gate",
        "module:layers.1.self_attn.q_norm",
        "module:layers.0.self_attn.o_proj:input",
        "module:norm",
    ]
    model = AutoModel.from_pretrained(cached("qwen3_moe")).eval()
    seen = {}
    model.layers[2].mlp.gate.register_forward_hook(
        lambda m, a, o: seen.update(gate=o[0] if isinstance(o, tuple) else o)
    )
    model.layers[1].self_attn.q_norm.register_forward_hook(lambda m, a, o: seen.update(q=o))
    model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda m, a: seen.update(z=a[0]))
    got, _ = capture(loaded, documents, hooks, "float32", batch_tokens=1)
    with torch.no_grad():
        final = [model(input_ids=torch.tensor(d)[None]).last_hidden_state[0] for d in documents][1]
    assert torch.equal(got["module:layers.2.mlp.gate:output"][4:], seen["gate"].reshape(7, -1))
    # Heads of 8 are drawn together: (windows, tokens, heads, 8) becomes rows of 32.
    assert torch.equal(got["module:layers.1.self_attn.q_norm:output"][4:], seen["q"].reshape(7, 32))
    assert torch.equal(got["module:layers.0.self_attn.o_proj:input"][4:], seen["z"][0])
    assert torch.equal(got["module:norm:output"][4:], final)


@pytest.mark.parametrize(
    "hook",
    ["module:rotary_emb", "module:layers.0.self_attn:input", "module:embed_tokens:input"],
)
def test_modules_without_a_row_per_token_are_refused(hook):
    loaded = load_model(cached("llama"))
    if hook == "module:layers.0.self_attn:input":
        # Given by keyword, and so still found.
        assert Capturer(loaded, [hook]).widths == {hook: 32}
        return
    with pytest.raises(InvalidInputError, match="name another module") as caught:
        Capturer(loaded, [hook])
    assert caught.value.kind is ErrorKind.BAD_ARGUMENT
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in loaded.model.modules())


def test_a_module_that_is_reached_twice_or_never_is_refused():
    loaded = load_model(cached("llama"))
    shared = loaded.model.layers[0].mlp
    loaded.model.layers[2].mlp = shared
    with pytest.raises(InvalidInputError, match=r"module:layers\.0\.mlp:output 2 times"):
        Capturer(loaded, ["module:layers.0.mlp"])
    loaded.model.idle = torch.nn.Linear(2, 2)
    again = type(loaded)(**{f: getattr(loaded, f) for f in loaded.__slots__} | {"map": _remap(loaded.model)})
    with pytest.raises(InvalidInputError, match=r"module:idle:output 0 times"):
        Capturer(again, ["module:idle"])


def _remap(model):
    from actstore.ingest.architectures import map_model

    return map_model(model)


@pytest.mark.parametrize(
    "hooks", ["layers.3.resid_post", "layers.0.router", "module:h.0.nothing", "elsewhere"]
)
def test_unknown_hook_points(hooks):
    with pytest.raises(NotFoundError) as caught:
        Capturer(load_model(cached("gpt2")), [hooks])
    assert caught.value.kind is ErrorKind.HOOK_POINT_NOT_FOUND
    # The way out is shown: the module tree and how to name a module.
    assert "module:<path>" in str(caught.value)
    assert "h.0.mlp.c_proj (Conv1D)" in str(caught.value)


def test_a_model_without_a_list_of_layers_has_modules_only():
    loaded = load_model(cached("gpt2"))
    loaded.config.n_layer = 7
    found = _remap(loaded.model)
    assert (found.n_layers, found.layers, list(found.sites)) == (0, (), ["embed"])
    with pytest.raises(NotFoundError, match="No list of layers was recognised"):
        found.resolve("layers.0.resid_post")
    assert found.resolve("module:h.0.mlp") == ("module:h.0.mlp:output",)


@pytest.mark.parametrize(("compute", "stored"), [(c, s) for c in DTYPES for s in DTYPES])
@pytest.mark.parametrize("lengths", [(9,), (9, 4, 2)])
def test_conversion_rounds_to_nearest_even(compute, stored, lengths):
    loaded = load_model(cached("gpt2"), dtype=compute)
    documents = make_documents(lengths, seed=8)
    hooks = ["layers.1.resid_post", "layers.0.mlp_act"]
    native, _ = capture(loaded, documents, hooks, compute, batch_tokens=64)
    got, _ = capture(loaded, documents, hooks, stored, batch_tokens=64)
    for name, tensor in native.items():
        if stored == "bfloat16":
            # Independent of torch: round half to even on the bits.
            bits = tensor.float().numpy().view(np.uint32).astype(np.uint64)
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            assert (got[name].view(torch.int16).numpy().view(np.uint16) == rounded).all()
        else:
            expected = tensor.float().numpy().astype(stored)
            assert (got[name].numpy() == expected).all()


def scaled(family, factor, dtype="float32"):
    """Return a model whose embedding is larger by `factor`."""
    loaded = load_model(cached(family), dtype=dtype)
    loaded.model.get_input_embeddings().weight.mul_(factor)
    return loaded


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("lengths", [(9,), (9, 4, 2)])
def test_fp16_overflow_is_counted_and_refused(compute, lengths):
    loaded = scaled("gpt2", 3e5, compute)
    documents = make_documents(lengths, seed=9)
    wide, _ = capture(loaded, documents, ["embed", "layers.0.resid_post"], "float32", batch_tokens=64)
    # 65520 is where float16 rounds to infinity.
    counts = {name: int((t.abs() >= 65520).sum()) for name, t in wide.items()}
    assert counts["embed"] > 0
    with pytest.raises(InvalidInputError) as caught:
        capture(loaded, documents, ["embed", "layers.0.resid_post"], "float16", batch_tokens=64)
    assert caught.value.kind is ErrorKind.OVERFLOW
    for name, tensor in wide.items():
        assert f"{name}: {counts[name]} values, the largest {tensor.abs().max():.6g}" in str(caught.value)
    assert "store bfloat16 or float32" in str(caught.value)
    capture(loaded, documents, ["embed"], "bfloat16", batch_tokens=64)


def test_infinities_of_the_model_itself_are_data_and_not_overflow():
    loaded = load_model(cached("gpt2"))
    loaded.model.wpe.weight[2, 5] = torch.inf
    loaded.model.wpe.weight[3, 6] = torch.nan
    documents = make_documents((6, 3), seed=10)
    for stored in DTYPES:
        got, _ = capture(loaded, documents, ["layers.0.resid_pre"], stored, batch_tokens=64)
        rows = got["layers.0.resid_pre"]
        assert rows[2, 5] == torch.inf
        assert rows[8, 5] == torch.inf
        assert rows[3, 6].isnan()
        assert int((~rows.isfinite()).sum()) == 3
        stored_array = (
            rows.view(torch.int16).numpy().view(np.uint16) if stored == "bfloat16" else rows.numpy()
        )
        assert count_nonfinite(stored_array, stored) == 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_count_nonfinite(dtype):
    rng = np.random.default_rng(11)
    bits = rng.integers(0, 1 << (32 if dtype == "float32" else 16), (1100, 1000), np.uint32)
    tensor = torch.from_numpy(
        bits.view(np.int32) if dtype == "float32" else bits.astype(np.uint16).view(np.int16)
    ).view(getattr(torch, dtype))
    array = tensor.numpy() if dtype != "bfloat16" else tensor.view(torch.int16).numpy().view(np.uint16)
    assert count_nonfinite(array, dtype) == int((~tensor.isfinite()).sum()) > 0
    assert count_nonfinite(array[:0], dtype) == 0


def test_bad_input_is_refused():
    capturer = Capturer(load_model(cached("gpt2")), ["embed"])

    def run(ids, starts, *, out=None, dtype="float32", batch_tokens=64, **options):
        out = {"embed": np.zeros((len(ids), 32), np.float32)} if out is None else out
        return capturer.capture_unit(
            np.array(ids, np.int32),
            np.array(starts),
            out,
            batch_tokens=batch_tokens,
            stored_dtype=dtype,
            **options,
        )

    for kind, arguments in [
        (ErrorKind.TOO_LARGE, {"ids": [1] * 65, "starts": [0, 65]}),
        (ErrorKind.BAD_TOKENIZER, {"ids": [1, 512], "starts": [0, 2]}),
        (ErrorKind.BAD_TOKENIZER, {"ids": [-1, 5], "starts": [0, 2]}),
        (ErrorKind.BAD_ARGUMENT, {"ids": [1, 2], "starts": [0, 1]}),
        (ErrorKind.BAD_ARGUMENT, {"ids": [1, 2], "starts": [0, 0, 2]}),
        (
            ErrorKind.BAD_ARGUMENT,
            {"ids": [1, 2], "starts": [0, 2], "out": {"embed": np.zeros((2, 31), np.float32)}},
        ),
        (
            ErrorKind.BAD_ARGUMENT,
            {"ids": [1, 2], "starts": [0, 2], "out": {"embed": np.zeros((2, 32), np.float16)}},
        ),
        (ErrorKind.BAD_ARGUMENT, {"ids": [1, 2], "starts": [0, 2], "out": {}}),
        (ErrorKind.BAD_ARGUMENT, {"ids": [1, 2], "starts": [0, 2], "dtype": "int8"}),
        (ErrorKind.BAD_ARGUMENT, {"ids": [1, 2], "starts": [0, 2], "batch_tokens": 0}),
    ]:
        with pytest.raises(InvalidInputError) as caught:
            run(**arguments)
        assert caught.value.kind is kind, arguments
    assert run([], [0]).n_batches == 0


def test_stop_and_progress():
    loaded = load_model(cached("gpt2"))
    capturer = Capturer(loaded, ["embed"])
    ids, starts = np.arange(30, dtype=np.int32), np.array([0, 10, 12, 30])
    out = {"embed": np.zeros((30, 32), np.float32)}
    done = []
    capturer.capture_unit(ids, starts, out, batch_tokens=18, stored_dtype="float32", on_batch=done.append)
    assert done == [18, 10, 2] or done == [18, 12]
    done.clear()
    with pytest.raises(StorageError) as caught:
        capturer.capture_unit(
            ids,
            starts,
            out,
            batch_tokens=18,
            stored_dtype="float32",
            on_batch=done.append,
            should_stop=lambda: len(done) == 1,
        )
    assert caught.value.kind is ErrorKind.INTERRUPTED
    assert done == [18]
    assert not any(m._forward_hooks for m in loaded.model.modules())
