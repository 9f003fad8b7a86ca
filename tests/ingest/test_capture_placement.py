"""Layers left out, several devices, compiled code: the rows are those of the plain model."""

import copy
import dataclasses
import importlib.util
import itertools

import numpy as np
import pytest
import torch
from transformers import AutoModel

from actstore.errors import ErrorKind, InvalidInputError, NotFoundError
from actstore.ingest.architectures import Site, map_model
from actstore.ingest.capture import Capturer
from actstore.ingest.compiling import compiled_regions
from actstore.ingest.dropping import layers_needed
from actstore.ingest.models import load_model
from actstore.ingest.self_test import self_test
from tests.ingest.tiny_models import ALL_FAMILIES, cached

LENGTHS = (9, 3, 14, 1)


def states(family, **options):
    """Return transformers' own hidden states of the test's windows, each alone, and their ids and starts."""
    rng = np.random.default_rng(7)
    ids = rng.integers(3, 512, sum(LENGTHS)).astype(np.int32)
    starts = np.cumsum([0, *LENGTHS])
    model = AutoModel.from_pretrained(cached(family), **options).eval()
    with torch.no_grad():
        outputs = [
            model(input_ids=torch.from_numpy(ids[a:b].astype(np.int64))[None], output_hidden_states=True)
            for a, b in itertools.pairwise(starts)
        ]
    per_layer = zip(*([s[0] for s in o.hidden_states] for o in outputs), strict=True)
    return ids, starts, [torch.cat(parts).float().numpy() for parts in per_layer]


def capture(loaded, hooks, ids, starts):
    capturer = Capturer(loaded, hooks)
    out = {name: np.full((len(ids), w), np.nan, np.float32) for name, w in capturer.widths.items()}
    capturer.capture_unit(ids, starts, out, batch_tokens=64, stored_dtype="float32")
    return out


def assert_close(got, expected):
    assert (np.linalg.norm(got - expected, axis=1) < 1e-4 * np.linalg.norm(expected, axis=1)).all()


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_layers_that_nothing_needs_are_left_out(family):
    ids, starts, expected = states(family)
    whole = load_model(cached(family))
    loaded = load_model(cached(family), hook_points=["layers.1.resid_post"])
    assert len(loaded.model.get_submodule(loaded.map.layers_path)) == 2
    n_parameters = [sum(p.numel() for p in m.model.parameters()) for m in (whole, loaded)]
    assert n_parameters[1] < 0.9 * n_parameters[0]
    got = capture(loaded, ["layers.{0,1}.resid_post"], ids, starts)
    assert_close(got["layers.0.resid_post"], expected[1])
    assert_close(got["layers.1.resid_post"], expected[2])
    assert loaded.fingerprint == whole.fingerprint
    self_test(loaded, ["layers.1.mlp_out", "layers.1.attn_z"])
    with pytest.raises(NotFoundError, match="loaded with its first 2 of 3 layers only"):
        loaded.map.resolve("layers.2.resid_post")
    with pytest.raises(NotFoundError):
        loaded.map.resolve(f"module:{loaded.map.layers_path}.2")


@pytest.mark.parametrize(
    ("hooks", "needed"),
    [
        (["embed"], 1),
        (["layers.0.attn_z", "embed"], 1),
        (["layers.*.resid_pre"], 3),
        (["module:h.1.mlp:input"], 2),
        (["module:wpe"], 3),
        (["layers.0.resid_post", "final_norm"], 3),
    ],
)
def test_how_many_layers_are_needed(hooks, needed):
    loaded = load_model(cached("gpt2"))
    assert layers_needed(loaded.map, loaded.map.resolve(hooks)) == needed
    assert len(load_model(cached("gpt2"), hook_points=hooks).model.h) == needed
    with pytest.raises(NotFoundError):
        load_model(cached("gpt2"), hook_points=["layers.3.resid_post"])


class ByNumber(torch.nn.Module):
    """A model that asks for each of its layers by its number in the configuration."""

    def __init__(self, inner):
        super().__init__()
        self.wte, self.h, self.config = inner.wte, inner.h, inner.config

    def get_input_embeddings(self):
        return self.wte

    def forward(self, input_ids):
        x = self.wte(input_ids)
        for i in range(self.config.num_hidden_layers):
            x = self.h[i](x)
        return x


def test_a_model_that_insists_on_its_layers_gets_them_back():
    from actstore.ingest.dropping import drop_unused_layers, runs_without_layers

    model = ByNumber(load_model(cached("gpt2")).model)
    before = copy.deepcopy(model.state_dict())
    model_map = map_model(model)
    dropped = drop_unused_layers(model, model_map, ["layers.0.resid_post"])
    assert len(model.h) == 1
    assert not runs_without_layers(model, torch.device("cpu"))
    dropped.put_back(model, torch.device("cpu"))
    assert runs_without_layers(model, torch.device("cpu"))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


