"""Promoted vocabulary against the models' own heads: what really happens to the logits when a direction is added."""

import uuid
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

import actstore
from actstore.dictionary import make_dictionary
from actstore.errors import ConflictError, ErrorKind, InvalidInputError, NotFoundError
from actstore.ingest import IngestConfig, import_corpus
from actstore.ingest.dictionaries.save import save_dictionary
from actstore.ingest.encoding.encode import encode
from actstore.ingest.encoding.postings_job import build_postings
from actstore.ingest.encoding.promoted import promoted_columns, promoted_ends
from actstore.ingest.encoding.unembedding import Unembedding, find_unembedding
from actstore.ingest.job import run_ingest
from actstore.ingest.models import load_model
from tests.ingest.tiny_models import ALL_FAMILIES, VOCAB_SIZE, build_tokenizer, make_config

D = 32
NO_LOGITS = {
    "bert", "roberta", "modernbert", "distilbert", "electra", "deberta", "deberta_v2", "xlm_roberta",
    "roberta_prelayernorm",
}  # fmt: skip
"""Their heads have layers of their own, or they do not predict the next token at all."""

NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f", "layer_norm")


def save_model(family: str, folder, *, dtype: str = "float32"):
    """A random model with its head; returns it."""
    from transformers import AutoModelForCausalLM

    config = make_config(family, d_model=D, n_layers=2, n_heads=4, vocab_size=VOCAB_SIZE, context=64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape) * 0.3 + (parameter.ndim == 1))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return model.float().eval()


def run_of(folder, **changed):
    """What a run knows of a model in a folder."""
    loaded = load_model(str(folder))
    model = {"source": str(folder), **loaded.fingerprint, **changed}
    return SimpleNamespace(id="r", model=model)


def dictionary_at(hook_point, *, kind="sae", out=None, width=D):
    return SimpleNamespace(hook_point=hook_point, hook_point_out=out, kind=kind, d_out=width)


def final_norm_of(model):
    base = model.base_model
    for part in (base, getattr(base, "decoder", base), getattr(base, "model", base)):
        for name in NORMS:
            if isinstance(getattr(part, name, None), torch.nn.Module):
                return getattr(part, name)
    return torch.nn.Identity()


