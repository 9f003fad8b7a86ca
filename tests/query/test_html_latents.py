"""Does a page of latents say what the codes say, with hostile words in corpus and vocabulary?"""

import base64
import re

import numpy as np
import pytest

import actstore
from actstore.errors import InvalidInputError, NotFoundError
from actstore.query import bands
from actstore.query.latent_page import MAX_LATENTS, latent_page, save_latent_page, save_latents_picture
from actstore.query.plots import density_plot, latent_histogram
from actstore.show import visible
from tests.query.make_codes import add_codes, random_codes, stored_rows
from tests.query.make_store import add_run, make_store, random_values
from tests.query.test_html import TAGS, Page, alpha

H = "layers.0.resid_post"
N_LATENTS = 40
TAGS |= {"section", "h2", "code"}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    made = make_store(str(tmp_path_factory.mktemp("page") / "a.store"), seed=6, n_documents=30)
    add_run(made, "run", {H: 8}, random_values(6, {H: 8}))
    return add_codes(made, random_codes(len(stored_rows(made, "run")), N_LATENTS, seed=6, per_row=8))


def firing_counts(told):
    return np.asarray((told.matrix > 0).sum(axis=0)).ravel()


def test_a_page_says_what_the_codes_say(told, tmp_path):
    run = told.made.run("run")
    counts = firing_counts(told)
    dead, dense, rare = (
        int(np.argmin(counts)),
        int(np.argmax(counts)),
        int(np.argsort(counts)[len(counts) // 2]),
    )
    assert counts[dead] == 0
    wanted = [dense, rare, dead]
    path = save_latent_page(
        tmp_path / "page.html",
        run,
        "sae",
        wanted,
        k=5,
        notes={rare: "<script>note\x1b"},
        fold=None,
        mask_sinks=False,
    )
    html = path.read_text()
    page = Page(html.removeprefix("<!DOCTYPE html>\n"))
    assert not re.search(r"<script|<b>bold|\x1b|[\u2028-\u202e\u2066-\u2069]", html)
    sections = html.split("<section>")[1:]
    assert len(sections) == 3
    for latent, section in zip(wanted, sections, strict=True):
        assert f"<h2>latent:sae:{latent}</h2>" in section
        assert f"fires on {counts[latent]:,} tokens" in section or counts[latent] == 0
        shown = run.examples(actstore.latent("sae", latent), 5, fold=None, mask_sinks=False).to_dicts()
        marks = re.findall(r'<mark title="([^"]*)" style="([^"]*)">(.*?)</mark>', section)
        assert [float(value) for value, _, _ in marks] == pytest.approx(
            [row["value"] for row in shown], rel=1e-5
        )
        shades = [alpha(style) for _, style, _ in marks]
        assert shades == sorted(shades, reverse=True)
        values = told.column(latent)
        for row, (value, _, _) in zip(shown, marks, strict=True):
            assert float(value) == pytest.approx(values[np.searchsorted(told.rows, row["row"])], rel=1e-5)
    assert "dead, fires on no token" in sections[2]
    assert "&lt;script&gt;note\\x1b" in sections[1]
    words = [visible(text) for text in page.texts]
    assert any("\\x1b[31mred" in text for text in words)
    pictures = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)\"", html)
    assert len(pictures) == 4
    assert all(base64.b64decode(p).startswith(b"\x89PNG") for p in pictures)


def test_the_same_question_gives_the_same_page(told):
    run = told.made.run("run")
    options = {
        "bands": bands.top(2) + bands.random(2, seed=1) + bands.nonactivating(1),
        "title": "</title><script>",
    }
    first = latent_page(run, "sae", [3, 5], **options)
    assert first == latent_page(run, "sae", [3, 5], **options)
    assert '<td dir="auto">nonactivating</td>' in first
    assert "<script" not in first


def test_stored_statistics_can_be_drawn(told):
    stats = told.codes.stats()
    counts = firing_counts(told)
    title = density_plot(stats).axes[0].get_title()
    assert title.startswith(f"{N_LATENTS} latents: {(counts == 0).sum()} dead")
    latent = int(np.argmax(counts))
    [patch] = [
        p for p in latent_histogram(told.codes.stats([latent])).axes[0].patches if hasattr(p, "get_data")
    ]
    heights, edges = patch.get_data().values, patch.get_data().edges
    drawn = heights * np.diff(np.log2(edges))
    assert drawn == pytest.approx(np.histogram(told.firing(latent)[1], edges)[0])
    assert drawn.sum() == pytest.approx(counts[latent])


def test_a_picture_of_latents_is_one_file(told, tmp_path):
    run = told.made.run("run")
    path = save_latents_picture(tmp_path / "a.png", run, "sae", range(N_LATENTS))
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InvalidInputError, match="png, svg, pdf"):
        save_latents_picture(tmp_path / "a.gif", run, "sae", [1])
    with pytest.raises(InvalidInputError, match="at least one"):
        save_latents_picture(tmp_path / "b.png", run, "sae", [])
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_what_is_no_page_is_refused(told):
    run = told.made.run("run")
    for latents in ([], range(MAX_LATENTS + 1)):
        with pytest.raises(InvalidInputError, match=f"1 to {MAX_LATENTS} latents"):
            latent_page(run, "sae", latents)
    with pytest.raises(NotFoundError):
        latent_page(run, "sae", [N_LATENTS])
    with pytest.raises(NotFoundError):
        latent_page(run, "other", [0])
