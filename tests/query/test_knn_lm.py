"""kNN-LM against the equations of the paper written out over all rows, and against transformers' own softmax."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import actstore
from actstore.cli import main
from actstore.errors import ErrorKind, InvalidInputError, NotFoundError
from actstore.ingest import IngestConfig, import_corpus
from actstore.ingest import run as run_ingest
from actstore.query.answer import RowOptions, open_acts
from actstore.query.knn_context import Context
from actstore.query.knn_lm import default_hook_point
from actstore.query.knn_neighbours import find_neighbours
from actstore.query.nearest_rows import choose_way
from actstore.query.verbatim import holding, holding_among
from actstore.query.votes import SCALE_RANK, count_votes, gap_temperature
from actstore.sampling import Sample
from tests.ingest import tiny_models
from tests.query.make_index import add_index
from tests.query.make_store import WORDS, add_run, make_store, random_values
from tests.query.naive import eligible

H = "layers.0.resid_post"


def next_in_window(by_row, token):
    """The token after this one in its model window of its document, None if there is none."""
    after = by_row.get(token.row + 1)
    together = after is not None and (after.doc_id, after.window) == (token.doc_id, token.window)
    return after if together else None


def squared(a, b, metric):
    """Squared Euclidean distance, of the vectors scaled to length 1 if the metric is the cosine."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if metric == "cosine":
        a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    return math.fsum((a - b) ** 2)


def neighbours_of(made, query, k, metric="l2", run="run", keep=lambda token: True, **masks):
    """(distance, row, next token) of the k nearest of all rows, one after another."""
    found, by_row = [], made.by_row
    for token, acts in eligible(made, H, run, zero=metric == "cosine", keep=keep, **masks):
        after = next_in_window(by_row, token)
        if after is not None:
            found.append((squared(acts, query, metric), token.row, after.token_id))
    return sorted(found)[:k]


def p_knn_of(neighbours, temperature):
    """Equation 2, from large distances too: the common factor exp(min d / T) goes out."""
    nearest = min(d for d, _, _ in neighbours)
    weights = [(math.exp(-(d - nearest) / temperature), y) for d, _, y in neighbours]
    total = math.fsum(w for w, _ in weights)
    return {y: math.fsum(w for w, z in weights if z == y) / total for y in {y for _, y in weights}}


def some_row(made, run="run", position=3, doc_id=10):
    return next(t for t in made.tokens if t.doc_id == doc_id and t.window_position == position)


def check_against(result, neighbours, temperature):
    wanted = p_knn_of(neighbours, temperature)
    rows = {r["token_id"]: r for r in result if r["p"] > 0}
    assert set(rows) == {y for y, p in wanted.items() if p > 0}
    for y, row in rows.items():
        own = [(d, r) for d, r, z in neighbours if z == y]
        assert row["p_knn"] == row["p"] == pytest.approx(wanted[y], rel=1e-9)
        assert row["n_neighbours"] == len(own)
        assert row["nearest_distance"] == pytest.approx(own[0][0], rel=1e-9, abs=1e-12)
        assert row["nearest_row"] == own[0][1]
        assert row["token"] == WORDS[y]
        assert row["p_lm"] is None
    assert math.fsum(r["p"] for r in rows.values()) == pytest.approx(1.0, rel=1e-12)
    listed = [r for r in result.to_dicts() if r["p"] > 0]
    assert listed == sorted(listed, key=lambda r: (-r["p"], r["token_id"]))
    assert [r["rank"] for r in listed] == list(range(1, len(listed) + 1))


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (7, 0.3), (60, 4.0), (10_000, 2.5)])
def test_equation_two_over_all_rows(made, metric, k, temperature):
    token = some_row(made)
    query = made.acts["run", H][token.row]
    result = made.run().knn_lm(
        token.row, k, hook_point=H, metric=metric, temperature=temperature, interpolate=1, n_tokens=None
    )
    others = neighbours_of(made, query, None, metric, keep=lambda t: t.doc_id != token.doc_id)
    check_against(result, others[:k], temperature)
    assert result.meta.exact
    assert result.meta.recall == 1.0
    assert result.meta.request["temperature"] == temperature
    eligible_rows = neighbours_of(made, query, None, metric)
    assert result.meta.n_eligible == len(eligible_rows)
    assert result.meta.mask["removed"]["no_next_token"] > 0


