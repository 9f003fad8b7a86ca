"""`where=` against the same condition in plain Python, and against predicates that want out of their bracket."""

import pytest

import actstore
from actstore.errors import ErrorKind, InvalidInputError
from tests.query.make_store import WORDS
from tests.query.naive import eligible

H = "layers.0.resid_post"


def doc(made, token):
    return made.metadata[token.doc_id]


CASES = {
    "source = 'web'": lambda m, t: doc(m, t)["source"] == "web",
    "n % 7 = 3 OR token = 'cat'": lambda m, t: doc(m, t)["n"] % 7 == 3 or WORDS[t.token_id] == "cat",
    "score > 3": lambda m, t: doc(m, t)["score"] is not None and doc(m, t)["score"] > 3,
    "NOT (score > 3)": lambda m, t: doc(m, t)["score"] is not None and not doc(m, t)["score"] > 3,
    "score IS NULL": lambda m, t: doc(m, t)["score"] is None,
    "position BETWEEN 3 AND 5": lambda m, t: 3 <= t.position <= 5,
    "document_position = 'page 4'": lambda m, t: t.doc_id == 4,
    "contains(text, '漢字') and \"window\" = 1": lambda m, t: "漢字" in m.texts[t.doc_id] and t.window == 1,
    "source_key in ('key1', 'key12')": lambda m, t: t.doc_id in (1, 12),
    "token_id < 5 -- a comment": lambda m, t: t.token_id < 5,
    "row >= 100 /* multi\nline */ and row < 200": lambda m, t: 100 <= t.row < 200,
    "lower(token) LIKE 'w1%' AND char_end - char_start > 3": lambda m, t: (
        WORDS[t.token_id].startswith("w1") and t.char_end - t.char_start > 3
    ),
    "corpus = 'docs'": lambda m, t: True,
    "1 = 0": lambda m, t: False,
    "is_special": lambda m, t: t.is_special,
    "tokens.n = 3": lambda m, t: t.doc_id == 3,
    "hash(row) >= 0": lambda m, t: True,
    "(n = 1) OR (n = 2)": lambda m, t: t.doc_id in (1, 2),
}


@pytest.mark.parametrize("where", CASES)
def test_against_plain_python(made, where):
    keep = CASES[where]
    result = made.run().examples(
        actstore.neuron(H, 1), 2000, where=where, fold=None, sign="abs", mask_special=False, mask_sinks=False,
        before=0, after=0,
    )  # fmt: skip
    rows = [t.row for t, _ in eligible(made, H, special=False, sinks=False, keep=lambda t: keep(made, t))]
    assert sorted(result.table["row"].to_pylist()) == rows
    removed = result.meta.mask[H]["removed"]["where"]
    assert removed == sum(not keep(made, t) for t in made.tokens)


HOSTILE = [
    "1=1) UNION SELECT 1 WHERE (1=1",
    "1=1); DROP TABLE tokens; SELECT (1",
    "1=1) ORDER BY row LIMIT 1 --",
    "1=1) GROUP BY ALL HAVING (1=1",
    "1=1) LIMIT (3",
    "row IN (SELECT row FROM tokens)",
    "row IN (SELECT row FROM read_parquet('/etc/passwd'))",
    "EXISTS (FROM '/etc/passwd')",
    "(SELECT count(*) FROM range(10)) = 10",
    "n = (SELECT 1)",
    "1=1) QUALIFY (row_number() OVER () = 1",
    "random() < 0.5",
    "current_setting('temp_directory') = 'x'",
    "getvariable('x') IS NULL",
    "sleep_ms(100) IS NULL",
    "",
    "   ",
    "--",
    "1 = ",
    "no_such_column = 3",
    "source = 3 AND",
    "COPY tokens TO '/tmp/x'",
    "unit_tokens.row = 3",
    "count(*) > 3",
    "text",
]


@pytest.mark.parametrize("where", HOSTILE)
def test_predicates_that_are_none(made, where):
    with pytest.raises(InvalidInputError) as caught:
        made.run().examples(actstore.neuron(H, 1), where=where)
    assert caught.value.kind is ErrorKind.BAD_SQL
    assert "/tmp/actstore" not in str(caught.value)


def test_an_unknown_column_lists_what_there_is(made):
    with pytest.raises(InvalidInputError, match="document_position"):
        made.run().examples(actstore.neuron(H, 1), where="sauce = 'web'")


def test_units_that_cannot_match_are_not_read(made):
    run, target = made.run(), actstore.neuron(H, 1)
    everything = run.examples(target).meta.bytes_read
    few = run.examples(target, where="n = 3").meta
    assert 0 < few.n_eligible < 60
    assert few.bytes_read < everything


def test_where_and_every_other_mask_together(made):
    result = made.run().examples(
        actstore.neuron(H, 1), 500, where="source <> 'web'", docs=range(20), rows=slice(50, 400), fold=None
    )
    keep = lambda t: doc(made, t)["source"] != "web" and t.doc_id < 20 and 50 <= t.row < 400  # noqa: E731
    rows = [t.row for t, a in eligible(made, H, keep=keep)]
    assert sorted(result.table["row"].to_pylist()) == rows
    mask = result.meta.mask[H]
    assert mask["n_rows"] - sum(mask["removed"].values()) == result.meta.n_eligible
