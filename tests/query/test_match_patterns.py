"""Patterns and the geometry of firing together, against truth tables and every span tried one by one."""

import itertools

import numpy as np
import pytest

from actstore.errors import ErrorKind, InvalidInputError
from actstore.patterns import (
    AllOf,
    AnyOf,
    Fires,
    Pattern,
    conjunctions,
    describe,
    fires,
    leaves,
    parse_pattern,
)
from actstore.query.cofiring import match_anchors, near_rows, stretch, strongest
from actstore.targets import latent, neuron

LEAVES = [fires(latent("s", i)) for i in range(4)]


def truth(pattern: Pattern, firing: dict[Fires, bool]) -> bool:
    if isinstance(pattern, Fires):
        return firing[pattern]
    if isinstance(pattern, AllOf):
        return all(truth(part, firing) for part in pattern.parts)
    if isinstance(pattern, AnyOf):
        return any(truth(part, firing) for part in pattern.parts)
    return not truth(pattern.part, firing)


def random_pattern(rng: np.random.Generator, depth: int) -> Pattern:
    kind = rng.integers(0, 4) if depth else 0
    if kind == 0:
        return LEAVES[rng.integers(0, len(LEAVES))]
    if kind == 1:
        return ~random_pattern(rng, depth - 1)
    a, b = random_pattern(rng, depth - 1), random_pattern(rng, depth - 1)
    return a & b if kind == 2 else a | b


def test_alternatives_say_what_the_pattern_says():
    """At distance 0 a pattern is a formula of logic: its alternatives have the same truth table."""
    rng = np.random.default_rng(0)
    checked = 0
    for _ in range(400):
        pattern = random_pattern(rng, 3)
        if truth(pattern, dict.fromkeys(LEAVES, False)):
            with pytest.raises(InvalidInputError):
                conjunctions(pattern)
            continue
        try:
            found = conjunctions(pattern)
        except (
            InvalidInputError
        ):  # an alternative holds where nothing fires, though others imply that something does
            continue
        for bits in itertools.product([False, True], repeat=len(LEAVES)):
            firing = dict(zip(LEAVES, bits, strict=True))
            told = any(
                all(firing[leaf] for leaf in c.positive) and not any(firing[leaf] for leaf in c.negative)
                for c in found
            )
            assert told == truth(pattern, firing), describe(pattern)
        checked += 1
    assert checked > 100


def test_text_and_back():
    rng = np.random.default_rng(1)
    for _ in range(200):
        pattern = random_pattern(rng, 4)
        again = parse_pattern(describe(pattern), "other")
        for bits in itertools.product([False, True], repeat=len(LEAVES)):
            firing = dict(zip(LEAVES, bits, strict=True))
            assert truth(again, firing) == truth(pattern, firing)
    read = parse_pattern("3>0.5 & ~( 4 <2 |latent:b:9 > 1e-2 )", "sae")
    assert describe(read) == "latent:sae:3 > 0.5 & ~(latent:sae:4 < 2 | latent:b:9 > 0.01)"
    assert [leaf.latent.dictionary for leaf in leaves(read)] == ["sae", "sae", "b"]


@pytest.mark.parametrize(
    "text", ["", "3 &", "3 4", "(3", "3)", "&3", "3 > ", "3 > x", "neuron:a:1", "3.5", "-3", "3 > -1", "3 > 2 < 1", "a", "~"]
)  # fmt: skip
def test_text_that_is_no_pattern(text):
    with pytest.raises(InvalidInputError) as caught:
        parse_pattern(text, "sae")
    assert caught.value.kind == ErrorKind.BAD_ARGUMENT


def test_what_is_no_pattern():
    a, b = LEAVES[:2]
    for wrong in (
        lambda: a and b,
        lambda: not a,
        lambda: a & 3,
        lambda: conjunctions(~a),
        lambda: conjunctions(a | ~b),
        lambda: conjunctions("3"),
        lambda: fires(neuron("layers.0.mlp_act", 1)),
        lambda: fires(latent("s", 1), above=float("nan")),
        lambda: fires(latent("s", 1), above=2, below=2),
        lambda: a > -1,
        lambda: a > "1",
        lambda: parse_pattern("(" * 1000 + "1" + ")" * 1000, "s"),
        lambda: parse_pattern("1" * 5000, "s"),
    ):
        with pytest.raises(InvalidInputError):
            wrong()
    many = [fires(latent("s", i)) for i in range(14)]
    with pytest.raises(InvalidInputError, match="alternatives"):
        conjunctions(AllOf(tuple(x | y for x, y in itertools.batched(many, 2)) if hasattr(itertools, "batched") else tuple(
            many[i] | many[i + 1] for i in range(0, 14, 2)
        )))  # fmt: skip
    with pytest.raises(InvalidInputError, match="conditions"):
        conjunctions(AnyOf(tuple(LEAVES[0] for _ in range(40))))
    assert conjunctions((a & ~a) | b) == conjunctions(b)
    assert conjunctions(a & a & b) == conjunctions(a & b)


