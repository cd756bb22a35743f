# Two commands do everything on a machine with Python 3.11 or 3.12, gcc and make:
#   make study   environment, built-in corpus, the quickstart study, its report
#   make test    the same environment, lint, types, tests
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Workers and tools must never import the repository's folders under their bare names.
export PYTHONSAFEPATH := 1

.PHONY: help study test test-all lint types format clean
help:
	@sed -n '1,3s/^# \{0,1\}//p' Makefile

# The stamp is newer than the files that decide what is installed, so a second call installs nothing.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || { \
	  echo "Headway needs Python 3.11 or 3.12; $$($(PYTHON) --version) was found. Say: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "installing into $(VENV) (about 3 minutes, 2.5 GB) ..."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pyright --version >/dev/null
	touch $@

study: $(VENV)/.installed
	$(BIN)/headway data build yaml/data/stdlib.yaml
	$(BIN)/headway study run yaml/quickstart.yaml

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/pyright

test: lint types
	$(BIN)/pytest -m 'not slow and not gpu'

test-all: lint types
	$(BIN)/pytest -m 'not gpu'

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
