"""Which latents fire on rows and documents, against sums over a dense matrix."""

import json
import math

import numpy as np
import pytest

from actstore.cli import main
from actstore.errors import InvalidInputError, NotFoundError
from actstore.query.active import document, surprise_bits
from tests.query.make_store import WORDS


def counted_rows(codes, doc_id, special=True, sinks=True):
    """Rows of a document that count: masks, and a position once."""
    limit = 10 * np.median(codes.norms.astype(np.float64))
    norms = dict(zip(codes.rows.tolist(), codes.norms.tolist(), strict=True))
    seen, rows = set(), []
    for t in codes.made.tokens:
        if t.doc_id != doc_id or t.row not in norms or (special and t.is_special):
            continue
        if sinks and (t.window_position == 0 or norms[t.row] > limit):
            continue
        if (t.position, t.is_special) not in seen:
            seen.add((t.position, t.is_special))
            rows.append(t.row)
    return rows


def dense(codes, rows):
    return codes.matrix[np.searchsorted(codes.rows, rows)].toarray()


def brute_active(
    codes, rows, *, rank="activation", agg="max", k=20, dead=True, ultra=True, keep=lambda f: True
):
    """The answer, one latent after another."""
    values_tf = dense(codes, rows)
    everything = codes.matrix.toarray()
    n_rows = len(codes.rows)
    found = []
    for f in range(codes.n_latents):
        mine, whole = values_tf[:, f], everything[:, f]
        n = int((whole > 0).sum())
        if not mine.any() or not keep(f) or (dead and n == 0) or (ultra and n / n_rows > 0.1):
            continue
        value = {
            "max": mine.max(),
            "mean": mine.mean(),
            "sum": math.fsum(mine),
            "count": float((mine > 0).sum()),
        }[agg]
        bits = -math.log2((n + 0.5) / (n_rows + 1))
        share = None if agg == "count" else value / whole.max()
        score = (
            value if rank == "activation" else share if rank == "share_of_max" else bits * (share or value)
        )
        at = int(np.argmax(mine))
        found.append((-score, f, value, share, bits, int((mine > 0).sum()), rows[at], n / n_rows))
    return sorted(found)[:k]


def check(result, wanted):
    assert [r["latent"] for r in result] == [w[1] for w in wanted]
    for got, (minus, f, value, share, bits, n_fires, row, density) in zip(result, wanted, strict=True):
        assert got["score"] == pytest.approx(-minus, rel=1e-12), f
        assert got["value"] == pytest.approx(value, rel=1e-12)
        assert got["share_of_max"] == (None if share is None else pytest.approx(share, rel=1e-12))
        assert got["surprise"] == pytest.approx(bits, rel=1e-12)
        assert (got["n_fires"], got["row"], got["density"]) == (n_fires, row, pytest.approx(density))


@pytest.mark.parametrize("agg", ["max", "mean", "sum", "count"])
@pytest.mark.parametrize("rank", ["activation", "share_of_max", "surprise"])
def test_rows_and_documents(coded, rank, agg):
    rng = np.random.default_rng(11)
    for name in ("sae", "other"):
        codes = coded[name]
        run = codes.made.run()
        if (rank, agg) == ("share_of_max", "count"):
            with pytest.raises(InvalidInputError, match="no share"):
                run.active(3, name, rank=rank, agg=agg)
            continue
        for doc_id in rng.choice(60, 4, replace=False).tolist():
            result = run.active(document(doc_id), name, 6, rank=rank, agg=agg, mask_ultra_dense=False)
            rows = counted_rows(codes, doc_id)
            check(result, brute_active(codes, rows, rank=rank, agg=agg, k=6, ultra=False) if rows else [])
        rows = np.sort(rng.choice(codes.rows, 40, replace=False))
        check(
            run.active(rows, name, 1000, rank=rank, agg=agg), brute_active(codes, rows.tolist(), rank=rank, agg=agg, k=1000)
        )  # fmt: skip