def test_own_row_is_never_a_neighbour_and_its_document_only_if_asked(made):
    token = some_row(made, doc_id=14)
    query = made.acts["run", H][token.row]
    result = made.run().knn_lm(
        token.row, 5, hook_point=H, temperature=1.0, interpolate=1, n_tokens=None, exclude_own_document=False
    )
    others = neighbours_of(made, query, 5, keep=lambda t: t.row != token.row)
    check_against(result, others, 1.0)
    twice = made.run().knn_lm(
        token.row, 5, hook_point=H, temperature=1.0, interpolate=1, n_tokens=None, exclude_docs=[3, 20, 21]
    )
    left = neighbours_of(made, query, 5, keep=lambda t: t.doc_id not in (14, 3, 20, 21))
    check_against(twice, left, 1.0)
    assert twice.meta.mask["removed"]["exclude_docs"] == sum(t.doc_id in (3, 20, 21) for t in made.tokens)


def test_masks_and_selections(made):
    token = some_row(made)
    query = made.acts["run", H][token.row]
    kept = made.run().knn_lm(
        token.row, 9_999, hook_point=H, temperature=3.0, interpolate=1, n_tokens=None, mask_special=False, mask_sinks=False,
        where="source = 'book'", docs=range(2, 30),
    )  # fmt: skip

    def keep(t):
        book = made.metadata[t.doc_id]["source"] == "book"
        return book and 2 <= t.doc_id < 30 and t.doc_id != token.doc_id

    check_against(kept, neighbours_of(made, query, None, keep=keep, special=False, sinks=False), 3.0)


def test_overlapping_windows_are_not_crossed(overlapping):
    """The last token of a window has its successor in the next window only: it is no neighbour."""
    token = next(t for t in overlapping.tokens if t.window_position == 5 and t.window == 1)
    query = overlapping.acts["run", H][token.row]
    result = overlapping.run().knn_lm(token.row, 9_999, temperature=5.0, interpolate=1, n_tokens=None)
    wanted = neighbours_of(overlapping, query, None, keep=lambda t: t.doc_id != token.doc_id)
    check_against(result, wanted, 5.0)
    by_row = overlapping.by_row
    ends = [t for t in overlapping.tokens if next_in_window(by_row, t) is None]
    assert result.meta.mask["removed"]["no_next_token"] == len(ends)
    assert any(
        overlapping.by_row[t.row + 1].doc_id == t.doc_id for t in ends if t.row + 1 in overlapping.by_row
    )


def test_next_tokens_of_a_sampled_run_need_not_be_stored(tmp_path):
    made = make_store(str(tmp_path / "s"), seed=4, n_documents=36)
    add_run(made, "run", {H: 12}, random_values(6, {H: 12}), sample=Sample(0.3, 5))
    row = next(r for r in made.acts["run", H] if made.by_row[r].window_position > 2)
    result = made.run().knn_lm(row, 9_999, temperature=2.0, interpolate=1, n_tokens=None)
    own = made.by_row[row].doc_id
    wanted = neighbours_of(made, made.acts["run", H][row], None, keep=lambda t: t.doc_id != own)
    check_against(result, wanted, 2.0)
    assert any(r + 1 not in made.acts["run", H] for _, r, _ in wanted)


def test_temperature_rule(made):
    token = some_row(made)
    query = made.acts["run", H][token.row]
    others = neighbours_of(made, query, 100, keep=lambda t: t.doc_id != token.doc_id)
    for k in (5, 100):
        result = made.run().knn_lm(token.row, k, hook_point=H, interpolate=1)
        gap = others[min(k, SCALE_RANK) - 1][0] - others[0][0]
        assert result.meta.request["temperature"] == pytest.approx(gap, rel=1e-9)
    same = np.full(40, 3.0)
    assert gap_temperature(same) == gap_temperature(same[:1]) == gap_temperature(same[:0]) == 1.0
    same[-3:] = 5.5
    assert gap_temperature(same) == 2.5
    assert gap_temperature(same[:20]) == 1.0


