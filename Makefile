# The whole vocabulary: make help
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -ec
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PYTEST_ARGS ?=
# Runs of the tests beside each other, a file in one of them: much of the time goes into waiting.
WORKERS ?= 3
SEED ?= 1
STEPS ?= 200

.PHONY: help demo demo-stop check test proto bench sim web clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed; $(PYTHON) is $$($(PYTHON) -V 2>&1). Set PYTHON=python3.12 or the like." >&2; exit 1; }
	@echo "making $(VENV) and installing the project (once) …"
	@$(PYTHON) -m venv $(VENV) || { echo "python's venv module is missing: apt-get install python3-venv" >&2; exit 1; }
	@$(PY) -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing the development tools (once) …"
	@$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(VENV)/.installed  ## start a local cluster of three nodes and deploy the example on it
	@$(PY) -m deploy.demo up

demo-stop: $(VENV)/.installed  ## end the demo's cluster
	@$(PY) -m deploy.demo down

check: $(VENV)/.installed-dev  ## format, lint, types, import contracts, generated code
	@$(VENV)/bin/ruff format --check --quiet . || { echo "run: $(VENV)/bin/ruff format ." >&2; exit 1; }
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports --no-cache | tail -n 4
	@$(PY) proto/generate.py --check
	@echo "check: ok"

test: $(VENV)/.installed-dev  ## install what the tests need and run every test
	@bash deploy/test-tools.sh
	@$(PY) -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

proto: $(VENV)/.installed-dev  ## generate the Python side of the contract
	@$(PY) proto/generate.py

sim: $(VENV)/.installed-dev  ## one run of the simulator: make sim SEED=17 STEPS=200; see tests/sim/README.md
	@$(PY) -m tests.sim --seed $(SEED) --steps $(STEPS)

bench: $(VENV)/.installed-dev  ## run the benchmarks; the last line of each is key=value
	@for name in store placement job agents compose dry_run proxy deploy failover; do echo "== $$name"; $(PY) -m tests.bench.$$name || exit 1; done

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
