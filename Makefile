# Manta. `make` alone lists what there is to make. Needs Python 3.11 or 3.12 and a C compiler; all else goes into .venv.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

RIGHT_PYTHON := import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
# The first that runs and has the right version; another one: make setup PYTHON=/path/to/python3.12
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	if $$p -c '$(RIGHT_PYTHON)' 2>/dev/null; then echo $$p; break; fi; done)

BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help setup quickstart test test-all lint kuberay clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(STAMP) ## Make .venv and install everything at the tested versions (once, and again when these change)

# torch goes first and alone: which build of it fits this machine is settled before anything else is weighed.
$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then echo "Python 3.11 or 3.12 is needed and was not found; name one: make setup PYTHON=/path/to/python3.11" >&2; exit 1; fi
	@if ! $(PYTHON) -c '$(RIGHT_PYTHON)'; then echo "PYTHON=$(PYTHON) does not run or is not Python 3.11 or 3.12" >&2; exit 1; fi
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then rm -rf .venv; $(PYTHON) -m venv .venv || \
		{ rm -rf .venv; echo "python -m venv failed; Debian and Ubuntu have it in the package python3-venv" >&2; exit 1; }; fi
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

quickstart: setup ## Train a delta of the demo base, register it, serve both and compare their answers
	$(BIN)/manta quickstart

lint: setup ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint ## Style, types and the fast tests
	$(BIN)/python -m pytest -m 'not slow'

test-all: lint ## Style, types and every test
	$(BIN)/python -m pytest

kuberay: setup ## Render clusters/kuberay/ and the chart's list of values anew
	$(BIN)/python helm/kuberay.py
	$(BIN)/python helm/readme.py

clean: ## Remove .venv and what tools left behind
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache *.egg-info build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