def test_votes_of_far_and_of_many_neighbours():
    """exp(-d / T) alone would be 0 for all of these."""
    distances = np.array([1e6, 1e6 + 1, 1e6 + 2, 1e9])
    votes = count_votes(np.array([4, 2, 4, 9]), distances, np.array([7, 3, 5, 1]), temperature=1.0)
    whole = 1 + math.exp(-1) + math.exp(-2)
    assert votes.token_ids.tolist() == [2, 4, 9]
    np.testing.assert_allclose(votes.p, [math.exp(-1) / whole, (1 + math.exp(-2)) / whole, 0.0], rtol=1e-15)
    assert votes.rows.tolist() == [3, 7, 1]
    tiny = count_votes(np.array([4, 2]), np.array([1.0, 2.0]), np.array([0, 1]), temperature=1e-100)
    assert tiny.p.tolist() == [0.0, 1.0]
    none = count_votes(np.empty(0, np.int64), np.empty(0), np.empty(0, np.int64), temperature=1.0)
    assert len(none.p) == 0


# --- documents that hold a text ---


@pytest.fixture(scope="module")
def wordy(tmp_path_factory):
    """Many documents, about half of which hold the word "cat" somewhere."""
    made = make_store(
        str(tmp_path_factory.mktemp("knn") / "w.store"), seed=8, n_documents=1200, rows_per_unit=512
    )
    add_run(made, "run", {H: 6}, random_values(9, {H: 6}))
    return made


def neighbours_found(run, context, k, exclude_own_document=True):
    options = RowOptions(fold=None, has_next=True)
    acts = open_acts(run, H, options.memory_bytes)
    way = choose_way(run, H, "l2", (), exact=None, shards=None)
    return find_neighbours(
        run,
        acts,
        context,
        options,
        way,
        k=k,
        metric="l2",
        recall=0.95,
        exclude_own_document=exclude_own_document,
    )


@pytest.mark.parametrize(
    ("k", "tail"), [(1, " cat"), (30, " cat"), (2500, " mat"), (9_999, " w7 "), (40, "no such"), (300, "w")]
)
def test_documents_that_hold_a_text_are_no_neighbours(wordy, k, tail):
    holds = {i for i, text in enumerate(wordy.texts) if tail in text}
    vector = np.random.default_rng(k).standard_normal(6)
    # The rows nearest of all are those of documents that hold the text.
    target = np.mean(
        [wordy.acts["run", H][t.row] for t in wordy.tokens if t.doc_id in holds] or [vector], axis=0
    )
    context = Context(target.astype(np.float64), np.zeros(1, np.int32), {"query": "text"}, tail=tail)
    run = wordy.run()
    found = neighbours_found(run, context, k)
    wanted = neighbours_of(wordy, target, k, keep=lambda t: t.doc_id not in holds)
    assert found.rows.tolist() == [row for _, row, _ in wanted]
    np.testing.assert_allclose(found.distances, [d for d, _, _ in wanted], rtol=1e-12)
    assert set(found.own_documents.tolist()) <= holds
    everything = neighbours_found(run, context, k, exclude_own_document=False)
    assert everything.rows.tolist() == [row for _, row, _ in neighbours_of(wordy, target, k)]


def test_texts_of_the_whole_corpus(wordy):
    corpus = wordy.run().tokenization.corpus
    for piece in ("naïve 漢字", "🙂", " cat sat", "zzz", wordy.texts[77]):
        wanted = [i for i, text in enumerate(wordy.texts) if piece in text]
        assert holding(corpus, piece).tolist() == wanted
        some = [1199, 3, 77, 3, *wanted[:2]]
        assert holding_among(corpus, some, piece).tolist() == sorted(set(some) & set(wanted))


# --- through an index ---


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    """Indexes of every row's own vector, one for each metric; the last units are in none."""
    made = make_store(
        str(tmp_path_factory.mktemp("knn") / "i.store"), seed=21, n_documents=300, rows_per_unit=256
    )
    add_run(made, "run", {H: 12}, random_values(22, {H: 12}, sinks=True))
    last = len(made.run().tokenization.units) - 2
    add_index(made.run(), H, shards=[[(0, 3)], [(3, last)]], kind="flat", metric="l2")
    add_index(made.run(), H, shards=[[(0, last)]], kind="flat", metric="cosine", generation=1)
    whitened = ("standardise",)
    add_index(made.run(), H, shards=[[(0, last)]], kind="flat", transform=whitened, metric="l2", generation=2)
    return made


