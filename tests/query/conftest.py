"""Stores that several query tests read; each is made once per test process and never changed."""

import pytest

from tests.query.make_codes import add_codes, random_codes, stored_rows
from tests.query.make_store import add_run, make_store, random_values

WIDTHS = {"layers.0.resid_post": 12, "layers.1.mlp_act": 24}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Special tokens, NaNs, sinks, two hook points, float32 and bfloat16, a partial run."""
    made = make_store(str(tmp_path_factory.mktemp("query") / "a.store"), seed=1, n_documents=40)
    add_run(made, "run", WIDTHS, random_values(1, WIDTHS, nonfinite=True, sinks=True))
    add_run(made, "half", WIDTHS, random_values(2, WIDTHS), dtype="bfloat16", codec="cold")
    add_run(made, "part", WIDTHS, random_values(3, WIDTHS), dtype="float16", skip_units=(0, 3), seal=False)
    return made


@pytest.fixture(scope="session")
def overlapping(tmp_path_factory):
    """Overlapping windows, no special tokens, clean numbers."""
    made = make_store(
        str(tmp_path_factory.mktemp("query") / "b.store"),
        seed=2,
        n_documents=30,
        window=12,
        overlap=4,
        bos=False,
        rows_per_unit=128,
    )
    widths = {"layers.0.resid_post": 16}
    add_run(made, "run", widths, random_values(4, widths))
    return made


@pytest.fixture(scope="session")
def coded(tmp_path_factory):
    """A run encoded with two dictionaries, one of them full of ties, and codes that are not complete or without postings."""
    made = make_store(str(tmp_path_factory.mktemp("query") / "c.store"), seed=3, n_documents=60)
    add_run(made, "run", WIDTHS, random_values(5, WIDTHS, sinks=True))
    add_run(made, "part", WIDTHS, random_values(6, WIDTHS), skip_units=(1,), seal=False)
    n = len(stored_rows(made, "run"))
    half = stored_rows(made, "run", (0, 5))
    return {
        "sae": add_codes(made, random_codes(n, 60, seed=1, ties=True)),
        "other": add_codes(
            made,
            random_codes(n, 30, seed=2, per_row=4, dtype="float32"),
            dictionary="other",
            hook_point="layers.1.mlp_act",
            value_dtype="float32",
        ),
        "bare": add_codes(made, random_codes(n, 40, seed=3), dictionary="bare", postings=False),
        "half": add_codes(
            made, random_codes(len(half), 40, seed=4), dictionary="half", skip_units=(0, 5), seal=False
        ),
        "part": add_codes(made, random_codes(len(stored_rows(made, "part")), 60, seed=5), run="part"),
    }
