"""What a picture of latents shows: the numbers of the table, and nothing that the names in it could do."""

import io
import subprocess
import sys
import threading

import matplotlib.image
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.errors import InvalidInputError, NotFoundError
from actstore.latent_stats import LATENT_STATS_SCHEMA, QUANTILES, histogram_bins
from actstore.query import plots
from actstore.query.histograms import BARS_PER_DECADE, density_bars, histogram_bars
from actstore.result import Meta, Result

N_ROWS = 10_000


def stats_row(latent, values):
    """The statistics of a latent that has these values where it fires, by numpy alone."""
    values = np.asarray(values, np.float32)
    bins, counts = np.unique(histogram_bins(values), return_counts=True)
    n = len(values)
    return {
        "latent": latent, "n_tokens": n, "n_docs": (n + 1) // 2, "density": n / N_ROWS, "doc_density": 0.0,
        "mean": float(values.mean()) if n else None, "max": float(values.max()) if n else None, "sum": float(values.sum()),
        "max_row": 0 if n else None, "quantiles": np.quantile(values, QUANTILES).tolist() if n else None,
        "hist_bins": bins.tolist(), "hist_counts": counts.tolist(), "top_tokens_by_count": [], "top_tokens_by_mean": [],
        "single_token_score": None, "decoder_norm": 1.0, "is_dead": n == 0, "is_ultra_dense": n / N_ROWS > 0.1,
        "promoted": None, "suppressed": None,
    }  # fmt: skip


def stats_table(rows):
    return pa.Table.from_pylist(rows, schema=LATENT_STATS_SCHEMA)


@pytest.fixture(scope="module")
def stats():
    rng = np.random.default_rng(5)
    sizes = [0, 1, 7, 400, 2_500, N_ROWS, 0, 30]
    return stats_table([stats_row(i, rng.lognormal(0, 1, n).astype(np.float16)) for i, n in enumerate(sizes)])


def stairs(axes):
    """What was drawn: counts and edges of the bars."""
    [patch] = [p for p in axes.patches if type(p).__name__ == "StepPatch"]
    return patch.get_data().values, patch.get_data().edges


def words(figure):
    return [t.get_text() for axes in figure.axes for t in [axes.title, *axes.texts] if t.get_text()]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.0, 65_504.0, width=16), min_size=1, max_size=200), st.integers(2, 64))
def test_bars_count_the_values_between_their_edges(values, most):
    halves = np.asarray(values, np.float16)
    halves = halves[(halves > 0) & np.isfinite(halves)]
    if not halves.size:
        return
    row = stats_row(0, halves)
    bars = histogram_bars(row["hist_bins"], row["hist_counts"], largest=row["max"], most=most)
    assert len(bars.counts) <= most
    assert np.all(np.diff(bars.edges) > 0)
    assert bars.edges[0] > 0
    expected, _ = np.histogram(halves.astype(np.float64), bars.edges)
    assert bars.counts.tolist() == expected.tolist()
    assert bars.counts.sum() == len(halves)


def test_values_beyond_float16_are_in_the_last_bar():
    row = stats_row(0, np.array([1.0, 60_000.0, 1e6, 3e7], np.float32))
    for most in (2, 4, 48, 1000):
        bars = histogram_bars(row["hist_bins"], row["hist_counts"], largest=row["max"], most=most)
        assert bars.counts.sum() == 4
        assert bars.edges[-1] == 3e7
        assert np.isfinite(bars.edges).all()
        assert np.all(np.diff(bars.edges) > 0)
    assert not histogram_bars([], [], largest=0.0).counts.size


@given(st.lists(st.floats(1e-8, 1.0), max_size=50))
def test_density_bars_count_every_live_latent_once(densities):
    bars = density_bars(np.array([0.0, *densities, 0.0]))
    assert bars.counts.sum() == len(densities)
    if densities:
        logs = np.floor(np.log10(densities) * BARS_PER_DECADE)
        assert len(bars.counts) == 1 - int(logs.min())
        for i, count in enumerate(bars.counts):
            assert count == int((logs == logs.min() + i).sum())


def test_a_histogram_shows_the_stored_numbers(stats):
    figure = plots.latent_histogram(stats.slice(3, 1))
    [axes] = figure.axes
    row = stats.slice(3, 1).to_pylist()[0]
    heights, edges = stairs(axes)
    assert (heights * np.diff(np.log2(edges))).sum() == pytest.approx(400)
    assert edges[0] <= row["quantiles"][0] <= edges[-1]
    lines = [line.get_xdata()[0] for line in axes.lines]
    assert lines == pytest.approx(row["quantiles"])
    assert f"50 %: {row['quantiles'][0]:.3g}" in words(figure)
    assert "400 tokens (4.000%) of 200 documents" in axes.get_title()