@pytest.mark.parametrize(
    "options", [{}, {"where": "source <> 'book'"}, {"exclude_docs": range(20)}, {"k": 900}]
)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("transform", [(), ("standardise",)])
def test_through_an_index(indexed, metric, transform, options):
    token = some_row(indexed, doc_id=41)
    asked = {
        "k": 60,
        "hook_point": H,
        "metric": metric,
        "transform": transform,
        "interpolate": 1,
        "n_tokens": None,
    }
    through = indexed.run().knn_lm(token.row, **asked | options)
    alone = indexed.run().knn_lm(token.row, **asked | options, exact=True)
    assert through.table.equals(alone.table)
    assert through.meta.n_eligible == alone.meta.n_eligible
    assert alone.meta.exact
    has_index = metric == "l2" or not transform
    if has_index:
        told = through.meta.index["generations"]
        assert sum(g["n_candidates"] for g in told) > 0
        assert through.meta.index["n_scanned"] > 0
    else:
        assert through.meta.index is None
        assert any("index of this hook point is for" in w for w in through.meta.warnings)


def test_transformed_distances(indexed):
    """Of standardised vectors, by numpy's own means and deviations over all rows."""
    token = some_row(indexed, doc_id=41)
    _, acts = indexed.matrix(H)
    mean, deviation = acts.mean(axis=0), acts.std(axis=0)
    scaled = {row: (a - mean) / deviation for row, a in indexed.acts["run", H].items()}
    by_row, found = indexed.by_row, []
    for t, _ in eligible(indexed, H, keep=lambda t: t.doc_id != token.doc_id):
        after = next_in_window(by_row, t)
        if after is not None:
            found.append((squared(scaled[t.row], scaled[token.row], "l2"), t.row, after.token_id))
    wanted = p_knn_of(sorted(found)[:40], 3.0)
    result = indexed.run().knn_lm(
        token.row, 40, hook_point=H, transform="standardize", temperature=3.0, interpolate=1, n_tokens=None
    )
    assert {r["token_id"]: r["p"] for r in result if r["p"] > 0} == pytest.approx(wanted, rel=1e-4)
    assert result.meta.request["transform"] == ["standardise"]


@pytest.mark.parametrize("tail", [" cat", " w7 "])
def test_documents_that_hold_a_text_are_no_neighbours_through_an_index(indexed, tail):
    holds = {i for i, text in enumerate(indexed.texts) if tail in text}
    target = np.mean([indexed.acts["run", H][t.row] for t in indexed.tokens if t.doc_id in holds], axis=0)
    context = Context(target.astype(np.float64), np.zeros(1, np.int32), {"query": "text"}, tail=tail)
    run = indexed.run()
    wanted = neighbours_of(indexed, target, 50, keep=lambda t: t.doc_id not in holds)
    found = neighbours_found(run, context, 50)
    assert found.rows.tolist() == [row for _, row, _ in wanted]
    assert found.answer.index is not None


# --- with the run's own model ---

