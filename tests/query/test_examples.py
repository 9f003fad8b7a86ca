import json

import numpy as np
import pytest

import actstore
from actstore.errors import ErrorKind, InvalidInputError, NotFoundError
from actstore.query.examples import examples
from actstore.stats import SINK_NORM_RATIO
from tests.query.make_store import BOS, WORDS, add_run, make_store, random_values
from tests.query.naive import context_key, dot, eligible, same, top

H = "layers.0.resid_post"
SIGNS = {"pos": lambda v: v, "neg": lambda v: -v, "abs": abs}


def signed(value, sign):
    """A score function: larger comes first."""
    return lambda acts: SIGNS[sign](value(acts))


def check(made, result, wanted, value, hook_point=H, run="run"):
    rows = result.to_dicts()
    assert [r["row"] for r in rows] == [row for row, _ in wanted]
    assert [r["rank"] for r in rows] == list(range(1, len(rows) + 1))
    for r in rows:
        token = made.by_row[r["row"]]
        assert (r["doc_id"], r["position"], r["token_id"]) == (token.doc_id, token.position, token.token_id)
        assert r["token"] == WORDS[token.token_id]
        assert r["value"] == pytest.approx(
            value(made.acts[run, hook_point][r["row"]].astype(float)), rel=1e-12, abs=1e-12
        )


@pytest.mark.parametrize("sign", ["pos", "neg", "abs"])
@pytest.mark.parametrize("fold", ["context", "doc", None])
@pytest.mark.parametrize("kind", ["neuron", "direction"])
def test_against_a_plain_loop(made, sign, fold, kind):
    rng = np.random.default_rng([len(sign), len(str(fold)), len(kind)])
    w = rng.standard_normal(12)
    if kind == "neuron":
        target, value = actstore.neuron(H, 5), lambda a: a[5]
    else:
        target, value = actstore.direction(H, w), lambda a: dot(a, w)
    result = made.run().examples(target, 30, sign=sign, fold=fold)
    rows = list(eligible(made, H))
    check(made, result, top(made, rows, signed(value, sign), 30, fold), value)
    assert result.meta.n_eligible == len(rows)
    assert (result.meta.exact, result.meta.recall, result.meta.version) == (True, 1.0, made.store.version)
    assert result.meta.n_requested == 30
    assert result.meta.n_returned == len(result)


@pytest.mark.parametrize(("special", "sinks"), [(True, False), (False, True), (False, False)])
def test_masks_can_be_turned_off_and_are_counted(made, special, sinks):
    result = made.run().examples(
        actstore.neuron(H, 2), 1000, fold=None, sign="abs", mask_special=special, mask_sinks=sinks
    )
    rows = list(eligible(made, H, special=special, sinks=sinks))
    check(made, result, top(made, rows, signed(lambda a: a[2], "abs"), 1000, None), lambda a: a[2])
    mask = result.meta.mask[H]
    assert mask["n_rows"] - sum(mask["removed"].values()) == result.meta.n_eligible == len(rows)
    n_special = sum(t.is_special for t in made.tokens)
    assert mask["removed"].get("special") == (n_special if special else None)
    assert ("norm_limit" in mask) == sinks
    if not special and not sinks:
        nonfinite = sum(not np.isfinite(a).all() for a in made.acts["run", H].values())
        assert mask["removed"] == {"nonfinite": nonfinite}
        assert nonfinite > 10
        assert any(f"{nonfinite} rows hold NaN" in w for w in result.meta.warnings)


def test_sinks_would_lead_and_do_not(made):
    with_sinks = made.run().examples(actstore.neuron(H, 0), 5, mask_sinks=False).to_dicts()
    without = made.run().examples(actstore.neuron(H, 0), 5).to_dicts()
    assert min(r["value"] for r in with_sinks) > 20 > max(r["value"] for r in without)
    assert SINK_NORM_RATIO == 10


@pytest.mark.parametrize("run", ["half", "part"])
def test_bfloat16_and_unfinished_runs(made, run):
    w = np.random.default_rng(3).standard_normal(24)
    hook_point = "layers.1.mlp_act"
    result = made.run(run).examples(actstore.direction(hook_point, w), 20)
    rows = list(eligible(made, hook_point, run))
    check(
        made,
        result,
        top(made, rows, signed(lambda a: dot(a, w), "pos"), 20),
        lambda a: dot(a, w),
        hook_point,
        run,
    )
    assert result.meta.n_eligible == len(rows)
    assert any("not complete" in w for w in result.meta.warnings) == (run == "part")


