"""Do the demo's models learn, are they plain Hugging Face models, and is their report true?"""

import itertools
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.errors import InvalidInputError
from actstore.ingest.demo.train import (
    BOUNDARY,
    REPORT_FILE,
    TrainConfig,
    encode_stream,
    learning_rate_factor,
    make_tokenizer,
    one_thread_each,
    save_model,
    saved_report,
    train_model,
    unigram_loss,
)

TEXTS = [f"def f{i}(x):\n    return x + {i}\n" for i in range(60)]
CONFIG = TrainConfig(
    seed=0,
    steps=60,
    batch_windows=4,
    window=16,
    d_model=32,
    d_mlp=48,
    layers=1,
    heads=2,
    learning_rate=1e-2,
    warmup_steps=3,
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(TEXTS, vocab_size=300, window=16)


def train(tokenizer, config=CONFIG, on_step=lambda step, loss: None):
    trained, held_out = encode_stream(tokenizer, TEXTS[:50]), encode_stream(tokenizer, TEXTS[50:])
    model, report = train_model(
        trained,
        held_out,
        vocab_size=len(tokenizer),
        boundary_id=tokenizer.bos_token_id,
        config=config,
        on_step=on_step,
    )
    return model, report, held_out


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_text_survives_the_tokenizer_after_one_boundary(text):
    tokenizer = _tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == tokenizer.eos_token_id
    if BOUNDARY not in text:
        assert tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False) == text
        assert tokenizer.bos_token_id not in ids[1:]


def _tokenizer(cache=[]):  # noqa: B006 - hypothesis refuses function fixtures
    if not cache:
        cache.append(make_tokenizer(TEXTS, vocab_size=300, window=16))
    return cache[0]


def test_a_stream_is_the_texts_one_after_the_other(tokenizer):
    stream = encode_stream(tokenizer, TEXTS[:3])
    assert stream.dtype == np.int64
    assert stream.tolist() == [i for text in TEXTS[:3] for i in tokenizer(text)["input_ids"]]


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(InvalidInputError, match=r"at least 257.*got 256"):
        make_tokenizer(TEXTS, vocab_size=256, window=16)


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=30), st.lists(st.integers(0, 4), min_size=1, max_size=9)
)
def test_unigram_loss_is_the_cross_entropy_under_counts_plus_one(trained, held_out):
    counts = Counter(trained)
    expected = [-math.log((counts[token] + 1) / (len(trained) + 5)) for token in held_out]
    got = unigram_loss(np.array(trained), np.array(held_out), vocab_size=5)
    assert got == pytest.approx(sum(expected) / len(held_out))


def test_the_learning_rate_rises_then_falls_to_a_twentieth():
    factors = [learning_rate_factor(step, steps=50, warmup_steps=10) for step in range(50)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert all(a > b for a, b in itertools.pairwise(factors[10:]))
    assert factors[-1] == pytest.approx(0.05)


def test_training_learns_is_repeatable_and_leaves_torch_as_it_was(tokenizer):
    losses = []
    before = torch.random.get_rng_state()
    with one_thread_each():
        model, report, held_out = train(tokenizer, on_step=lambda step, loss: losses.append((step, loss)))
    assert torch.equal(torch.random.get_rng_state(), before)

    assert [step for step, _ in losses] == list(range(CONFIG.steps))
    assert losses[0][1] == report.first_loss == pytest.approx(math.log(len(tokenizer)), abs=0.3)
    assert report.held_out_loss < report.unigram_loss - 0.5 < report.first_loss
    assert report.n_trained_tokens == 60 * 4 * 16
    assert report.n_parameters == sum(p.numel() for p in model.parameters())
    assert report.held_out_loss == pytest.approx(_loss(model, held_out), rel=1e-5)

    # Side by side with another, it comes out the same.
    with one_thread_each(), ThreadPoolExecutor(2) as pool:
        assert torch.get_num_threads() == 1
        other, again = pool.map(lambda config: train(tokenizer, config), (replace(CONFIG, seed=1), CONFIG))
    assert _same_weights(model, again[0])
    assert again[1].held_out_loss == report.held_out_loss
    assert not _same_weights(model, other[0])


def _same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def _loss(model, held_out, window=16):
    """Held-out loss, from the logits, one window at a time, in float64."""
    losses = []
    for start in range(0, len(held_out) - window + 1, window):
        ids = torch.from_numpy(held_out[start : start + window])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0].double()
        probabilities = torch.softmax(logits, dim=-1)
        losses += [-math.log(probabilities[i, ids[i + 1]]) for i in range(window - 1)]
    return sum(losses) / len(losses)


def test_text_shorter_than_a_window_is_refused(tokenizer):
    stream = encode_stream(tokenizer, TEXTS)
    for trained, held_out, what in ((stream[:15], stream, "training"), (stream, stream[:9], "held-out")):
        with pytest.raises(InvalidInputError, match=f"one window of 16 {what} tokens"):
            train_model(
                trained,
                held_out,
                vocab_size=300,
                boundary_id=0,
                config=CONFIG,
                on_step=lambda step, loss: None,
            )


def test_a_saved_model_loads_as_any_other_and_is_used_again_only_if_it_is_the_same(tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = replace(CONFIG, steps=2)
    model, report, held_out = train(tokenizer, config)
    folder = tmp_path / "tiny"
    assert saved_report(folder, config=config, text_sha256="t") is None
    for _ in range(2):  # the second replaces the first
        save_model(folder, model, tokenizer, config=config, text_sha256="t", report=report)
    assert sorted(tmp_path.iterdir()) == [folder]
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", REPORT_FILE} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt"))]

    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert _loss(loaded, held_out) == pytest.approx(report.held_out_loss, rel=1e-5)
    again = AutoTokenizer.from_pretrained(folder)
    assert [again(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert again.bos_token == again.eos_token == BOUNDARY

    assert saved_report(folder, config=config, text_sha256="t") == report
    assert saved_report(folder, config=config, text_sha256="other") is None
    assert saved_report(folder, config=CONFIG, text_sha256="t") is None