TEXTS = [
    f"Document {i} says that {w} are {c}, naïvely, and that nothing else is known of them."
    for i, (w, c) in enumerate(
        (w, c) for w in ("cats", "dogs", "lists", "tuples") for c in ("red", "blue", "odd")
    )
]
TEXTS += ["Quite another text, which says nothing of the kind, ends here.", TEXTS[3] + " Twice told."]
REAL = "layers.1.resid_post"


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A GPT-2, whose head is its embedding, over windows of 32 tokens."""
    store = actstore.open(str(tmp_path_factory.mktemp("real") / "store"), create=True)
    import_corpus(store, "texts", [{"text": t, "n": i} for i, t in enumerate(TEXTS)])
    config = IngestConfig(
        corpus="texts", model=tiny_models.cached("gpt2"), hook_points=[REAL, "layers.1.mlp_in"], run="r", device="cpu",
        rows_per_unit=128, window=32, ray_address=None,
    )  # fmt: skip
    run_ingest(store, config)
    return store.refresh().run("r")


@pytest.fixture(scope="module")
def plain():
    folder = tiny_models.cached("gpt2")
    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()


def softmax_after(model, ids):
    with torch.no_grad():
        return torch.softmax(model(torch.tensor([ids])).logits[0, -1].double(), dim=0).numpy()


def tokens_of(run):
    return run.store.sql(
        'SELECT row, doc_id, token_id, "window", window_position, is_special FROM tokens ORDER BY row'
    ).to_dicts()


def plain_neighbours(run, hook_point, vector, keep, metric="l2"):
    """All rows with a next token, nearest first, by a loop over SQL's tokens and the stored rows."""
    tokens = tokens_of(run)
    acts = run.activations(hook_point)
    found = []
    for token, after in zip(tokens, [*tokens[1:], None], strict=True):
        same = after is not None and all(after[c] == token[c] for c in ("doc_id", "window"))
        if same and token["window_position"] > 0 and not token["is_special"] and keep(token):
            d = squared(acts[token["row"]], vector, metric)
            found.append((d, token["row"], after["token_id"]))
    return sorted(found)


@pytest.mark.parametrize("interpolate", [0.25, 0.0, 0.6])
@pytest.mark.parametrize("hook_point", [REAL, None])
def test_a_row_of_a_real_model(real, plain, interpolate, hook_point):
    tokens = tokens_of(real)
    place = next(
        i for i, t in enumerate(tokens) if t["doc_id"] == 4 and t["window"] == 1 and t["window_position"] == 2
    )
    row, doc = tokens[place]["row"], tokens[place]["doc_id"]
    used = hook_point or "layers.1.mlp_in"
    result = real.knn_lm(
        row, 30, hook_point=hook_point, temperature=2.0, interpolate=interpolate, n_tokens=None
    )
    assert result.meta.request["hook_point"] == used
    vector = real.activations(used)[row]
    neighbours = plain_neighbours(real, used, vector, lambda t: t["doc_id"] != doc)[:30]
    p_knn = p_knn_of(neighbours, 2.0)
    # What the model saw before the row: its window from the start on, not the document.
    window = [t["token_id"] for t in tokens[place - 2 : place + 1]]
    p_lm = softmax_after(plain[1], window)
    assert len(result) == len(p_lm)
    for r in result:
        y = r["token_id"]
        assert r["p_lm"] == pytest.approx(p_lm[y], rel=1e-9)
        assert r["p_knn"] == pytest.approx(p_knn.get(y, 0.0), rel=1e-9)
        assert r["p"] == pytest.approx(
            interpolate * p_knn.get(y, 0.0) + (1 - interpolate) * p_lm[y], rel=1e-9
        )
    assert math.fsum(r["p"] for r in result) == pytest.approx(1.0, rel=1e-9)
    [following] = [r for r in result if r["is_next"]]
    assert following["token_id"] == tokens[place + 1]["token_id"]