def test_many_targets_share_one_pass_and_answer_as_alone(made):
    rng = np.random.default_rng(4)
    targets = [actstore.neuron(H, 1), actstore.direction(H, rng.standard_normal(12), name="mine")]
    targets += [actstore.neuron("layers.1.mlp_act", 3), actstore.neuron("blocks.0.hook_resid_post", 7)]
    together = made.run().examples(targets, 8)
    assert together.table.column_names[0] == "target"
    assert list(dict.fromkeys(together.table["target"].to_pylist())) == [t.label for t in targets]
    for target in targets:
        alone = made.run().examples(target, 8)
        mine = [r for r in together.to_dicts() if r.pop("target") == target.label]
        assert same(mine, alone.to_dicts())
    assert together.meta.n_requested == 32
    assert set(together.meta.mask) == {H, "layers.1.mlp_act"}


def test_blocks_of_any_size_give_the_same_answer(made):
    target = actstore.direction(H, np.arange(12.0) - 6)
    first = made.run().examples(target, 25).to_dicts()
    for memory in (1 << 20, 4 << 20):
        assert same(made.run().examples(target, 25, memory_bytes=memory).to_dicts(), first)
    with pytest.raises(InvalidInputError, match="too small"):
        made.run().examples(target, memory_bytes=100)


def test_contexts_are_cut_from_the_document_and_stay_in_the_window(overlapping):
    made = overlapping
    result = made.run().examples(actstore.neuron(H, 3), 200, before=3, after=2, fold=None)
    assert len(result) > 50
    for r in result:
        token, context = made.by_row[r["row"]], r["context"]
        window = [t for t in made.tokens if (t.doc_id, t.window) == (token.doc_id, token.window)]
        shown = [t for t in window if -3 <= t.window_position - token.window_position <= 2]
        assert context["tokens"] == [WORDS[t.token_id] for t in shown]
        assert shown[context["token_index"]] is token
        assert context["values"] == [float(made.acts["run", H][t.row][3]) for t in shown]
        assert context["values"][context["token_index"]] == r["value"]
        text = made.texts[token.doc_id]
        assert context["text"] == text[shown[0].char_start : shown[-1].char_end]
        assert (
            context["text"][context["token_start"] : context["token_end"]]
            == text[token.char_start : token.char_end]
        )


def test_context_of_a_special_token(made):
    result = made.run("half").examples(
        actstore.neuron(H, 0), 500, mask_special=False, mask_sinks=False, fold=None, before=2, after=2
    )
    specials = [r for r in result if r["token_id"] == BOS]
    assert specials
    for r in specials:
        assert r["token"] == "<bos>"
        assert r["context"]["tokens"][0] == "<bos>"
        assert r["context"]["token_start"] == r["context"]["token_end"] == 0


def test_overlapping_windows_fold(overlapping):
    """A token that two windows hold, with the same eight before it, is one answer."""
    made = overlapping
    rows = list(eligible(made, H))
    result = made.run().examples(actstore.neuron(H, 9), 10_000)
    check(made, result, top(made, rows, signed(lambda a: a[9], "pos"), 10_000), lambda a: a[9])
    keys = [context_key(made, made.by_row[r["row"]]) for r in result]
    assert len(keys) == len(set(keys)) < len(rows)


def test_rows_and_docs(made):
    run, target = made.run(), actstore.neuron(H, 4)
    rows = sorted(made.by_row)[10:200:3]
    keep = set(rows)
    wanted = top(made, eligible(made, H, keep=lambda t: t.row in keep), signed(lambda a: a[4], "pos"), 20)
    check(made, run.examples(target, 20, rows=rows), wanted, lambda a: a[4])
    check(made, run.examples(target, 20, rows=np.array(rows[::-1])), wanted, lambda a: a[4])
    wanted = top(made, eligible(made, H, keep=lambda t: 64 <= t.row < 300), signed(lambda a: a[4], "pos"), 20)
    check(made, run.examples(target, 20, rows=slice(64, 300)), wanted, lambda a: a[4])
    wanted = top(
        made, eligible(made, H, keep=lambda t: t.doc_id in (3, 5, 30)), signed(lambda a: a[4], "pos"), 20
    )
    check(made, run.examples(target, 20, docs=[30, 3, 5]), wanted, lambda a: a[4])
    assert len(run.examples(target, rows=[])) == 0


