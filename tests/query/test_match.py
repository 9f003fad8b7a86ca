"""Patterns over stored codes against a walk over every token."""

import itertools
import json

import numpy as np
import pytest

import actstore
from actstore.cli import main
from actstore.errors import ErrorKind, InvalidInputError, NotFoundError
from actstore.patterns import conjunctions, leaves
from actstore.query.match import fires
from tests.query import naive
from tests.query.make_store import WORDS


def leaf(name, index, **bounds):
    return fires(actstore.latent(name, index), **bounds)


def frequent(codes, n):
    """Latents of different densities that fire at all, the most frequent first."""
    counts = np.diff(codes.matrix.tocsc().indptr)
    return np.argsort(-counts, kind="stable")[:n].tolist()


def counting_tokens(coded, names, special, sinks):
    """Tokens on which firing counts, by row: those that are no sink at any dictionary's hook point."""
    tokens = {t.row: t for t in coded[names[0]].made.tokens if not (special and t.is_special)}
    for codes in (coded[name] for name in names if sinks):
        limit = 10 * np.median(codes.norms.astype(np.float64))
        for row, norm in zip(codes.rows.tolist(), codes.norms.tolist(), strict=True):
            if norm > limit or (row in tokens and tokens[row].window_position == 0):
                tokens.pop(row, None)
    return tokens


def segment(token, scope):
    return token.doc_id if scope == "document" else (token.doc_id, token.window)


def place(token, scope):
    return token.position if scope == "document" else token.window_position


def brute_matches(coded, pattern, *, within, ordered=False, scope="window", special=True, sinks=True):
    """Strength and parts of every row at which the pattern holds."""
    found = {}
    names = list(dict.fromkeys(one.latent.dictionary for one in leaves(pattern)))
    tokens = counting_tokens(coded, names, special, sinks)
    for conjunction in conjunctions(pattern):
        firing = {}
        for one in (*conjunction.positive, *conjunction.negative):
            rows, values = coded[one.latent.dictionary].firing(one.latent.index)
            firing[one] = [
                (tokens[r], v)
                for r, v in zip(rows.tolist(), values.tolist(), strict=True)
                if r in tokens and one.above < v < one.below
            ]
        largest = {
            one: coded[one.latent.dictionary].column(one.latent.index).max() for one in conjunction.positive
        }
        for anchor, value in firing[conjunction.positive[0]]:
            here, at = segment(anchor, scope), place(anchor, scope)
            near = [
                [(t, v) for t, v in firing[one] if segment(t, scope) == here and abs(place(t, scope) - at) <= within]
                for one in conjunction.positive[1:]
            ]  # fmt: skip
            if any(
                segment(t, scope) == here and abs(place(t, scope) - at) <= within
                for one in conjunction.negative
                for t, _ in firing[one]
            ):
                continue
            if ordered:
                near = [[(t, v) for t, v in each if place(t, scope) > at] for each in near]
            choices = [
                places
                for choice in itertools.product(*near)
                if (places := [at, *(place(t, scope) for t, _ in choice)])
                and max(places) - min(places) <= within
                and (not ordered or all(a < b for a, b in itertools.pairwise(places)))
            ]
            if not choices:
                continue
            best = [value / largest[conjunction.positive[0]]]
            for one, each in zip(conjunction.positive[1:], near, strict=True):
                best.append(max(v for _, v in each) / largest[one])
            found[anchor.row] = max(found.get(anchor.row, 0.0), min(best))
    return found


def best_of(coded, matches, k, fold="context"):
    made = coded["sae"].made
    rows = [(t, None) for t in made.tokens if t.row in matches]
    scores = iter([matches[t.row] for t, _ in rows])
    return naive.top(made, rows, lambda _: next(scores), k, fold)


def check(coded, pattern, k=12, fold="context", **options):
    result = coded["sae"].made.run().match(pattern, k, fold=fold, **options)
    asked = {name: options[name] for name in ("within", "ordered", "scope") if name in options}
    wanted = brute_matches(
        coded, pattern, special=options.get("mask_special", True), sinks=options.get("mask_sinks", True),
        **{"within": 0, **asked},
    )  # fmt: skip
    told = [(r["row"], r["value"]) for r in result]
    assert told == [(row, pytest.approx(score, rel=1e-12)) for row, score in best_of(coded, wanted, k, fold)]
    assert result.meta.n_eligible == len(wanted)
    return result, wanted


