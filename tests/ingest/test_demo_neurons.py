"""Are the demo's stories about neurons and directions true? Planted ones are found, and nothing else is."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actstore.errors import InvalidInputError
from actstore.ingest.demo.directions import separate_kinds
from actstore.ingest.demo.facts import NO_TOKEN, TokenFacts
from actstore.ingest.demo.neurons import Story, choose_stories, find_stories, top_rows

WORDS = {0: "<|endoftext|>", 1: " self", 2: "(", 3: " import", 4: "\n", 5: " the", 6: "x", 7: " re"}
WORDS |= {i: f" word{i}" for i in range(8, 20)}
KINDS = ("docstring", "source", "topic")


def make_facts(seed, n=4000, n_documents=80):
    """Random tokens; rows have gaps, as those of units that end early."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 20, n)
    tokens[1:] = np.where(
        (tokens[:-1] == 7) & (rng.uniform(size=n - 1) < 0.8), 6, tokens[1:]
    )  # " re" goes on with "x"
    documents = np.sort(rng.integers(0, n_documents, n))
    starts = np.r_[True, documents[1:] != documents[:-1]]
    return TokenFacts(
        rows=np.sort(rng.choice(2 * n, n, replace=False)),
        token_ids=np.where(starts, 0, tokens),
        previous_ids=np.where(starts, NO_TOKEN, np.r_[0, np.where(starts, NO_TOKEN, tokens)[:-1]]),
        doc_ids=documents,
        kind_codes=documents % 3,
        is_held_out=documents % 5 == 0,
        is_shown=~starts,
        kinds=KINDS,
        words=WORDS,
    )


def batches(facts, acts, sizes=(700, 1, 999, 100_000)):
    start = 0
    for size in sizes:
        if start < len(acts):
            yield facts.rows[start : start + size], acts[start : start + size]
        start += size


@given(st.integers(0, 2**32 - 1), st.integers(1, 60))
def test_top_rows_are_those_of_a_full_sort(seed, k):
    facts = make_facts(seed, n=300, n_documents=20)
    acts = np.random.default_rng(seed).normal(size=(300, 5)).astype(np.float32)
    acts[:, 4] = -1  # a dead neuron
    rows_kd, values_kd = top_rows(batches(facts, acts, (100, 3, 500)), facts, k=k)
    for d in range(5):
        allowed = np.where(facts.is_shown, acts[:, d], 0)
        order = np.argsort(-allowed)[:k]
        expected = {int(facts.rows[i]): float(allowed[i]) for i in order if allowed[i] > 0}
        got = {int(r): float(v) for r, v in zip(rows_kd[:, d], values_kd[:, d], strict=True) if r >= 0}
        assert got == expected
        assert (values_kd[rows_kd[:, d] < 0, d] == 0).all()
        assert (np.diff(values_kd[:, d]) <= 0).all()


def plant(facts, seed):
    """Noise below 1, and one neuron per pattern that is above 2 where its pattern is."""
    rng = np.random.default_rng(seed)
    acts = rng.uniform(0, 1, (len(facts.rows), 11)).astype(np.float32)
    fires = {
        0: facts.token_ids == 1,
        1: facts.previous_ids == 2,
        2: (facts.token_ids == 3) & (facts.previous_ids == 4),
        3: facts.kind_codes == 1,
        5: (facts.token_ids == 1) & (facts.doc_ids < 8),  # knows a few documents by heart
        6: facts.token_ids == 2,  # no readable token
        8: (facts.token_ids == 5) & (rng.uniform(size=len(facts.rows)) < 0.7),
        9: facts.token_ids == 7,  # part of words
        10: facts.token_ids == 8,  # but see below
    }
    for neuron, mask in fires.items():
        acts[mask, neuron] += 2
    acts[:, 7] = 0  # dead
    acts[np.flatnonzero(facts.is_shown & (facts.token_ids != 8))[::3000], 10] = (
        9  # the strongest are of other tokens
    )
    return acts