def test_densities_say_how_many_are_dead(stats):
    figure = plots.density_plot(stats, marked=[3, 0, 4])
    [axes] = figure.axes
    assert axes.get_title() == "8 latents: 2 dead (25.0%), 2 ultra-dense (25.0%)"
    assert stairs(axes)[0].sum() == 6
    marks = axes.lines[-1].get_xdata()
    assert list(marks) == pytest.approx([0.04, 0.25])


def test_an_overview_has_a_panel_for_each_latent(stats):
    labels = {3: "$\\frac{", 4: "\x1b[31m漢字\u202e <b>"}
    figure = plots.latents_figure(stats, [3, 4, 0], labels=labels, title="$x^{")
    titles = [axes.get_title() for axes in figure.axes]
    assert len(titles) == 4
    assert titles[1] == "latent 3: $\\frac{ (4.00% of tokens)"
    assert titles[2] == "latent 4: \\x1b[31m\\u6f22\\u5b57\\u202e <b> (25.00% of tokens)"
    assert plots.figure_bytes(figure, dpi=50).startswith(b"\x89PNG")
    assert "never fires" in words(figure)


def test_dead_dictionaries_and_latents_have_pictures():
    dead = stats_table([stats_row(i, []) for i in range(3)])
    for figure in (
        plots.density_plot(dead),
        plots.latent_histogram(dead.slice(0, 1)),
        plots.latents_figure(dead, [1]),
    ):
        assert plots.figure_bytes(figure, dpi=40)
    assert "no latent fires" in words(plots.density_plot(dead))
    assert "dead, fires on no token" in plots.latent_histogram(dead.slice(0, 1)).axes[0].get_title()


def test_narrow_activations_have_a_linear_axis():
    for values, scale in (([1.0] * 5, "linear"), ([1.0, 1.5], "linear"), ([0.01, 50.0], "log")):
        figure = plots.latent_histogram(stats_table([stats_row(0, values)]))
        assert figure.axes[0].get_xscale() == scale
        heights, edges = stairs(figure.axes[0])
        widths = np.diff(np.log2(edges) if scale == "log" else edges)
        assert (heights * widths).tolist() == pytest.approx(np.histogram(values, edges)[0].tolist())
        assert plots.figure_bytes(figure, dpi=40)


def test_files_are_pictures_and_the_same_every_time(stats, tmp_path):
    figure = plots.density_plot(stats)
    path = plots.save_figure(figure, tmp_path / "a.png", dpi=60)
    pixels = matplotlib.image.imread(path)
    assert pixels.shape == (216, 384, 4)
    assert pixels[..., :3].std() > 0.05
    again = plots.figure_bytes(plots.density_plot(stats), dpi=60)
    assert again == path.read_bytes()
    assert plots.save_figure(figure, tmp_path / "a.SVG").read_bytes().startswith(b"<?xml")
    assert plots.save_figure(figure, tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    assert np.array_equal(matplotlib.image.imread(io.BytesIO(again)), pixels)


def test_what_cannot_be_drawn_is_refused(stats, tmp_path):
    with pytest.raises(InvalidInputError, match="hist_counts are not in the table"):
        plots.latent_histogram(stats.drop_columns(["hist_counts"]))
    with pytest.raises(InvalidInputError, match=r"statistics of 8: give codes.stats\(\[latent\]\)"):
        plots.latent_histogram(stats)
    with pytest.raises(InvalidInputError, match="at least one"):
        plots.latents_figure(stats, [])
    with pytest.raises(InvalidInputError, match="latent 8 is not among the 8"):
        plots.density_plot(stats, marked=[8])
    for name in ("a.jpeg", "a"):
        with pytest.raises(InvalidInputError, match="png, svg, pdf"):
            plots.save_figure(plots.density_plot(stats), tmp_path / name)
    with pytest.raises(NotFoundError, match="make it first"):
        plots.save_figure(plots.density_plot(stats), tmp_path / "no" / "a.png")
    assert not list(tmp_path.iterdir())


def test_an_answer_can_be_drawn_as_its_table(stats):
    answer = Result(stats, Meta(version=1))
    assert plots.density_plot(answer).axes[0].get_title().startswith("8 latents")


def test_threads_draw_side_by_side_without_a_display(stats):
    drawn = []

    def draw(i):
        drawn.append((i, plots.figure_bytes(plots.latent_histogram(stats.slice(3 + i % 2, 1)), dpi=40)))

    threads = [threading.Thread(target=draw, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({data for i, data in drawn if i % 2 == 0}) == len({data for i, data in drawn if i % 2}) == 1
    assert len(drawn) == 6


def test_neither_pyplot_nor_matplotlib_is_imported_before_it_is_needed():
    code = (
        "import sys, actstore.query.plots as p; print('matplotlib' in sys.modules);"
        "import pyarrow as pa; t = pa.table({'latent': [0], 'density': [0.5], 'is_dead': [False], 'is_ultra_dense': [True]});"
        "p.figure_bytes(p.density_plot(t)); print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]