@pytest.mark.parametrize("scope", ["window", "document"])
@pytest.mark.parametrize("ordered", [False, True])
def test_random_patterns(coded, scope, ordered):
    rng = np.random.default_rng([7, ordered, scope == "document"])
    latents = frequent(coded["sae"], 14)
    n_found = 0
    for _ in range(12):
        a, b, c, d = (leaf("sae", int(i)) for i in rng.choice(latents, 4, replace=False))
        bound = a > float(rng.choice([0.5, 1.0]))
        patterns = [a & b, a & b & c, bound & ~b, (a & ~c) | (b & d), a & (b | ~d), a & b & c & ~d]
        pattern = patterns[rng.integers(0, len(patterns))]
        _, wanted = check(
            coded, pattern, within=int(rng.integers(0, 6)) + ordered, ordered=ordered, scope=scope,
            fold=[None, "context", "doc"][rng.integers(0, 3)],
        )  # fmt: skip
        n_found += len(wanted)
    assert n_found > 50


def test_two_dictionaries_masks_and_ties(coded):
    sae, other = frequent(coded["sae"], 6), frequent(coded["other"], 6)
    pattern = leaf("sae", sae[1]) & leaf("other", other[1])
    for special, sinks in itertools.product([False, True], repeat=2):
        check(coded, pattern, within=3, mask_special=special, mask_sinks=sinks, fold=None, k=50)
    # Values of "sae" are few: strengths tie, and equal ones come by row.
    result, _ = check(coded, leaf("sae", sae[0]) & leaf("sae", sae[2]), within=1, fold=None, k=60)
    values, rows = result.table["value"].to_pylist(), result.table["row"].to_pylist()
    assert len(set(values)) < len(values)
    assert [(-v, r) for v, r in zip(values, rows, strict=True)] == sorted(
        (-v, r) for v, r in zip(values, rows, strict=True)
    )


def test_answers_without_postings_are_the_same(coded):
    """Codes without postings are scanned; those of an unfinished run are what is there, with a warning."""
    bare = frequent(coded["bare"], 5)
    pattern = (leaf("bare", bare[0]) & leaf("bare", bare[1])) | (leaf("sae", 1) & ~leaf("bare", bare[2]))
    check(coded, pattern, within=2, fold=None, k=40)
    half = frequent(coded["half"], 3)
    result, wanted = check(coded, leaf("half", half[0]) & leaf("half", half[1]), within=4, fold=None, k=5)
    assert any("not complete" in w for w in result.meta.warnings)
    assert wanted


def test_rows_that_count(coded):
    made = coded["sae"].made
    a, b = frequent(coded["sae"], 2)
    pattern = leaf("sae", a) & leaf("sae", b)
    wanted = brute_matches(coded, pattern, within=5)
    tokens = made.by_row
    for options, keep in (
        ({"where": "n < 20 AND position > 3"}, lambda t: made.metadata[t.doc_id]["n"] < 20 and t.position > 3),
        ({"docs": [3, 7, 20]}, lambda t: t.doc_id in (3, 7, 20)),
        ({"rows": slice(100, 400)}, lambda t: 100 <= t.row < 400),
        ({"regex": "^w1"}, lambda t: WORDS[t.token_id].startswith("w1")),
    ):  # fmt: skip
        kept = {row: s for row, s in wanted.items() if keep(tokens[row])}
        result = made.run().match(pattern, 1000, within=5, fold=None, **options)
        assert [r["row"] for r in result] == [row for row, _ in best_of(coded, kept, 1000, None)]
        assert result.meta.n_eligible == len(kept)
        [(name, _)] = [(n, c) for n, c in result.meta.mask["removed"].items() if c]
        assert name in options
    in_order = made.run().match(pattern, 7, within=5, fold=None, rank="row")
    assert [r["row"] for r in in_order] == sorted(wanted)[:7]
    assert in_order.meta.request["pattern"] == f"latent:sae:{a} & latent:sae:{b}"