def test_one_row_or_a_slice(coded):
    codes = coded["sae"]
    run = codes.made.run()
    row = int(codes.rows[100])
    check(run.active(row, "sae"), brute_active(codes, [row]))
    check(run.active(np.int32(row), "sae"), brute_active(codes, [row]))
    result = run.active(slice(64, 80), "sae", 3)
    check(result, brute_active(codes, [r for r in codes.rows.tolist() if 64 <= r < 80], k=3))
    assert result.meta.request["score"] == "agg(value)"
    assert result.meta.mask["tokens"]["removed"] == {}


def test_rows_that_are_not_there_are_told_and_ranges_go_over_them(coded):
    codes = coded["sae"]
    run = codes.made.run()
    [at, *_] = np.flatnonzero(np.diff(codes.rows) > 1)
    last, after = int(codes.rows[at]), int(codes.rows[at + 1])
    check(run.active(slice(last, after + 1), "sae"), brute_active(codes, [last, after]))
    for what in ([last, last + 1], slice(last + 1, after)):
        with pytest.raises(NotFoundError):
            run.active(what, "sae")


def test_masks_and_filters_come_before_the_limit(coded):
    codes = coded["sae"]
    made, run = codes.made, codes.made.run()
    everything = codes.matrix.toarray()
    n = (everything > 0).sum(axis=0)
    density, largest = n / len(codes.rows), everything.max(axis=0)
    doc_id = max(range(60), key=lambda d: len(counted_rows(codes, d)))
    rows = counted_rows(codes, doc_id)
    low, high = np.quantile(density[density > 0], [0.3, 0.8])
    for options, keep in (
        ({"density": (low, high)}, lambda f: low <= density[f] <= high),
        ({"density": (None, high)}, lambda f: density[f] <= high),
        ({"where": "max > 1.5 AND latent % 2 = 0"}, lambda f: largest[f] > 1.5 and f % 2 == 0),
    ):
        result = run.active(document(doc_id), "sae", 5, mask_ultra_dense=False, **options)
        wanted = brute_active(codes, rows, k=1000, ultra=False, keep=keep)
        check(result, wanted[:5])
        assert result.meta.n_eligible == len(wanted)
        assert len(result) == min(5, len(wanted))
        removed = result.meta.mask["latents"]["removed"]
        alive = n > 0
        [filtered] = [c for name, c in removed.items() if name != "dead"]
        assert removed["dead"] == int((~alive).sum())
        assert filtered == sum(not keep(f) for f in np.flatnonzero(alive))
    for special, sinks in ((False, True), (True, False), (False, False)):
        result = run.active(document(doc_id), "sae", 9, mask_special=special, mask_sinks=sinks)
        check(result, brute_active(codes, counted_rows(codes, doc_id, special, sinks), k=9))
    tokens = [t for t in made.tokens if t.doc_id == doc_id]
    result = run.active(document(doc_id), "sae")
    assert sum(result.meta.mask["tokens"]["removed"].values()) == len(tokens) - len(rows)


def test_per_token(coded):
    codes = coded["sae"]
    run = codes.made.run()
    tokens = codes.made.by_row
    n, n_rows = (codes.matrix.toarray() > 0).sum(axis=0), len(codes.rows)
    largest = np.maximum(codes.matrix.toarray().max(axis=0), 1e-9)
    bits = -np.log2((n + 0.5) / (n_rows + 1))
    rows = codes.rows[200:260]
    for rank in ("activation", "share_of_max", "surprise"):
        wanted = []
        for row, values in zip(rows.tolist(), dense(codes, rows), strict=True):
            here = [f for f in np.flatnonzero(values) if n[f] / n_rows <= 0.1]
            weight = {"activation": 1 + 0 * bits, "share_of_max": 1 / largest, "surprise": bits / largest}[
                rank
            ]
            score = {f: values[f] * weight[f] for f in here}
            best = sorted(here, key=lambda f: (-score[f], f))[:2]
            wanted += [(row, i, f, pytest.approx(score[f]), values[f]) for i, f in enumerate(best, 1)]
        result = run.active(rows, "sae", 2, per_token=True, rank=rank)
        assert [(r["row"], r["rank"], r["latent"], r["score"], r["value"]) for r in result] == wanted
        for r in result:
            token = tokens[r["row"]]
            assert (r["doc_id"], r["position"], r["token"]) == (
                token.doc_id,
                token.position,
                WORDS[token.token_id],
            )
    empty = [int(r) for r in codes.rows if not codes.matrix[np.searchsorted(codes.rows, r)].nnz][:3]
    assert len(run.active(empty, "sae", per_token=True)) == 0
    assert len(run.active(empty, "sae")) == 0