def test_what_follows_is_in_the_answer_whatever_its_rank(real):
    tokens = tokens_of(real)
    rows = [t["row"] for t in tokens if t["window_position"] == 4]
    tails = 0
    for row in rows:
        whole = real.knn_lm(row, 10, n_tokens=None).to_dicts()
        [following] = [r for r in whole if r["is_next"]]
        few = real.knn_lm(row, 10, n_tokens=3).to_dicts()
        assert few[:3] == whole[:3]
        assert [r for r in few if r["is_next"]] == [following]
        assert len(few) == 3 + (following["rank"] > 3)
        tails += following["rank"] > 3
    assert tails > 0
    last = next(t["row"] for t, u in itertools.pairwise(tokens) if u["window_position"] == 0)
    end = real.knn_lm(last, 10)
    assert len(end) == 20
    assert end.table["is_next"].null_count == 20


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_a_text_of_a_real_model(real, plain, metric):
    """A text cut from documents: none that hold its last 16 tokens is asked."""
    tokenizer, model = plain
    encoded = tokenizer(TEXTS[3], return_offsets_mapping=True)
    text = TEXTS[3][: encoded["offset_mapping"][31][1]]
    ids, tail = encoded["input_ids"][:32], text[encoded["offset_mapping"][16][0] :]
    assert tokenizer(text)["input_ids"] == ids
    own = {i for i, t in enumerate(TEXTS) if tail in t}
    assert {3, len(TEXTS) - 1} <= own < set(range(len(TEXTS)))
    result = real.knn_lm(text, 40, hook_point=REAL, metric=metric, temperature=0.5, n_tokens=None)
    with torch.no_grad():
        states = model.transformer(torch.tensor([ids]), output_hidden_states=True).hidden_states
    vector = states[2][0, -1].double().numpy()
    neighbours = plain_neighbours(real, REAL, vector, lambda t: t["doc_id"] not in own, metric)[:40]
    p_knn, p_lm = p_knn_of(neighbours, 0.5), softmax_after(model, ids)
    for r in result:
        y = r["token_id"]
        assert r["p_knn"] == pytest.approx(p_knn.get(y, 0.0), rel=1e-6, abs=1e-30)
        assert r["p"] == pytest.approx(0.25 * p_knn.get(y, 0.0) + 0.75 * p_lm[y], rel=1e-6)
        assert r["p_lm"] == pytest.approx(p_lm[y], rel=1e-9)
    assert {3, len(TEXTS) - 1} <= set(result.meta.mask["own_documents"]) <= own
    assert result.table["is_next"].null_count == len(result)
    with_own = real.knn_lm(text, 40, hook_point=REAL, metric=metric, exclude_own_document=False)
    assert with_own.meta.mask["own_documents"] == []
    assert min(r["nearest_distance"] or 0.0 for r in with_own) < 1e-6
    short = real.knn_lm("Document 3 says", 40)
    assert short.meta.mask["own_documents"] == []


def test_a_token_within_a_text(real, plain):
    tokenizer, model = plain
    text = "Document 3 says that dogs"
    ids = tokenizer(text)["input_ids"]
    result = real.knn_lm(text, 5, token=4, interpolate=0, n_tokens=None)
    p_lm = softmax_after(model, ids[:5])
    assert [r["token_id"] for r in result] == np.argsort(-p_lm, kind="stable").tolist()
    assert result.table["p"].to_pylist() == pytest.approx(sorted(p_lm.tolist(), reverse=True), rel=1e-9)
    assert real.knn_lm(text, 5, token=-1).meta.request["token"] == len(ids) - 1


def test_the_model_with_its_head_computes_the_same_activations(real, tmp_path):
    """Texts go through the base of the model with its head once that is loaded: one copy of the weights."""
    texts = [text[:40] for text in TEXTS[:2]]
    before = real.encode_text(texts, REAL)
    real.knn_lm(5, 5)
    after = real.encode_text(texts, REAL)
    other = tmp_path / "other"
    tiny_models.build("gpt2", other, seed=7)
    store = actstore.open(str(tmp_path / "store"), create=True)
    import_corpus(store, "texts", [{"text": TEXTS[0]}])
    run_ingest(store, IngestConfig(corpus="texts", model=str(other), hook_points=[REAL], run="o", device="cpu",
                                   rows_per_unit=128, ray_address=None))  # fmt: skip
    strange = store.refresh().run("o").encode_text(texts, REAL)
    real.knn_lm(5, 5)
    again = real.encode_text(texts, REAL)
    for a, b, c, d in zip(before, after, again, strange, strict=True):
        assert a.activations.tobytes() == b.activations.tobytes() == c.activations.tobytes()
        assert not np.allclose(a.activations, d.activations)


def test_no_neighbours(real):
    answer = real.knn_lm(5, 5, where="n > 1000", n_tokens=3)
    alone = real.knn_lm(5, 5, interpolate=0, n_tokens=3)
    assert answer.table["p"].to_pylist() == alone.table["p"].to_pylist() == answer.table["p_lm"].to_pylist()
    assert answer.table["p_knn"].null_count == len(answer)
    assert any("no neighbours" in w for w in answer.meta.warnings)
    nothing = real.knn_lm(5, 5, where="n > 1000", interpolate=1, n_tokens=3).to_dicts()
    assert [(r["p"], r["p_knn"], r["is_next"]) for r in nothing] == [(0.0, None, True)]


