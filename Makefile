# make demo       press the bundled model, evaluate it, write a report (no network after the installation)
# make test       lint, types, floors, and the tests without their breadth: a few minutes, while you work
# make test-all   the same with every test: before anything is called done
# make mutants    plant known faults one at a time, and tell which of them the tests miss
#
# `make test` has every kind of test, and of tests over many families or settings a few cases that between them have every
# mechanism; the others are marked `breadth` (tests/conftest.py says how). What `make mutants` plants (tools/faults.py) must be
# caught by `make test` alone. Who leaves a test out of it, or moves a kernel, runs `make mutants`.
#
# Needs only python3 (3.11 or newer) and make; the rest is installed into .venv, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt
DEMO_OUT ?= moespresso-demo

.PHONY: demo test test-all checks lint types floors tests all-tests mutants clean
.DEFAULT_GOAL := test

demo: $(VENV)/.installed
	@$(BIN)/moespresso demo --out $(DEMO_OUT)

# One after another, cheapest first, also under `make -j`.
test: $(VENV)/.installed-dev
	@$(MAKE) --no-print-directory checks
	@$(MAKE) --no-print-directory tests

test-all: $(VENV)/.installed-dev
	@$(MAKE) --no-print-directory checks
	@$(MAKE) --no-print-directory all-tests

checks: $(VENV)/.installed-dev
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory types
	@$(MAKE) --no-print-directory floors

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .

types: $(VENV)/.installed-dev
	@$(BIN)/basedpyright

floors: $(VENV)/.installed-dev
	@$(BIN)/lint-imports --no-cache --no-logo

# Two workers on small machines: one thread each, or they take the cores from one another. Each begins with a half of the
# files, so that what a file's tests share is made once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

tests: $(VENV)/.installed-dev
	@$(PYTEST) -m "not breadth"

all-tests: $(VENV)/.installed-dev
	@$(PYTEST)

mutants: $(VENV)/.installed-dev
	@$(BIN)/python tools/mutants.py

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
