"""Examples of latents against plain loops over all codes: values that tie, masks, folding, odd corpora, missing postings."""

import json

import numpy as np
import pytest

import actstore
from actstore.cli import main
from actstore.errors import ErrorKind, InvalidInputError, NotFoundError
from actstore.query import latent_examples
from actstore.query.bands import random, top
from actstore.query.row_mask import sink_rule
from actstore.sampling import Sample
from actstore.stats import SINK_NORM_RATIO
from tests.query.make_codes import (
    H,
    add_codes,
    dead_codes,
    everywhere_codes,
    random_codes,
    repeated_store,
    stored_rows,
    wide_codes,
)
from tests.query.make_store import WORDS, add_run, make_store, random_values
from tests.query.naive_latents import (
    check_context,
    check_rows,
    count_firing,
    densest,
    eligible_rows,
    norm_limit,
    ranked,
)

N_LATENTS = 60


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Values that tie, special tokens, sinks by norm, rows that are not finite."""
    made = make_store(str(tmp_path_factory.mktemp("latents") / "s"), seed=5, n_documents=40)
    widths = {H: 12, "layers.1.mlp_act": 24}
    add_run(made, "run", widths, random_values(1, widths, nonfinite=True, sinks=True))
    n = len(stored_rows(made, "run"))
    return add_codes(made, random_codes(n, N_LATENTS, ties=True))


def latent(index, dictionary="sae"):
    return actstore.latent(dictionary, index)


@pytest.mark.parametrize("fold", ["context", "doc", None])
@pytest.mark.parametrize("k", [1, 7, 500])
def test_against_a_plain_loop(told, fold, k):
    rows = eligible_rows(told, H)
    for index in range(0, N_LATENTS, 5):
        result = told.made.run().examples(latent(index), k, fold=fold)
        check_rows(told, index, result, ranked(told, index, rows, fold)[:k])
        assert result.meta.n_eligible == count_firing(told, index, rows)
        assert (result.meta.n_requested, result.meta.n_returned) == (k, len(result))
        assert (result.meta.exact, result.meta.recall, result.meta.version) == (
            True,
            1.0,
            told.made.store.version,
        )


@pytest.mark.parametrize(("special", "sinks"), [(True, False), (False, True), (False, False)])
def test_masks_can_be_turned_off_and_are_counted(told, special, sinks):
    index = densest(told)
    result = told.made.run().examples(latent(index), 1000, fold=None, mask_special=special, mask_sinks=sinks)
    rows = eligible_rows(told, H, special=special, sinks=sinks)
    check_rows(told, index, result, ranked(told, index, rows, None))
    mask = result.meta.mask[f"latent:sae:{index}"]
    assert mask["n_rows"] == len(told.firing(index)[0])
    assert mask["n_rows"] - sum(mask["removed"].values()) == result.meta.n_eligible == len(result)
    assert set(mask["removed"]) == {*(["special"] * special), *(["window_first", "norm"] * sinks)}
    assert ("norm_limit" in mask) == sinks
    if sinks:
        assert mask["removed"]["norm"] > 0
        assert mask["max_norm_ratio"] == SINK_NORM_RATIO


def test_same_columns_as_a_neuron(told):
    run = told.made.run()
    one, other = run.examples(latent(3), 5), run.examples(actstore.neuron(H, 3), 5)
    assert one.table.schema == other.table.schema
    assert {*one.meta.request} == {*other.meta.request}
    several = run.examples([latent(3), actstore.neuron(H, 3), latent(densest(told))], 5)
    assert several.table.column_names == ["target", *one.table.column_names]
    assert [r["row"] for r in several if r["target"] == "latent:sae:3"] == [r["row"] for r in one]
    assert [r["row"] for r in several if r["target"] == f"neuron:{H}:3"] == [r["row"] for r in other]
    assert list(several.meta.mask) == ["latent:sae:3", f"latent:sae:{densest(told)}", H]
    assert several.meta.n_requested == 15
    json.loads(several.to_json())


def test_many_latents_answer_as_alone(told):
    run = told.made.run()
    together = run.examples([latent(i) for i in range(N_LATENTS)], 6)
    assert together.meta.n_requested == 6 * N_LATENTS
    rows = eligible_rows(told, H)
    assert together.meta.n_eligible == sum(count_firing(told, i, rows) for i in range(N_LATENTS))
    for i in range(N_LATENTS):
        mine = [r for r in together.to_dicts() if r.pop("target") == f"latent:sae:{i}"]
        assert mine == run.examples(latent(i), 6).to_dicts()


def test_where_rows_docs_and_regex(told):
    run, index = told.made.run(), densest(told)
    some = told.rows[::3]
    kept = set(some.tolist())
    cases = [
        ({"where": "source = 'web' AND position > 3"}, lambda t: t.doc_id % 3 == 0 and t.position > 3),
        ({"rows": some}, lambda t: t.row in kept),
        ({"docs": [30, 3, 5]}, lambda t: t.doc_id in (3, 5, 30)),
        ({"regex": "^w1"}, lambda t: WORDS[t.token_id].startswith("w1")),
        ({"regex": "^[ck]at$|漢", "docs": slice(0, 30)},
         lambda t: WORDS[t.token_id] in ("cat", "漢字") and t.doc_id < 30),
        ({"where": "n > 10000"}, lambda t: False),
    ]  # fmt: skip
    for options, keep in cases:
        rows = eligible_rows(told, H, keep=keep)
        result = run.examples(latent(index), 100, **options)
        check_rows(told, index, result, ranked(told, index, rows, "context")[:100])
        assert result.meta.n_eligible == count_firing(told, index, rows)
        removed = result.meta.mask[f"latent:sae:{index}"]["removed"]
        assert set(options) <= set(removed)
    assert any("the masks leave none" in w for w in result.meta.warnings)
    assert run.examples(latent(index), regex="cat").meta.request["regex"] == "cat"


def test_regex_holds_for_neurons_too(told):
    result = told.made.run().examples(actstore.neuron(H, 2), 50, regex="^(cat|dog)$")
    assert {r["token"] for r in result} == {"cat", "dog"}
    assert result.meta.mask[H]["removed"]["regex"] > 100
    with pytest.raises(InvalidInputError, match="no regular expression"):
        told.made.run().examples(actstore.neuron(H, 2), regex="(cat")


def test_windows_stay_in_their_window(tmp_path):
    """Windows that overlap, none of them with special tokens."""
    made = make_store(
        str(tmp_path / "s"), seed=2, n_documents=20, window=12, overlap=4, bos=False, rows_per_unit=128
    )
    add_run(made, "run", {H: 4}, random_values(4, {H: 4}))
    told = add_codes(made, random_codes(len(made.tokens), 20, per_row=4))
    for index in range(0, 20, 4):
        for r in made.run().examples(latent(index), 50, before=3, after=2, fold=None):
            check_context(told, index, r, before=3, after=2)
        check_rows(
            told,
            index,
            made.run().examples(latent(index), 50),
            ranked(told, index, eligible_rows(told, H), "context")[:50],
        )


def test_special_tokens_shown(told):
    result = told.made.run().examples(
        latent(densest(told)), 500, mask_special=False, mask_sinks=False, fold=None, before=2, after=2
    )
    specials = [r for r in result if r["token"] == "<bos>"]
    assert specials
    for r in result:
        check_context(told, densest(told), r, before=2, after=2)
    assert all(r["context"]["token_start"] == r["context"]["token_end"] == 0 for r in specials)


def test_dead_latents_have_no_examples(tmp_path):
    made = make_store(str(tmp_path / "s"), n_documents=6)
    add_run(made, "run", {H: 4}, random_values(1, {H: 4}))
    add_codes(made, dead_codes(len(made.tokens), 16))
    result = made.run().examples([latent(0), latent(15)])
    assert len(result) == 0
    assert result.table.column_names[:4] == ["target", "rank", "row", "doc_id"]
    assert [w for w in result.meta.warnings if "is dead" in w] == [
        f"latent:sae:{i} is dead: it fires on none of the {len(made.tokens)} encoded rows" for i in (0, 15)
    ]
    assert (result.meta.n_eligible, result.meta.n_returned, result.meta.n_requested) == (0, 0, 40)


@pytest.mark.parametrize("value_dtype", ["float16", "float32"])
def test_a_latent_that_fires_everywhere(tmp_path, value_dtype):
    made = make_store(str(tmp_path / "s"), n_documents=120, rows_per_unit=256)
    add_run(made, "run", {H: 4}, random_values(1, {H: 4}))
    told = add_codes(made, everywhere_codes(len(made.tokens), 12), value_dtype=value_dtype)
    rows = eligible_rows(told, H)
    for fold in ("context", "doc", None):
        result = made.run().examples(latent(3), 300, fold=fold)
        check_rows(told, 3, result, ranked(told, 3, rows, fold)[:300])
        assert result.meta.n_eligible == len(rows)


def test_latents_beyond_16_bits(tmp_path):
    made = make_store(str(tmp_path / "s"), n_documents=10)
    add_run(made, "run", {H: 4}, random_values(1, {H: 4}))
    told = add_codes(made, wide_codes(len(made.tokens)), dictionary="wide")
    rows = eligible_rows(told, H)
    for index in (0, 39, 40, 69_960, 69_999):
        result = made.run().examples(latent(index, "wide"))
        check_rows(told, index, result, ranked(told, index, rows, "context")[:20])
    with pytest.raises(NotFoundError, match="latents 0 to 69999"):
        made.run().examples(latent(70_000, "wide"))


@pytest.mark.parametrize("bos", [True, False])
def test_one_token_repeated_and_tiny_documents(tmp_path, bos):
    """Near-duplicates everywhere; documents of one token and of none."""
    made = repeated_store(str(tmp_path / "s"), bos=bos)
    add_run(made, "run", {H: 4}, random_values(1, {H: 4}))
    told = add_codes(made, random_codes(len(made.tokens), 10, per_row=5, ties=True))
    for sinks in (True, False):
        rows = eligible_rows(told, H, sinks=sinks)
        for index in range(10):
            result = made.run().examples(latent(index), 50, mask_sinks=sinks)
            check_rows(told, index, result, ranked(told, index, rows, "context")[:50])
            assert len(result) <= 8  # so many different contexts of one word there are
            result = made.run().examples(latent(index), 50, mask_sinks=sinks, fold="doc")
            check_rows(told, index, result, ranked(told, index, rows, "doc")[:50])


def test_no_postings_yet(told, tmp_path):
    made = make_store(str(tmp_path / "s"), n_documents=20)
    add_run(made, "run", {H: 4}, random_values(1, {H: 4}))
    told = add_codes(made, random_codes(len(made.tokens), 30, ties=True), postings=False)
    rows = eligible_rows(told, H)
    result = made.run().examples([latent(i) for i in range(30)], 9)
    for i in range(30):
        wanted = ranked(told, i, rows, "context")[:9]
        assert [(r["row"], r["value"]) for r in result if r["target"] == f"latent:sae:{i}"] == wanted
    assert sum("have no postings yet" in w for w in result.meta.warnings) == 1
    with pytest.raises(InvalidInputError, match="build postings") as caught:
        made.run().examples(latent(densest(told)), memory_bytes=1000)
    assert caught.value.kind is ErrorKind.TOO_LARGE


def test_an_unfinished_run(tmp_path):
    made = make_store(str(tmp_path / "s"), n_documents=20)
    add_run(made, "run", {H: 4}, random_values(1, {H: 4}), skip_units=(1,), seal=False)
    n = len(stored_rows(made, "run", (0,)))
    told = add_codes(made, random_codes(n, 12, per_row=4), skip_units=(0,))
    rows = eligible_rows(told, H)
    index = densest(told)
    result = made.run().examples(latent(index), 40)
    check_rows(told, index, result, ranked(told, index, rows, "context")[:40])
    warnings = " ".join(result.meta.warnings)
    assert all(
        text in warnings
        for text in ("run 'run' is not complete", "codes 'sae@run' are not complete", "no postings")
    )


def test_a_run_that_keeps_a_sample(tmp_path):
    """Tokens whose rows are not stored have no value, and are no answers."""
    made = make_store(str(tmp_path / "s"), n_documents=60)
    add_run(made, "run", {H: 4}, random_values(1, {H: 4}), sample=Sample(0.3, seed=3))
    told = add_codes(made, random_codes(len(stored_rows(made, "run")), 12, per_row=4))
    rows = eligible_rows(told, H)
    for index in range(12):
        result = made.run().examples(latent(index), 40)
        check_rows(told, index, result, ranked(told, index, rows, "context")[:40])
    values = [v for r in result for v in r["context"]["values"]]
    assert None in values
    assert any("keeps a sample" in w for w in result.meta.warnings)


def check_strongest(told, result, index, wanted):
    """An answer for which only the strongest rows of a latent were looked at."""
    check_rows(told, index, result, wanted)
    assert result.meta.n_eligible is None
    mask = result.meta.mask[f"latent:sae:{index}"]
    assert mask["n_rows"] == len(told.firing(index)[0]) >= mask["n_examined"]


def test_a_list_too_long_for_memory_is_not_read_whole(told):
    rows = eligible_rows(told, H)
    long = [i for i in range(N_LATENTS) if len(told.firing(i)[0]) > 40]
    assert len(long) > 10
    for index in long:
        for fold in ("context", None):
            result = told.made.run().examples(latent(index), 15, fold=fold, memory_bytes=40 * 96)
            check_strongest(told, result, index, ranked(told, index, rows, fold)[:15])
    # Nearly all rows are masked: the search goes on to the end.
    keep = set(told.rows[::50].tolist())
    rows = eligible_rows(told, H, keep=lambda t: t.row in keep)
    result = told.made.run().examples(latent(long[0]), 15, rows=sorted(keep), memory_bytes=40 * 96)
    check_strongest(told, result, long[0], ranked(told, long[0], rows, "context")[:15])


def test_rows_in_too_many_units_are_not_all_looked_at(tmp_path):
    made = make_store(str(tmp_path / "s"), n_documents=60, rows_per_unit=2 * latent_examples.WHOLE_TOKENS)
    add_run(made, "run", {H: 4}, random_values(1, {H: 4}))
    told = add_codes(made, random_codes(len(made.tokens), 12, per_row=4, ties=True))
    rows = eligible_rows(told, H)
    for index in np.flatnonzero(np.diff(told.matrix.tocsc().indptr)).tolist():
        result = made.run().examples(latent(index), 15)
        check_strongest(told, result, index, ranked(told, index, rows, "context")[:15])


@pytest.mark.parametrize("fold", ["context", "doc", None])
def test_rows_in_few_units_are_all_counted_and_those_in_many_are_not(tmp_path, fold):
    made = make_store(str(tmp_path / "s"), n_documents=60, rows_per_unit=32)
    add_run(made, "run", {H: 4}, random_values(1, {H: 4}, sinks=True))
    told = add_codes(made, random_codes(len(made.tokens), 120, per_row=4, ties=True))
    rows = eligible_rows(told, H)
    seen = set()
    for index in range(120):
        n_units = len(np.unique(told.firing(index)[0] // 32))
        result = made.run().examples(latent(index), 9, fold=fold)
        wanted = ranked(told, index, rows, fold)[:9]
        if n_units > latent_examples.WHOLE_UNITS:
            check_strongest(told, result, index, wanted)
        else:
            check_rows(told, index, result, wanted)
            assert result.meta.n_eligible == count_firing(told, index, rows)
        seen.add(n_units > latent_examples.WHOLE_UNITS)
    assert seen == {True, False}


def test_sinks_named_by_the_statistics(told, tmp_path):
    """Where a run's statistics name the rows of massive norm no norm is read: those stored with the codes are made up here."""
    assert sink_rule(told.made.run(), H).rows is None  # made without tokens
    made = make_store(str(tmp_path / "s"), n_documents=30)
    add_run(made, "run", {H: 6}, random_values(1, {H: 6}, sinks=True), names_sinks=True)
    told = add_codes(made, random_codes(len(made.tokens), 10, per_row=4), norms=np.ones(len(made.tokens)))
    norms = np.array([np.linalg.norm(made.acts["run", H][r].astype(np.float64)) for r in told.rows.tolist()])
    told.norms = norms
    assert sink_rule(made.run(), H).rows.tolist() == told.rows[norms > norm_limit(told, H)].tolist()
    assert (norms > norm_limit(told, H)).sum() > 3
    for index in range(10):
        wanted = ranked(told, index, eligible_rows(told, H), "context")[:20]
        check_rows(told, index, made.run().examples(latent(index)), wanted)