def test_default_hook_point(made):
    assert default_hook_point(made.run()) == "layers.1.mlp_act"


@pytest.mark.parametrize(
    ("query", "options", "message"),
    [
        (5, {"k": 0}, "k must be"),
        (5, {"k": 10**8}, "k must be"),
        (5, {"temperature": 0}, "temperature must be"),
        (5, {"temperature": float("nan")}, "temperature must be"),
        (5, {"temperature": "1"}, "temperature must be"),
        (5, {"interpolate": 1.5}, "interpolate must be a number from 0 to 1"),
        (5, {"interpolate": True}, "interpolate must be"),
        (5, {"n_tokens": 0}, "n_tokens must be"),
        (5, {"metric": "ip"}, "'l2', 'cosine'"),
        (5, {"token": 1}, "give a text"),
        (5.5, {}, "text or a row number"),
        (np.ones(12), {}, "text or a row number"),
        (5, {"where": "no_such_column = 1"}, "no_such_column"),
        ("", {}, "1 to the run's window"),
        ("a", {"token": 50}, "special ones included"),
    ],
)
def test_bad_questions(real, query, options, message):
    with pytest.raises(InvalidInputError, match=message):
        real.knn_lm(query, **options)


def test_what_is_not_there(real, made):
    with pytest.raises(NotFoundError, match="10000"):
        real.knn_lm(10_000)
    with pytest.raises(NotFoundError, match="document 999"):
        real.knn_lm(5, exclude_docs=[999])
    with pytest.raises(NotFoundError, match="hook point"):
        real.knn_lm(5, hook_point="layers.7.resid_post")
    row = next(r for r, a in made.acts["run", H].items() if not np.isfinite(a).all())
    with pytest.raises(InvalidInputError, match="NaN"):
        made.run().knn_lm(row, hook_point=H, interpolate=1)


def test_models_that_predict_no_token(tmp_path):
    store = actstore.open(str(tmp_path / "store"), create=True)
    import_corpus(store, "texts", [{"text": t} for t in TEXTS[:3]])
    run_ingest(store, IngestConfig(corpus="texts", model=tiny_models.cached("bert"), hook_points=[REAL], run="b",
                                   device="cpu", rows_per_unit=128, ray_address=None))  # fmt: skip
    run = store.refresh().run("b")
    with pytest.raises(InvalidInputError) as caught:
        run.knn_lm(5, 5)
    assert caught.value.kind is ErrorKind.BAD_MODEL
    assert len(run.knn_lm(5, 5, interpolate=1)) > 0


def test_on_the_command_line(real, capsys):
    url = real.store.url
    assert main(["knn-lm", url, "r", "--row", "5", "-k", "12", "--tokens", "4", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["rows"] == json.loads(real.knn_lm(5, 12, n_tokens=4).to_json())["rows"]
    options = {
        "hook-point": REAL,
        "metric": "cosine",
        "temperature": "0.5",
        "interpolate": "0.5",
        "exclude-docs": "1,4",
    }
    given = [word for name, value in options.items() for word in (f"--{name}", value)]
    command = [
        "knn-lm",
        url,
        "r",
        "--text",
        "Document 3",
        "--where",
        "n < 9",
        "--keep-own-document",
        "--json",
    ]
    assert main([*command, *given]) == 0
    answer = json.loads(capsys.readouterr().out)
    wanted = real.knn_lm(
        "Document 3", hook_point=REAL, metric="cosine", temperature=0.5, interpolate=0.5, where="n < 9", exclude_docs=[1, 4],
        exclude_own_document=False,
    )  # fmt: skip
    assert answer["rows"] == json.loads(wanted.to_json())["rows"]
    assert answer["meta"]["request"] == json.loads(wanted.to_json())["meta"]["request"]
    assert main(["knn-lm", url, "r", "--row", "5"]) == 0
    assert "knn_lm: 2" in capsys.readouterr().out
    assert main(["knn-lm", url, "r", "--row", "5", "--exclude-docs", "x"]) == 2
    assert "whole numbers" in capsys.readouterr().err
