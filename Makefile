# actstore: `make demo` and `make test` need Python 3.11+ and make, and do all their own set-up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c deploy/constraints.txt
STAMP := $(VENV)/.installed
# Threads of BLAS and of torch fight over few cores when tests run side by side.
TEST_ENV := OMP_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: setup demo test lint bench bench-saelens bench-delphi bench-index campaign typing-tree clean

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

# Side by side with delphi. Its requirements name vllm and bitsandbytes, which caching latents never imports: what it does is listed.
DELPHI := build/peers/delphi
DELPHI_INSTALL := $(DELPHI)/bin/python -m pip install --quiet --disable-pip-version-check
bench-delphi: setup
	test -x $(DELPHI)/bin/python || $(PYTHON) -m venv $(DELPHI)
	$(DELPHI_INSTALL) torch==2.13.0
	$(DELPHI_INSTALL) --no-deps eai-delphi==0.1.3
	$(DELPHI_INSTALL) transformers==5.23.0 safetensors jaxtyping simple_parsing orjson blobfile asyncer anyio faiss-cpu tqdm
	$(BIN)/python -m tests.benchmarks.bench_delphi

# Nearest neighbours beside FAISS, LanceDB and DuckDB; the first run trains a model for the activations (20 minutes).
LANCEDB := build/peers/lancedb
bench-index: setup
	test -x $(LANCEDB)/bin/python || $(PYTHON) -m venv $(LANCEDB)
	$(LANCEDB)/bin/python -m pip install --quiet --disable-pip-version-check lancedb==0.40.0 duckdb==2.0.0 numpy pyarrow
	$(BIN)/python -m tests.benchmarks.bench_index
	$(BIN)/python -m tests.benchmarks.bench_directions

# Long fault-injection and kill campaigns, and every slow test.
campaign: setup
	$(TEST_ENV) $(BIN)/pytest -m slow --timeout 7200

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
