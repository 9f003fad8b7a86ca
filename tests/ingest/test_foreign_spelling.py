"""Text and characters of imported tokens, against the tokenizers' own decoding and offsets."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.errors import ErrorKind, InvalidInputError
from actstore.ingest.foreign.id_tokenizer import id_tokenizer
from actstore.ingest.foreign.source import TokenBatch
from actstore.ingest.foreign.spelling import DecodingSpeller, IdSpeller, WordSpeller, decode_bytes
from actstore.ingest.tokenizers import load_tokenizer
from tests.ingest import foreign_sources
from tests.ingest.foreign_sources import TEXTS, TOKENIZERS

LOADED = {name: load_tokenizer(make()) for name, make in TOKENIZERS.items()}
SPELLERS = {name: DecodingSpeller(tokenizer) for name, tokenizer in LOADED.items()}


def batch_of(documents, words=None) -> TokenBatch:
    ids = np.array([i for d in documents for i in d], np.int32)
    lengths = np.array([len(d) for d in documents], np.int64)
    return TokenBatch(0, [str(i) for i in range(len(documents))], lengths, ids, words=words)


def check_order(texts, lengths, starts, ends) -> None:
    n_chars = np.repeat([len(t) for t in texts], lengths)
    assert (starts >= 0).all()
    assert (starts <= ends).all()
    assert (ends <= n_chars).all()
    for a, b in itertools.pairwise(np.concatenate([[0], np.cumsum(lengths)])):
        assert (np.diff(starts[a:b]) >= 0).all()
        assert (np.diff(ends[a:b]) >= 0).all()


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_ids_give_the_decoded_text_and_ordered_ranges(kind, data):
    """Whatever the ids, broken UTF-8 included; nothing of the text lies outside all tokens."""
    vocab = LOADED[kind].backend().get_vocab_size()
    ids = st.lists(st.integers(0, vocab - 1), min_size=1, max_size=20)
    documents = data.draw(st.lists(ids, min_size=1, max_size=3))
    spelled = SPELLERS[kind](batch_of(documents))
    expected = [LOADED[kind].backend().decode(d, skip_special_tokens=False) for d in documents]
    assert spelled.texts == expected
    lengths = [len(d) for d in documents]
    check_order(spelled.texts, lengths, spelled.starts, spelled.ends)
    at = 0
    for text, n in zip(spelled.texts, lengths, strict=True):
        covered = np.zeros(len(text), bool)
        for a, b in zip(spelled.starts[at : at + n], spelled.ends[at : at + n], strict=True):
            covered[a:b] = True
        assert covered.all()
        at += n


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@settings(deadline=None, max_examples=100)
@given(text=st.text(st.sampled_from("aé漢🎉 w☃.!"), min_size=1, max_size=30))
def test_ranges_of_real_text_are_the_tokenizers_own(kind, text):
    """Encoding a text and spelling its ids gives the text back, and the offsets of `tokenizers` up to white space."""
    encoding = LOADED[kind].backend().encode(text, add_special_tokens=False)
    if not encoding.ids or "<unk>" in encoding.tokens:
        return
    spelled = SPELLERS[kind](batch_of([encoding.ids]))
    assert spelled.texts == [text]
    found = list(zip(spelled.starts.tolist(), spelled.ends.tolist(), strict=True))
    if kind == "byte_level":
        assert found == [tuple(o) for o in encoding.offsets]
    for token, (a, b), (c, d) in zip(encoding.tokens, found, encoding.offsets, strict=True):
        # The space that SentencePiece puts before the first word is no character of the text; `tokenizers` says it covers one.
        if token.strip("▁"):
            assert text[a:b].strip() == text[c:d].strip()


def test_special_tokens_and_tokens_with_spaces_are_in_the_text():
    backend = LOADED["byte_level"].backend()
    ids = [backend.token_to_id("<s>"), *backend.encode("naïve", add_special_tokens=False).ids]
    ids.append(backend.token_to_id("<|end of text|>"))
    spelled = SPELLERS["byte_level"](batch_of([ids]))
    assert spelled.texts == ["<s>naïve<|end of text|>"]
    assert spelled.texts[0][spelled.starts[0] : spelled.ends[0]] == "<s>"
    assert spelled.texts[0][spelled.starts[-1] : spelled.ends[-1]] == "<|end of text|>"


def test_every_token_of_one_character_covers_it():
    ids = LOADED["byte_level"].backend().encode("🎉", add_special_tokens=False).ids
    backend = LOADED["byte_level"].backend()
    by_bytes = [
        backend.token_to_id(t)
        for t in foreign_sources.pre_tokenizers.ByteLevel(False).pre_tokenize_str("🎉")[0][0]
    ]
    assert len(by_bytes) == 4
    spelled = SPELLERS["byte_level"](batch_of([by_bytes, ids]))
    assert spelled.texts == ["🎉", "🎉"]
    assert spelled.starts.tolist() == [0] * (4 + len(ids))
    assert spelled.ends.tolist() == [1] * (4 + len(ids))


def test_a_document_cut_inside_of_a_character():
    tokenizer = LOADED["sentencepiece"].backend()
    ids = [tokenizer.token_to_id(f"<0x{b:02X}>") for b in "é".encode()[1:] + b"a" + "é".encode()[:1]]
    spelled = SPELLERS["sentencepiece"](batch_of([ids]))
    assert spelled.texts == [tokenizer.decode(ids)]
    check_order(spelled.texts, [3], spelled.starts, spelled.ends)


def test_unknown_ids_are_refused():
    with pytest.raises(InvalidInputError, match="has no token 5000") as caught:
        SPELLERS["byte_level"](batch_of([[1, 5000]]))
    assert caught.value.kind is ErrorKind.BAD_TOKENIZER


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=60))
def test_bytes_as_text(data):
    text, char_at = decode_bytes(data)
    assert text == data.decode("utf-8", errors="replace")
    assert len(char_at) == len(data) + 1
    assert char_at[-1] == len(text)
    steps = np.diff(char_at)
    assert ((steps == 0) | (steps == 1)).all()
    for i, c in enumerate(text):
        if c != "�":
            assert data[char_at.searchsorted(i) : char_at.searchsorted(i + 1)] == c.encode()


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.lists(st.sampled_from([*TEXTS, "", "é", " "]), min_size=1, max_size=6), min_size=1, max_size=3
    )
)
def test_words_side_by_side(documents):
    words = [w for d in documents for w in d]
    spelled = WordSpeller()(batch_of([[0] * len(d) for d in documents], words=words))
    assert spelled.texts == ["".join(d) for d in documents]
    whole = [t for t, d in zip(spelled.texts, documents, strict=True) for _ in d]
    found = [t[a:b] for t, a, b in zip(whole, spelled.starts, spelled.ends, strict=True)]
    assert found == words


def test_numbers_of_tokens_as_text():
    spelled = IdSpeller()(batch_of([[5, 170], [0]]))
    assert spelled.texts == ["<5> <170>", "<0>"]
    assert [t[a:b] for t, a, b in zip(["<5> <170>"] * 2, spelled.starts, spelled.ends, strict=False)] == [
        "<5>",
        "<170>",
    ]
    tokenizer = load_tokenizer(id_tokenizer([5, 170, 0], [0]))
    assert tokenizer.backend().encode("<5> <170>").ids == [5, 170]
    assert tokenizer.special_ids == (0,)