def brute_force(anchors, others, silent, within, ordered):
    holds = []
    for r in anchors.tolist():
        found = any(
            max((r, *choice)) - min((r, *choice)) <= within
            and (not ordered or all(x < y for x, y in itertools.pairwise((r, *choice))))
            for choice in itertools.product(*(o.tolist() for o in others))
        )
        holds.append(found and not any(abs(r - x) <= within for s in silent for x in s.tolist()))
    return np.array(holds, bool)


@pytest.mark.parametrize("ordered", [False, True])
def test_anchors_against_every_choice(ordered):
    rng = np.random.default_rng(2)
    n_true = 0
    for _ in range(300):
        size = int(rng.integers(1, 60))

        def draw(size=size):
            return np.sort(rng.choice(size, int(rng.integers(0, min(size, 9) + 1)), replace=False))

        positive = [draw() for _ in range(int(rng.integers(1, 4)))]
        negative = [draw() for _ in range(int(rng.integers(0, 2)))]
        within = int(rng.integers(0, 8))
        found = match_anchors(positive, negative, within=within, ordered=ordered)
        wanted = brute_force(positive[0], positive[1:], negative, within, ordered)
        assert np.array_equal(found, wanted)
        n_true += wanted.sum()
    assert n_true > 100


def test_strongest_near_an_anchor():
    rng = np.random.default_rng(3)
    for _ in range(200):
        anchors = np.sort(rng.integers(0, 40, int(rng.integers(0, 12))))
        where = np.sort(rng.integers(0, 40, int(rng.integers(0, 12))))
        values = rng.integers(1, 4, len(where)).astype(float)
        before, after = int(rng.integers(-1, 4)), int(rng.integers(0, 4))
        best, at = strongest(anchors, where, values, before=before, after=after)
        for r, b, i in zip(anchors.tolist(), best.tolist(), at.tolist(), strict=True):
            near = [j for j, x in enumerate(where.tolist()) if r - before <= x <= r + after]
            assert i == (max(near, key=lambda j: (values[j], -j)) if near else -1)
            assert b == (values[i] if near else -np.inf)


def test_stretched_coordinates_keep_segments_apart():
    rng = np.random.default_rng(4)
    segments, places = rng.integers(0, 5, 60), rng.integers(0, 9, 60)
    for within in (0, 1, 7, 30):
        where = stretch(segments.astype(np.int64), places.astype(np.int64), within, 9)
        for i, j in itertools.product(range(60), repeat=2):
            near = segments[i] == segments[j] and abs(places[i] - places[j]) <= within
            assert (abs(int(where[i]) - int(where[j])) <= within) == near
    rows, others = np.array([1, 5, 9]), np.array([3, 20])
    assert near_rows(rows, others, 2).tolist() == [True, True, False]


def test_latents_are_patterns_by_themselves():
    a, b = latent("sae", 3), latent("sae", 9)
    assert conjunctions(a & b) == conjunctions(fires(a) & fires(b))
    assert conjunctions(a | (b > 0.5)) == conjunctions(fires(a) | (fires(b) > 0.5))
    assert conjunctions((a < 2.0) & ~b) == conjunctions((fires(a) < 2.0) & ~fires(b))


def test_latents_are_not_joined_by_and():
    a, b = latent("s", 1), latent("s", 2)
    for joined in (lambda: a and b, lambda: a or b, lambda: not a):
        with pytest.raises(InvalidInputError, match="neither true nor false"):
            joined()


def test_bounds_between_which_nothing_lies():
    for bounds in (lambda: (LEAVES[0] > 5) < 3, lambda: LEAVES[0] > float("inf"), lambda: LEAVES[0] < 0):
        with pytest.raises(InvalidInputError, match="nothing lies"):
            bounds()


@pytest.mark.parametrize("bound", [0.1234567890123, 1e-7, 2.0, 1e22])
def test_an_echoed_bound_is_the_bound(bound):
    pattern = LEAVES[0] > bound
    assert parse_pattern(describe(pattern), "s") == pattern


def test_a_pattern_of_thousands_of_latents_is_refused_by_its_size():
    pattern, negated = LEAVES[0], LEAVES[0]
    for _ in range(5000):
        pattern, negated = pattern | LEAVES[1], ~negated
    with pytest.raises(InvalidInputError, match="5001 conditions"):
        conjunctions(pattern)
    assert conjunctions(negated) == conjunctions(LEAVES[0])