def test_sinks_at_the_first_token_alone(tmp_path):
    """More of them than the statistics name; but those count norms by place, and the place is masked anyway."""
    made = make_store(str(tmp_path / "s"), n_documents=80)
    values = random_values(1, {H: 6})

    def with_sinks(hook_point, tokens):
        acts = values(hook_point, tokens)
        acts[[t.window_position == 0 for t in tokens]] *= 300
        return acts

    add_run(made, "run", {H: 6}, with_sinks, names_sinks=True)
    n = len(made.tokens)
    assert sum(t.window_position == 0 for t in made.tokens) > 100
    told = add_codes(made, random_codes(n, 10, per_row=4), norms=np.ones(n))
    assert len(sink_rule(made.run(), H).rows) == 0
    index = densest(told)
    wanted = ranked(told, index, eligible_rows(told, H), "context")[:20]
    check_rows(told, index, made.run().examples(latent(index)), wanted)


def test_bad_questions(told, tmp_path):
    run = told.made.run()
    with pytest.raises(NotFoundError, match=f"latents 0 to {N_LATENTS - 1}"):
        run.examples(latent(N_LATENTS))
    with pytest.raises(NotFoundError, match="encoded with \\['sae'\\]"):
        run.examples(latent(1, "other"))
    with pytest.raises(InvalidInputError, match="never negative"):
        run.examples(latent(1), sign="abs")
    with pytest.raises(InvalidInputError, match="only latents have them"):
        run.examples([latent(1), actstore.neuron(H, 1)], bands=top(3))
    with pytest.raises(InvalidInputError, match="made with actstore"):
        run.examples(latent(1), bands="top:3")
    with pytest.raises(InvalidInputError, match="RE2"):
        run.examples(latent(1), regex="(?=a)")
    with pytest.raises(InvalidInputError, match="neither tokens nor documents"):
        run.examples(latent(1), where="nonsense > 3")
    with pytest.raises(InvalidInputError, match=r"bands\.top"):
        run.examples(latent(densest(told)), bands=random(3), memory_bytes=1000)
    with pytest.raises(NotFoundError, match="document 40"):
        run.examples(latent(1), docs=[40])
    made = make_store(str(tmp_path / "s"), n_documents=3)
    add_run(made, "run", {H: 4}, random_values(1, {H: 4}))
    with pytest.raises(NotFoundError, match="no dictionaries"):
        made.run().examples(latent(1))


