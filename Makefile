# Every target makes what it needs: `make run` and `make test` work in a fresh clone with nothing
# installed but Python 3.11 or later and pip. Stamps say what .venv holds; it is brought up to date
# when pyproject.toml changes.

PYTHON ?= python3
ARGS   ?=

VENV     := .venv
BIN      := $(VENV)/bin
PIP      := $(BIN)/python -m pip --disable-pip-version-check --quiet
PYTEST    = $(BIN)/python -m pytest -n auto
NOTEBOOKS = $(wildcard samples/*.ipynb samples/*/*.ipynb)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help run test test-gpu check lint cover bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(VENV)/.run  ## replay a page-access trace against a device: make run ARGS="--memory 50%"
	@$(BIN)/hmm run $(ARGS)

test: $(VENV)/.test  ## run the tests: make test ARGS="tests/mm -k buddy"
	$(PYTEST) $(ARGS)

test-gpu: $(VENV)/.gpu  ## on a machine with an NVIDIA GPU: conformance, and what copies reach
	$(BIN)/python -m pytest -m gpu tests/devices/test_gpu.py $(ARGS)
	@$(BIN)/hmm calibrate cupy

check: lint  ## lint, format, types, floors, tests, notebooks
	$(PYTEST) $(if $(NOTEBOOKS),--nbmake) tests $(NOTEBOOKS)

lint: $(VENV)/.test  ## lint, format, types, floors
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

cover: $(VENV)/.test  ## which lines and branches the tests reach
	$(PYTEST) --cov --cov-report=term

bench: $(VENV)/.run  ## what this machine reaches: make bench ARGS=--json
	@$(BIN)/hmm bench $(ARGS)

clean:  ## remove .venv, caches and whatever was built
	rm -rf $(VENV) build dist .coverage .coverage.* .benchmarks .hypothesis .import_linter_cache \
		.mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit( \
		"Python 3.11 or later is needed, this is %d.%d; name another: make PYTHON=python3.12" % v[:2])'
	@echo "making $(VENV)" >&2
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml | $(BIN)/pip
	@echo "installing into $(VENV)" >&2
	@$(PIP) install -e '.[cli]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/pip
	@echo "installing into $(VENV), with the test tools" >&2
	@$(PIP) install -e '.[cli,test]'
	@touch $@ $(VENV)/.run

$(VENV)/.gpu: $(VENV)/.test
	@echo "installing into $(VENV), with CuPy" >&2
	@$(PIP) install -e '.[cli,test,cupy]'
	@touch $@