@pytest.mark.parametrize("seed", [0, 1])
def test_planted_neurons_are_told_with_their_true_shares_and_others_are_not(seed):
    facts = make_facts(seed, n=20_000)
    rows_kd, _ = top_rows(batches(facts, plant(facts, seed)), facts, k=50)
    stories = {story.neuron: story for story in find_stories("layers.0.mlp_act", rows_kd, facts)}
    assert {neuron: story.pattern for neuron, story in stories.items()} == {
        0: "token",
        1: "after",
        2: "pair",
        3: "kind",
        8: "token",
    }
    shown = facts.is_shown
    assert (stories[0].token, stories[0].share) == (" self", 1.0)
    assert stories[0].base_share == pytest.approx(np.mean(facts.token_ids[shown] == 1))
    assert (stories[1].previous, stories[1].share) == ("(", 1.0)
    assert stories[1].base_share == pytest.approx(np.mean(facts.previous_ids[shown] == 2))
    both = (facts.token_ids == 3) & (facts.previous_ids == 4)
    assert (stories[2].token, stories[2].previous) == (" import", "\n")
    assert stories[2].share == pytest.approx(min(1.0, both.sum() / 50))
    assert stories[2].base_share == pytest.approx(both[shown].mean())
    assert (stories[3].kind, stories[3].share) == ("source", 1.0)
    for neuron, story in stories.items():
        at = np.isin(facts.rows, rows_kd[:, neuron])
        assert (story.n_rows, story.n_documents) == (50, len(set(facts.doc_ids[at].tolist())))


def story(neuron, pattern, share, hook_point="layers.0.mlp_act", **what):
    about = {"token": None, "previous": None, "kind": None} | what
    return Story(
        hook_point, neuron, pattern, **about, share=share, base_share=0.01, n_rows=200, n_documents=90
    )


def test_chosen_stories_are_the_best_of_each_pattern_about_different_things_from_all_layers():
    given = [
        story(1, "token", 0.99, token=" self"),
        story(2, "token", 0.98, token="self"),
        story(3, "token", 0.97, token=" the"),
        story(4, "token", 0.7, "layers.1.mlp_act", token=" import"),
        story(5, "token", 0.9, "layers.1.mlp_act", token=" return"),
        story(6, "kind", 0.95, kind="source"),
        story(7, "after", 0.6, previous=" return"),
        story(8, "after", 0.5, previous="("),
    ]
    chosen = choose_stories(reversed(given), {"token": 3, "pair": 1, "after": 2, "kind": 1})
    assert [s.neuron for s in chosen] == [1, 5, 3, 8, 6]
    assert choose_stories(given, {"token": 2}) == [given[0], given[4]]
    assert choose_stories([], {"token": 2}) == []


def test_a_story_is_told_in_words():
    assert story(1, "pair", 0.834, token="._", previous=" self").sentence() == (
        "fires on '._' after ' self': 83% of its 200 strongest tokens, from 90 documents (1.0% of all tokens)"
    )
    assert story(1, "kind", 1, kind="source").sentence().startswith("fires in source text, on no token")
    assert (
        story(1, "after", 1, previous="\x1b")
        .sentence(quote=ascii)
        .startswith(r"fires on whatever follows '\x1b'")
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_a_direction_between_kinds_is_found_and_its_accuracy_is_that_of_the_planted_one(seed):
    facts = make_facts(seed, n=20_000, n_documents=400)
    rng = np.random.default_rng(seed)
    planted = np.zeros(12)
    planted[3] = 1.0
    acts = rng.normal(size=(20_000, 12)) + 5.0 * np.eye(12)[7]
    acts += np.outer((facts.kind_codes == 1) * 0.7 - (facts.kind_codes == 2) * 0.7, planted)
    acts[~facts.is_shown] = 1e6  # attention sinks count nowhere
    acts = acts.astype(np.float32)
    found = separate_kinds(lambda: batches(facts, acts, (9000, 20_000)), facts, toward="source", away="topic")
    assert np.linalg.norm(found.vector) == pytest.approx(1)
    assert found.vector @ planted > 0.97
    # Two unit Gaussians 1.4 apart, told apart in the middle: Phi(0.7) is right.
    assert found.accuracy == pytest.approx(0.5 * (1 + math.erf(0.7 / math.sqrt(2))), abs=0.03)
    asked = facts.is_shown & facts.is_held_out & (facts.kind_codes > 0)
    assert found.n_held_out == asked.sum()
    signs = np.where(facts.kind_codes[asked] == 1, 1, -1)
    right = np.sign(acts[asked].astype(float) @ found.vector) == signs
    by_kind = [right[signs == sign].mean() for sign in (1, -1)]
    assert found.accuracy == pytest.approx(sum(by_kind) / 2)


def test_a_direction_needs_both_kinds():
    facts = make_facts(0)
    with pytest.raises(
        InvalidInputError, match=r"trained tokens of kind 'poem', found none.*docstring, source, topic"
    ):
        separate_kinds(list, facts, toward="poem", away="topic")
