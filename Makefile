# make demo | make test | make test-slow | make test-all | make lint | make docs | make clean
# PYTHON names another interpreter for the environment, e.g. make PYTHON=python3.12 demo; TEST_PROCESSES how many run the fast tests

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
TORCH  := torch==2.13.0
TEST_PROCESSES ?= 2
# Their slow tests start ranks, daemons and Ray, which need the machine for themselves: one at a time.
LAUNCHING := tests/corpus tests/grow tests/merge tests/plan tests/run tests/slurm tests/train
PIP    := $(BIN)/python -m pip install --disable-pip-version-check -q

.PHONY: demo test test-slow test-all lint docs clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/megaxelm run recipes/demo.yaml

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile -m "not slow and not slurm and not gpu"

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal -m "(slow or slurm) and not gpu" $(LAUNCHING:%=--ignore=%)
	$(BIN)/python -m pytest -m "(slow or slurm) and not gpu" --durations=25 $(LAUNCHING)

test-all: test test-slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.demo
	$(BIN)/megaxelm recipe docs > docs/recipe.md

# A torch that PYTHON already has is used (the environment then sees PYTHON's packages); otherwise the pinned one is fetched first.
$(VENV)/.torch:
	@tools/check_system.sh $(PYTHON)
	@if $(PYTHON) -c 'import torch; v = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])); assert v >= (2, 11)' 2>/dev/null; then \
	    echo "using the torch that $(PYTHON) has"; $(PYTHON) -m venv --system-site-packages $(VENV); \
	else $(PYTHON) -m venv $(VENV); fi
	@$(BIN)/python -c 'import torch' 2>/dev/null || { echo "fetching $(TORCH)"; $(PIP) $(TORCH); }
	@touch $@

$(VENV)/.demo: $(VENV)/.torch setup.py
	@echo "installing MegaXELM and what it needs"
	$(PIP) -e '.[demo]'
	@echo "compiling DeepSpeed's extension, once"
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -c 'from megaxelm.train.environment import build_extension; build_extension()'
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) -e '.[demo,dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