def effect_on_logits(model, direction):
    """Half the difference that adding and taking off a direction makes to the logits, times the length of the stream.

    The stream has mean 0 and is orthogonal to the direction, so that both ways it has one length and the norm divides by it.
    """
    norm, head = final_norm_of(model), model.get_output_embeddings()
    d = torch.tensor(direction, dtype=torch.float64)
    away, _ = torch.linalg.qr(torch.stack([torch.ones_like(d), d], dim=1))
    x = torch.randn(D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x -= away @ (away.T @ x)
    with torch.inference_mode():
        plus, minus = (head(norm((x + s * d).float())).double() for s in (1, -1))
        takes_mean = torch.allclose(norm(x.float() + 7), norm(x.float()), atol=1e-3)
    if isinstance(norm, torch.nn.Identity):
        return ((plus - minus) / 2).numpy()
    length = (x + (d - d.mean() if takes_mean else d)).square().mean().sqrt()
    return ((plus - minus) / 2 * length).numpy()


def directions_of(n=7, seed=2):
    return np.random.default_rng(seed).standard_normal((n, D)).astype(np.float32)


@pytest.mark.parametrize("family", [f for f in ALL_FAMILIES if f not in NO_LOGITS])
def test_logits_are_what_adding_the_direction_does(family, tmp_path):
    model = save_model(family, tmp_path)
    unembedding = find_unembedding(run_of(tmp_path), dictionary_at("layers.1.resid_post"))
    directions = directions_of()
    high, low = promoted_ends(
        lambda a, b: directions[a:b], len(directions), unembedding, np.arange(VOCAB_SIZE), block_bytes=1
    )
    for i, direction in enumerate(directions):
        effect = effect_on_logits(model, direction)
        np.testing.assert_allclose(high.logits[i], np.sort(effect)[::-1][:10], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(low.logits[i], np.sort(effect)[:10], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(effect[high.token_ids[i]], high.logits[i], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(effect[low.token_ids[i]], low.logits[i], rtol=1e-3, atol=1e-4)


def test_bfloat16_weights_and_the_final_norms_own_output(tmp_path):
    model = save_model("llama", tmp_path, dtype="bfloat16")
    unembedding = find_unembedding(run_of(tmp_path), dictionary_at("final_norm"))
    directions = directions_of()
    high, _ = promoted_ends(lambda a, b: directions[a:b], 7, unembedding, np.arange(VOCAB_SIZE))
    effect = directions @ model.lm_head.weight.detach().numpy().T
    np.testing.assert_allclose(high.logits, -np.sort(-effect, axis=1)[:, :10], rtol=1e-5)


def test_models_and_places_without_logits_say_why(tmp_path):
    save_model("llama", tmp_path / "llama")
    run = run_of(tmp_path / "llama")
    for hook_point in (
        "layers.0.mlp_act",
        "layers.0.attn_z",
        "layers.1.mlp_in",
        "module:layers.0.mlp:output",
    ):
        with pytest.raises(InvalidInputError, match="not in the residual stream"):
            find_unembedding(run, dictionary_at(hook_point))
    with pytest.raises(InvalidInputError, match="not known where"):
        find_unembedding(run, dictionary_at("layers.1.resid_mid", kind="transcoder"))
    assert find_unembedding(run, dictionary_at("layers.1.mlp_in", kind="transcoder", out="layers.1.mlp_out"))
    with pytest.raises(InvalidInputError, match=r"16 dimensions .* 32"):
        find_unembedding(run, dictionary_at("layers.1.resid_post", width=16))
    with pytest.raises(InvalidInputError, match="was imported"):
        find_unembedding(
            SimpleNamespace(id="r", model={"imported": {}, "name": None}), dictionary_at("embed")
        )
    with pytest.raises(NotFoundError, match="does not exist"):
        find_unembedding(run_of(tmp_path / "llama", source=str(tmp_path / "gone")), dictionary_at("embed"))
    with pytest.raises(ConflictError, match="weights_sha256") as caught:
        find_unembedding(run_of(tmp_path / "llama", weights_sha256="00"), dictionary_at("embed"))
    assert caught.value.kind is ErrorKind.CONFIG_DIFFERS


@pytest.mark.parametrize("family", sorted(NO_LOGITS))
def test_heads_with_layers_of_their_own_are_refused(family, tmp_path):
    from transformers import AutoModel

    config = make_config(family, d_model=D, n_layers=2, n_heads=4, vocab_size=VOCAB_SIZE, context=64)
    if family == "electra":
        config.embedding_size = D  # as wide as the stream: only the layer before tells
    AutoModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(InvalidInputError, match=r"no form that predicts|layers of its own"):
        find_unembedding(run_of(tmp_path), dictionary_at("layers.0.resid_post"))


def test_a_model_saved_without_its_head_has_none(tmp_path):
    from transformers import AutoModel

    for family, has in (("llama", False), ("gpt2", True)):  # the latter's is its input embedding
        folder = tmp_path / family
        config = make_config(family, d_model=D, n_layers=2, n_heads=4, vocab_size=VOCAB_SIZE, context=64)
        AutoModel.from_config(config).save_pretrained(folder)
        if has:
            assert find_unembedding(run_of(folder), dictionary_at("embed")).tensor == "wte.weight"
        else:
            with pytest.raises(InvalidInputError, match=r"no lm_head\.weight"):
                find_unembedding(run_of(folder), dictionary_at("embed"))


def plain_unembedding(tmp_path, matrix):
    save_file({"u": torch.tensor(matrix)}, tmp_path / "u.safetensors")
    gain = np.ones(matrix.shape[1], np.float32)
    return Unembedding(str(tmp_path / "u.safetensors"), "u", len(matrix), "none", gain)


@pytest.mark.parametrize("n_tokens", [1, 3, 10, 63, 64, 65, 500, 20_000])
def test_ends_are_those_of_a_sort_ties_by_token(tmp_path, n_tokens):
    rng = np.random.default_rng(n_tokens)
    matrix = rng.integers(-3, 4, (n_tokens, 2)).astype(np.float32)
    directions = rng.integers(-2, 3, (70, 2)).astype(np.float32)
    known = np.flatnonzero(
        rng.random(n_tokens + 40) < 0.8
    )  # the matrix lacks some, others it has are no tokens
    unembedding = plain_unembedding(tmp_path, matrix)
    ends = promoted_ends(lambda a, b: directions[a:b], 70, unembedding, rng.permutation(known), block_bytes=1)
    logits = directions @ matrix.T
    allowed = known[known < n_tokens].tolist()
    for end, sign in zip(ends, (-1, 1), strict=True):
        for i in range(70):
            best = sorted(allowed, key=lambda t, i=i, sign=sign: (sign * logits[i, t], t))[:10]
            assert end.token_ids[i].tolist() == best
            assert end.logits[i].tolist() == logits[i, best].tolist()


def test_columns_have_the_words(tmp_path):
    unembedding = plain_unembedding(tmp_path, np.array([[1.0], [-2.0], [5.0]], np.float32))
    vocabulary = pa.table({"token_id": pa.array([1, 0, 7], pa.int32()), "token": ["one", "zero", "seven"]})
    ends = promoted_ends(lambda a, b: np.ones((2, 1), np.float32), 2, unembedding, np.array([1, 0, 7]))
    columns = promoted_columns(ends, 2, vocabulary)
    zero, one = (
        {"token_id": 0, "token": "zero", "logit": 1.0},
        {"token_id": 1, "token": "one", "logit": -2.0},
    )
    assert columns["promoted"].to_pylist() == [[zero, one]] * 2
    assert columns["suppressed"].to_pylist() == [[one, zero]] * 2
    assert promoted_columns(None, 2, vocabulary)["promoted"].to_pylist() == [None, None]


def test_a_whole_run_has_promoted_vocabulary_in_its_statistics(tmp_path):
    model = save_model("gpt_neox_serial", tmp_path / "model")
    build_tokenizer(tmp_path / "model", vocab_size=VOCAB_SIZE, bert=False)
    store = actstore.open(f"memory://promoted-{uuid.uuid4().hex}", create=True)
    import_corpus(store, "docs", ["the cat sat on the mat", "a dog", "and the cat again"])
    run_ingest(
        store,
        IngestConfig(
            corpus="docs",
            model=str(tmp_path / "model"),
            run="r",
            hook_points=["layers.1.resid_post"],
            ray_address=None,
        ),
    )
    rng = np.random.default_rng(0)
    weights = {
        "W_enc": rng.standard_normal((D, 12)), "b_enc": np.zeros(12), "b_dec": np.zeros(D),
        "W_dec": rng.standard_normal((12, D)),
    }  # fmt: skip
    data = make_dictionary(
        weights, activation="relu", hook_point="layers.1.resid_post", apply_b_dec_to_input=True
    )
    save_dictionary(store, "sae", data)
    encode(store, "sae", "r", postings=False)
    report = build_postings(store, "sae@r", promoted=True)
    assert report.no_promoted is None
    codes = store.refresh().run("r").codes("sae")
    config = store.state.collection("postings", "sae@r").config["promoted"]
    assert config == {"tensor": "embed_out.weight", "norm": "layer", "n_tokens": VOCAB_SIZE}
    vocabulary = dict(zip(*(c.to_pylist() for c in codes.run.tokenization.vocabulary().columns), strict=True))
    for row in codes.stats().to_pylist():
        effect = effect_on_logits(model, weights["W_dec"][row["latent"]])
        best = sorted(vocabulary, key=lambda t, effect=effect: -effect[t])[:10]
        assert [t["token_id"] for t in row["promoted"]] == best
        assert [t["token"] for t in row["promoted"]] == [vocabulary[t] for t in best]
        worst = sorted(vocabulary, key=lambda t, effect=effect: effect[t])[:10]
        assert [t["token_id"] for t in row["suppressed"]] == worst