def test_overlapping_windows_count_a_token_once(overlapping):
    from tests.query.make_codes import add_codes, random_codes, stored_rows

    codes = add_codes(
        overlapping, random_codes(len(stored_rows(overlapping, "run")), 20, seed=8), dictionary="again"
    )
    for doc_id in range(6):
        rows = counted_rows(codes, doc_id)
        result = overlapping.run().active(document(doc_id), "again", agg="count", mask_ultra_dense=False)
        check(result, brute_active(codes, rows, agg="count", ultra=False) if rows else [])


def test_without_statistics(coded):
    codes = coded["bare"]
    run = codes.made.run()
    rows = codes.rows[50:90]
    result = run.active(rows, "bare", 5)
    assert [r["latent"] for r in result] == [w[1] for w in brute_active(codes, rows.tolist(), k=5)]
    assert set(result.table["max"].to_pylist()) == {None}
    assert any("no postings" in w for w in result.meta.warnings)
    with pytest.raises(InvalidInputError, match="largest values"):
        run.active(rows, "bare", rank="surprise")
    with pytest.raises(NotFoundError, match="postings"):
        run.active(rows, "bare", where="density < 0.5")


def test_surprise_is_information():
    bits = surprise_bits(np.array([0, 7, 127, 255]), 255)
    assert bits.tolist() == pytest.approx([9, -math.log2(7.5 / 256), 1.0056, 0.0028], abs=1e-3)
    assert (np.diff(bits) < 0).all()


def test_errors(coded):
    run = coded["sae"].made.run()
    gone = 10**9
    for error, what, options in (
        (NotFoundError, gone, {}),
        (NotFoundError, document(60), {}),
        (NotFoundError, int(max(coded["sae"].rows)) + 1, {}),
        (InvalidInputError, None, {}),
        (InvalidInputError, b"text", {}),
        (InvalidInputError, [], {}),
        (InvalidInputError, [1.5], {}),
        (InvalidInputError, 1, {"k": 0}),
        (InvalidInputError, 1, {"rank": "idf"}),
        (InvalidInputError, 1, {"agg": "median"}),
        (InvalidInputError, 1, {"density": 0.5}),
        (InvalidInputError, 1, {"density": (0.5, 0.1)}),
        (InvalidInputError, 1, {"where": "density > 0 ORDER BY 1"}),
        (InvalidInputError, 1, {"where": "latent IN (SELECT 1)"}),
        (InvalidInputError, 1, {"where": "nothing = 1"}),
        (InvalidInputError, 1, {"where": "random() < 0.5"}),
    ):
        with pytest.raises(error):
            run.active(what, "sae", **options)
    with pytest.raises(NotFoundError, match="absent"):
        run.active(1, "absent")
    with pytest.raises(NotFoundError):  # rows that were not encoded
        run.active(1, "half")


def test_command(coded, capsys):
    made = coded["sae"].made
    for subject, what in ((["--doc", "7"], document(7)), (["--row", "70", "--row", "71"], [70, 71])):
        command = ["active", made.url, "run", "sae", *subject, "-k", "4", "--rank", "surprise", "--json"]
        assert main(command) == 0
        answer = json.loads(capsys.readouterr().out)
        wanted = made.run().active(what, "sae", 4, rank="surprise")
        assert answer["rows"] == json.loads(wanted.to_json())["rows"]
    assert main(["active", made.url, "run", "sae", "--doc", "7", "--per-token", "--max-density", "0.05"]) == 0
    assert "active: " in capsys.readouterr().out
