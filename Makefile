# make demo   press the bundled model, evaluate it, write a report (no network after the installation)
# make test   everything that has to be green: lint, types, floors, tests
#
# Needs only python3 (3.11 or newer) and make; the rest is installed into .venv, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt
DEMO_OUT ?= moespresso-demo

.PHONY: demo test lint types floors tests clean
.DEFAULT_GOAL := test

demo: $(VENV)/.installed
	@$(BIN)/moespresso demo --out $(DEMO_OUT)

# One after another, cheapest first, also under `make -j`.
test: $(VENV)/.installed-dev
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory types
	@$(MAKE) --no-print-directory floors
	@$(MAKE) --no-print-directory tests

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .

types: $(VENV)/.installed-dev
	@$(BIN)/basedpyright

floors: $(VENV)/.installed-dev
	@$(BIN)/lint-imports --no-cache --no-logo

# Two workers on small machines: one thread each, or they take the cores from one another.
tests: $(VENV)/.installed-dev
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

clean:
	rm -rf $(VENV) $(DEMO_OUT) build dist

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moespresso needs Python 3.11 or newer: make PYTHON=python3.11")'
	@echo "making $(VENV) (a few minutes, once)"
	@$(PYTHON) -m venv $(VENV)

# torch first and by itself: whichever build of it the machine is set up for (CPU, CUDA), the rest must not replace it.
$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	@$(PIP) torch==2.13.0
	@touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.torch
	@$(PIP) -e '.[figures]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.torch
	@$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.installed