def test_a_dead_neuron_is_called_one(tmp_path):
    made = make_store(str(tmp_path / "s"), n_documents=5)
    add_run(made, "run", {H: 4}, lambda h, tokens: np.tile(np.float32([0, -1, 2, 2]), (len(tokens), 1)))
    run = made.run()
    for index, sign in ((0, "pos"), (0, "neg"), (0, "abs"), (1, "pos")):
        result = run.examples(actstore.neuron(H, index), sign=sign)
        assert set(result.table["value"].to_pylist()) == {0.0 if index == 0 else -1.0}
        assert any("20 of the 20 rows are not" in w for w in result.meta.warnings)
    assert not run.examples(actstore.neuron(H, 1), sign="neg").meta.warnings
    ties = run.examples(actstore.neuron(H, 2), 7, fold=None).table["row"].to_pylist()
    assert ties == [t.row for t in made.tokens if not t.is_special and t.window_position > 0][:7]


def test_all_zero_hook_point(tmp_path):
    made = make_store(str(tmp_path / "s"), n_documents=3)
    add_run(made, "run", {H: 4}, lambda h, tokens: np.zeros((len(tokens), 4), np.float32))
    result = made.run().examples(actstore.direction(H, [1.0, 0, 0, 0]), sign="abs")
    assert set(result.table["value"].to_pylist()) == {0.0}
    result = made.run().nearest(H, [1.0, 0, 0, 0])
    assert len(result) == 0
    assert result.meta.mask["removed"]["zero_norm"] > 0


def test_answers_are_pinned_to_a_version(tmp_path):
    made = make_store(str(tmp_path / "s"), n_documents=6)
    widths = {H: 4}
    add_run(made, "run", widths, random_values(1, widths), skip_units=(0,), seal=False)
    result = made.run().examples(actstore.neuron(H, 1))
    rest = [u.unit for u in made.store.tokenization(made.tokenization).units][1:]
    assert result.meta.version == made.store.version
    assert {r["row"] // 64 for r in result} <= set(rest)


def test_meta_is_json_and_complete(made):
    result = made.run().examples(actstore.neuron(H, 2), 3, where="n > 5")
    answer = json.loads(result.to_json())
    assert answer["meta"]["request"] == {
        "verb": "examples", "run": "run", "target": [f"neuron:{H}:2"], "k": 3, "sign": "pos", "before": 16, "after": 8,
        "where": "n > 5", "mask_special": True, "mask_sinks": True, "fold": "context",
    }  # fmt: skip
    assert answer["meta"]["bytes_read"] > 0
    assert [r["row"] for r in answer["rows"]] == result.table["row"].to_pylist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be"), ({"k": 10_001}, "k must be"), ({"k": True}, "k must be"), ({"k": 1.5}, "k must be"),
        ({"sign": "positive"}, "'pos', 'neg', 'abs'"), ({"fold": "docs"}, "'context', 'doc', None"),
        ({"before": -1}, "before must be"), ({"after": 5000}, "after must be"), ({"rows": [0.5]}, "whole numbers"),
        ({"rows": np.ones(5, bool)}, "whole numbers"), ({"rows": slice(-5, None)}, "never count from the end"),
    ],
)  # fmt: skip
def test_bad_options(made, options, message):
    with pytest.raises(InvalidInputError, match=message):
        examples(made.run(), actstore.neuron(H, 0), **options)


def test_bad_targets(made):
    run = made.run()
    with pytest.raises(InvalidInputError, match="neurons 0 to 11"):
        run.examples(actstore.neuron(H, 12))
    with pytest.raises(InvalidInputError, match="3 dimensions"):
        run.examples(actstore.direction(H, [1.0, 2.0, 3.0]))
    with pytest.raises(NotFoundError, match="no dictionaries"):
        run.examples(actstore.latent("sae", 3))
    with pytest.raises(NotFoundError) as caught:
        run.examples(actstore.neuron("layers.7.resid_post", 0))
    assert caught.value.kind is ErrorKind.HOOK_POINT_NOT_FOUND
    for bad in ([], "neuron:x:1", [3]):
        with pytest.raises(InvalidInputError):
            run.examples(bad)
    with pytest.raises(NotFoundError, match="document 40"):
        run.examples(actstore.neuron(H, 0), docs=[40])
    with pytest.raises(NotFoundError, match="row"):
        run.examples(actstore.neuron(H, 0), rows=[10**9])