OFFLOADED = {
    "embed_tokens": "cpu", "layers.0": "disk", "layers.1": "cpu", "layers.2": "disk", "norm": "cpu", "rotary_emb": "cpu",
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"": "disk"}, OFFLOADED])
def test_device_maps(family, device_map):
    """Weights that come in for one module only: every one of them gives the plain model's rows, pass after pass."""
    pytest.importorskip("accelerate")
    ids, starts, expected = states(family)
    loaded = load_model(cached(family), device_map=device_map)
    assert loaded.device.type == "cpu"
    assert loaded.is_spread == (not isinstance(device_map, str) and set(device_map.values()) != {"cpu"})
    report = self_test(loaded, ["*"])
    assert not report.equal_lengths
    for _ in range(2):
        got = capture(loaded, ["layers.{0,1}.resid_post", "layers.2.mlp_in"], ids, starts)
        assert_close(got["layers.0.resid_post"], expected[1])
        assert_close(got["layers.1.resid_post"], expected[2])
    if loaded.is_spread:
        # All that came in went out again.
        assert any(p.is_meta for p in loaded.model.parameters())
        assert {p.is_meta for p in loaded.model.get_submodule("layers.2").parameters()} == {True}


def test_placement_that_cannot_be():
    for options, words in [
        ({"device": "cpu", "device_map": "auto"}, "give one of them"),
        ({"device_map": {"": "disk"}, "compile": True}, "several devices"),
        ({"device_map": "nonsense"}, "nonsense"),
    ]:
        if "device_map" in options and importlib.util.find_spec("accelerate") is None:
            continue
        with pytest.raises(InvalidInputError, match=words) as caught:
            load_model(cached("llama"), **options)
        assert caught.value.kind in (ErrorKind.BAD_ARGUMENT, ErrorKind.BAD_MODEL)


def test_compiled_regions_hold_no_hook_and_as_much_as_possible():
    model = load_model(cached("gpt2")).model
    assert compiled_regions(model, "h", [Site("h.1", "output"), Site("wte", "output")]) == (
        "h.0",
        "h.1",
        "h.2",
    )
    inner = compiled_regions(model, "h", [Site("h.1.mlp.c_proj", "input"), Site("h.1", "output")])
    assert set(inner) == {
        "h.0", "h.2", "h.1.ln_1", "h.1.attn", "h.1.ln_2", "h.1.mlp.c_fc", "h.1.mlp.c_proj", "h.1.mlp.act"
    } - {"h.1.mlp.act"}  # fmt: skip
    # A module is compiled where its own input is looked at, and nothing is compiled twice.
    for a in inner:
        assert not any(b.startswith(f"{a}.") for b in inner)
    assert compiled_regions(model, None, []) == ()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own compiler imports them
@pytest.mark.parametrize(
    ("family", "hooks"),
    [
        ("llama", ["layers.{0,1}.resid_post"]),
        ("gpt2", ["layers.0.resid_post", "layers.1.mlp_act", "layers.2.resid_mid"]),
        ("qwen3_moe", ["layers.1.router", "layers.1.resid_post"]),
    ],
)
def test_compiled_rows_are_close_and_the_forward_pass_still_stops(family, hooks):
    ids, starts, expected = states(family)
    eager = load_model(cached(family))
    loaded = load_model(cached(family), compile=True)
    assert loaded.compile
    reached = []
    watched = loaded.model.get_submodule(f"{loaded.map.layers_path}.2")
    last = watched.register_forward_hook(lambda m, a, output: reached.append(output))
    capturer = Capturer(loaded, hooks)
    reached.clear()
    for batch_tokens in (1, 32, 64):
        want = {name: np.zeros((len(ids), w), np.float32) for name, w in capturer.widths.items()}
        got = copy.deepcopy(want)
        torch._dynamo.utils.counters.clear()
        arguments = {"batch_tokens": batch_tokens, "stored_dtype": "float32"}
        capturer.capture_unit(ids, starts, got, **arguments)
        Capturer(eager, hooks).capture_unit(ids, starts, want, **arguments)
        for name in want:
            assert_close(got[name], want[name])
            if name.endswith("resid_post"):
                assert_close(got[name], expected[int(name.split(".")[1]) + 1])
        # Other bits than eager code: it was compiled.
        assert any((got[name] != want[name]).any() for name in want)
    assert not reached
    last.remove()
    assert not any("forward" in m.__dict__ for m in loaded.model.modules())
    # The compiled model passes the self-test, and without padding invisible to it would not.
    assert not self_test(loaded, hooks).equal_lengths


def test_what_was_loaded_can_be_compared():
    """`compile` is no part of the fingerprint: a run's own model is found again without it."""
    loaded = load_model(cached("gpt2"))
    assert not loaded.compile
    assert dataclasses.replace(loaded, compile=True).fingerprint == loaded.fingerprint
