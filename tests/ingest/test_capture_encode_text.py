"""A text through the run's own model: the same tokens and rows as a plain call, and only through the same model."""

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from actstore.errors import ConflictError, ErrorKind, InvalidInputError, NotFoundError
from actstore.ingest.encode_text import encode_text
from actstore.ingest.models import load_model
from tests.ingest.tiny_models import cached, tokenizer_json

TEXTS = ["The with statement", "naïve café, 東京 and 🙂🙃", "x"]


def encode(family, texts, **changes):
    fingerprint = load_model(cached(family)).fingerprint
    arguments = {
        "model_source": cached(family),
        "expected_model": fingerprint,
        "compute_dtype": "float32",
        "attn_implementation": "sdpa",
        "hook_point": "layers.1.resid_post",
        "texts": texts,
        "tokenizer_json": tokenizer_json(512, family == "bert").encode(),
        "tokenizer_config": {},
        "window": 64,
        "add_special_tokens": True,
    }
    return encode_text(**arguments | changes)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_tokens_and_rows(family):
    tokenizer = AutoTokenizer.from_pretrained(cached(family))
    model = AutoModel.from_pretrained(cached(family)).eval()
    for text, got in zip(TEXTS, encode(family, TEXTS), strict=True):
        token_ids, offsets, is_special, activations = got
        plain = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
        assert token_ids.tolist() == plain["input_ids"]
        assert [tuple(o) for o in offsets.tolist()] == plain["offset_mapping"]
        assert is_special.tolist() == [bool(s) for s in plain["special_tokens_mask"]]
        assert is_special.sum() == (2 if family == "bert" else 0)
        with torch.no_grad():
            states = model(
                input_ids=torch.tensor([plain["input_ids"]]), output_hidden_states=True
            ).hidden_states
        assert activations.dtype == np.float32
        assert np.array_equal(activations, states[2][0])
    # A text's rows do not depend on the texts beside it.
    again = encode(family, TEXTS[1:2])
    assert np.array_equal(again[0].activations, encode(family, TEXTS)[1].activations)


def test_without_special_tokens_and_with_special_ids():
    (got,) = encode("bert", ["x"], add_special_tokens=False)
    assert got.token_ids.tolist() == [got.token_ids[0]]
    assert not got.is_special.any()
    (got,) = encode("bert", ["x"], tokenizer_config={"special_ids": [int(got.token_ids[0])]})
    assert got.is_special.all()


def test_special_tokens_written_in_a_text():
    text = "a<|endoftext|>b"
    (got,) = encode("gpt2", [text], tokenizer_config={"special_ids": [0], "split_special_tokens": False})
    assert got.is_special.tolist() == [False, True, False]
    (got,) = encode("gpt2", [text], tokenizer_config={"special_ids": [0], "split_special_tokens": True})
    assert len(got.token_ids) > 3
    assert not got.is_special.any()


def test_truncation_and_padding_of_the_tokenizer_are_off():
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json())
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=40)
    cut = encode("gpt2", TEXTS, tokenizer_json=tokenizer.to_str().encode())
    for a, b in zip(cut, encode("gpt2", TEXTS), strict=True):
        assert np.array_equal(a.token_ids, b.token_ids)


def test_another_model_is_refused(tmp_path):
    from tests.ingest.tiny_models import build

    build("gpt2", tmp_path, seed=1)
    with pytest.raises(ConflictError) as caught:
        encode("gpt2", TEXTS, model_source=str(tmp_path))
    assert caught.value.kind is ErrorKind.CONFIG_DIFFERS
    theirs, ours = (load_model(p).fingerprint["weights_sha256"] for p in (str(tmp_path), cached("gpt2")))
    assert f"weights_sha256 is {theirs!r}, the run's {ours!r}" in str(caught.value)
    with pytest.raises(ConflictError, match="dtype is 'bfloat16', the run's 'float32'"):
        encode("gpt2", TEXTS, compute_dtype="bfloat16")
    # The right one works after the wrong ones.
    assert len(encode("gpt2", TEXTS)) == 3


def test_what_cannot_be_encoded():
    for kind, changes in [
        (ErrorKind.BAD_ARGUMENT, {"texts": ["a", ""]}),
        (ErrorKind.TOO_LARGE, {"texts": ["statement " * 200]}),
        (ErrorKind.TOO_LARGE, {"texts": ["with statement"], "window": 2}),
        (ErrorKind.BAD_TOKENIZER, {"texts": ["a"], "tokenizer_json": b"{}"}),
        (ErrorKind.BAD_TOKENIZER, {"texts": ["a"], "tokenizer_json": b"\xff"}),
    ]:
        with pytest.raises(InvalidInputError) as caught:
            encode("gpt2", **changes)
        assert caught.value.kind is kind
    with pytest.raises(NotFoundError):
        encode("gpt2", TEXTS, hook_point="layers.9.resid_post")
    with pytest.raises(NotFoundError):
        encode("gpt2", TEXTS, model_source="/no/such/folder")
