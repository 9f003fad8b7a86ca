# actstore: `make demo` and `make test` need Python 3.11+ and make, and do all their own set-up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c deploy/constraints.txt
STAMP := $(VENV)/.installed
# Threads of BLAS and of torch fight over few cores when tests run side by side.
TEST_ENV := OMP_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: setup demo test lint bench bench-saelens campaign typing-tree clean

setup: $(STAMP)

# torch first and alone: its CPU build must be in place before anything else asks for "torch".
$(STAMP): pyproject.toml deploy/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/actstore demo --store demo.store

# One package for the type checker out of the three folders.
typing-tree:
	rm -rf build/typing && mkdir -p build/typing/actstore
	for entry in actstore/*; do ln -s "$(CURDIR)/$$entry" build/typing/actstore/; done
	ln -s "$(CURDIR)/ingest" "$(CURDIR)/query" build/typing/actstore/

lint: setup typing-tree
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(TEST_ENV) $(BIN)/pytest -n 2 --dist worksteal -m "not slow"

bench: setup
	$(BIN)/python -m tests.benchmarks

# Side by side with SAELens, which gets an environment of its own: its pins and ours cannot share one.
PEER := build/peers/saelens
bench-saelens: setup
	test -x $(PEER)/bin/python || $(PYTHON) -m venv $(PEER)
	$(PEER)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(PEER)/bin/python -m pip install --quiet --disable-pip-version-check sae-lens==6.54.12
	$(BIN)/python -m tests.benchmarks.bench_saelens

# Long fault-injection and kill campaigns, and every slow test.
campaign: setup
	$(TEST_ENV) $(BIN)/pytest -m slow --timeout 7200

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