def test_command_line(told, capsys):
    index = densest(told)
    url = told.made.url
    assert main(["examples", url, "run", f"latent:sae:{index}", "--regex", "^w", "-k", "3", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    rows = eligible_rows(told, H, keep=lambda t: WORDS[t.token_id].startswith("w"))
    wanted = ranked(told, index, rows, "context")[:3]
    assert [(r["row"], r["value"]) for r in answer["rows"]] == wanted
    assert main(["examples", url, "run", f"latent:sae:{index}", "--bands", "top:2,random:3@4", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [r["band"] for r in answer["rows"]] == ["top"] * 2 + ["random"] * 3
    assert answer["meta"]["seed"] == 4
    assert main(["examples", url, "run", f"latent:sae:{index}"]) == 0
    assert "rows eligible" in capsys.readouterr().out
    for arguments, code in (
        (["latent:sae:60"], 3), (["latent:no:1"], 3), (["latent:sae:1", "--bands", "best:3"], 2),
        (["latent:sae:1", "--regex", "("], 2), (["latent:sae:1", "--sign", "abs"], 2), ([f"neuron:{H}:1", "--bands", "top:3"], 2),
    ):  # fmt: skip
        assert main(["examples", url, "run", *arguments]) == code
        assert capsys.readouterr().err.startswith("actstore: ")