def test_contexts_and_parts(coded):
    made, codes = coded["sae"].made, coded["sae"]
    a, b = frequent(codes, 3)[1:]
    result = made.run().match(leaf("sae", a) & leaf("sae", b), 10, within=3, before=4, after=3)
    tokens = made.by_row
    assert len(result) == 10
    for row in result:
        token, context = tokens[row["row"]], row["context"]
        assert (row["doc_id"], row["position"], row["token_id"]) == (
            token.doc_id, token.position, token.token_id
        )  # fmt: skip
        start = row["row"] - context["token_index"]
        for offset, value in enumerate(context["values"]):
            shares = [codes.value(start + offset, i) / codes.column(i).max() for i in (a, b)]
            assert value == pytest.approx(max(shares))
        own, near = row["parts"]
        assert (own["row"], own["distance"], own["value"]) == (row["row"], 0, codes.value(row["row"], a))
        assert near["value"] == codes.value(near["row"], b)
        assert near["distance"] == near["row"] - row["row"]
        assert row["value"] == pytest.approx(
            min(own["value"] / codes.column(a).max(), near["value"] / codes.column(b).max())
        )


def test_nothing_to_find(coded):
    run, codes = coded["sae"].made.run(), coded["sae"]
    dead = int(np.flatnonzero(np.diff(codes.matrix.tocsc().indptr) == 0)[0])
    for pattern in (leaf("sae", dead), leaf("sae", 0) & leaf("sae", dead), leaf("sae", 0, above=1e6)):
        result = run.match(pattern, 3, within=2)
        assert len(result) == 0
        assert result.table.column_names[-1] == "context"
        assert "0 rows were found of 3 asked for" in result.meta.warnings


def test_overlapping_windows(overlapping):
    """In a document a token of two windows has one position: distances are between positions, across windows."""
    from tests.query.make_codes import add_codes, random_codes, stored_rows

    codes = add_codes(overlapping, random_codes(len(stored_rows(overlapping, "run")), 20, seed=9))
    coded = {"sae": codes}
    a, b, c = frequent(codes, 3)
    for scope in ("window", "document"):
        check(
            coded, leaf("sae", a) & leaf("sae", b) & ~leaf("sae", c), within=2, scope=scope, fold=None, k=30
        )
        check(coded, leaf("sae", a) & leaf("sae", b), within=9, ordered=True, scope=scope, fold=None, k=30)


def test_errors(coded):
    run = coded["sae"].made.run()
    pattern = leaf("sae", 0)
    for error, wrong in (
        (NotFoundError, {"pattern": leaf("sae", 60)}),
        (NotFoundError, {"pattern": leaf("absent", 0)}),
        (NotFoundError, {"docs": [999]}),
        (InvalidInputError, {"pattern": ~pattern}),
        (InvalidInputError, {"pattern": pattern & ~pattern}),
        (InvalidInputError, {"regex": "\ud800"}),
        (InvalidInputError, {"rows": slice("a")}),
        (InvalidInputError, {"pattern": 3}),
        (InvalidInputError, {"within": -1}),
        (InvalidInputError, {"scope": "corpus"}),
        (InvalidInputError, {"rank": "value"}),
        (InvalidInputError, {"where": "no_such_column = 1"}),
        (InvalidInputError, {"regex": "("}),
        (InvalidInputError, {"k": 0}),
        (InvalidInputError, {"before": -1}),
    ):
        with pytest.raises(error):
            run.match(**{"pattern": pattern, **wrong})
    with pytest.raises(InvalidInputError, match="memory_bytes") as caught:
        run.match(leaf("sae", frequent(coded["sae"], 1)[0]), memory_bytes=100)
    assert caught.value.kind == ErrorKind.TOO_LARGE


def test_command(coded, capsys):
    made = coded["sae"].made
    a, b = frequent(coded["sae"], 2)
    assert (
        main(["match", made.url, "run", "sae", f"{a} > 0.5 & {b}", "--within", "2", "-k", "3", "--json"]) == 0
    )
    answer = json.loads(capsys.readouterr().out)
    wanted = made.run().match(leaf("sae", a, above=0.5) & leaf("sae", b), 3, within=2)
    assert [r["row"] for r in answer["rows"]] == wanted.table["row"].to_pylist()
    assert main(["match", made.url, "run", "sae", "3 &"]) == 2
    assert "cannot be read" in capsys.readouterr().err
