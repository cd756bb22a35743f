# Two commands do everything on a machine with Python 3.11 or 3.12, gcc, g++ and make:
#   make study   environment, built-in corpus, the quickstart study, its report
#   make test    the same environment, lint, types, tests
#   make results every number that README and docs quote, measured anew (an hour; mechanisms and probes are parts of it)
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Workers and tools must never import the repository's folders under their bare names.
export PYTHONSAFEPATH := 1

.PHONY: help study test test-all results mechanisms probes plans parity soak chaos checkpoint-cost lint types format clean
help:
	@sed -n '1,4s/^# \{0,1\}//p' Makefile

# The stamp is newer than the files that decide what is installed, so a second call installs nothing.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || { \
	  echo "Headway needs Python 3.11 or 3.12; $$($(PYTHON) --version) was found. Say: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "installing into $(VENV) (about 3 minutes, 3.3 GB) ..."
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pyright --version >/dev/null
	touch $@

study: $(VENV)/.installed
	$(BIN)/headway data build yaml/data/stdlib.yaml
	$(BIN)/headway study run yaml/quickstart.yaml

# Every number of the README and docs, anew; needs an otherwise idle machine.
RESULTS := docs/results
BENCH := $(BIN)/headway bench
REPORT := report.md report.csv curves.csv study.json loss.png effects.png routers.png heads.png routers.csv heads.csv
results: study mechanisms probes checkpoint-cost
	mkdir -p $(RESULTS)/quickstart
	cp $(addprefix studies/quickstart/,$(REPORT)) $(RESULTS)/quickstart/
	$(BENCH) step yaml/base/quickstart.yaml --out $(RESULTS)/bench/step-gqa.json
	$(BENCH) step yaml/base/quickstart.yaml attention.type=rgqa attention.top_k=1 --out $(RESULTS)/bench/step-rgqa-k1.json
	$(BENCH) step yaml/bench/long-2048.yaml --against attention.type=gqa --out $(RESULTS)/bench/step-2048-rgqa-k1-against-gqa.json
	$(BENCH) data yaml/base/quickstart.yaml --out $(RESULTS)/bench/data.json

# Every mechanism with its controls (40 minutes on one core), and what each costs over lengths.
mechanisms: $(VENV)/.installed
	$(BIN)/headway data build yaml/data/stdlib.yaml
	$(BIN)/headway study run yaml/studies/all-mechanisms.yaml launch.threads=1
	mkdir -p $(RESULTS)/all-mechanisms
	cp $(addprefix studies/all-mechanisms/,$(REPORT)) $(RESULTS)/all-mechanisms/
	$(BENCH) mechanism yaml/studies/all-mechanisms.yaml launch.threads=1 --rounds 11 --out $(RESULTS)/bench/mechanisms.json

probes: $(VENV)/.installed
	$(BIN)/headway probe run yaml/probes.yaml
	mkdir -p $(RESULTS)/probes
	cp studies/probes/{probe.md,probe.csv,recall.png} $(RESULTS)/probes/

# What the shipped layouts need and give, and the way to 512 GPUs: computed, in seconds, on any machine.
plans: $(VENV)/.installed
	$(BIN)/python -P -m headway.launcher.plan.tables $(RESULTS)/plans

# The losses of every mechanism on every layout against one process (40 minutes on two cores at most).
parity: $(VENV)/.installed
	PYTHONPATH=tests/parity $(BIN)/python tests/parity/parity_run.py
	$(BIN)/python tests/parity/start_up.py

# Kills, full disks, damaged files and moves between layouts, at random, for half an hour on two cores.
soak: $(VENV)/.installed
	$(BIN)/python -P tests/faults/soak.py --minutes 30 --kills 200 --out $(RESULTS)/soak.json

# Ten kinds of faults, done to stock DeepSpeed and to Headway; three minutes.
chaos: $(VENV)/.installed
	$(BIN)/headway chaos --json $(RESULTS)/chaos.json

# What training pays for checkpoints; five minutes on one core.
checkpoint-cost: $(VENV)/.installed
	$(BENCH) checkpoint yaml/bench/checkpoint-82m.yaml launch.threads=1 --rounds 10 --out $(RESULTS)/bench/checkpoint.json

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/pyright

# Two workers, a file of tests to one of them: many tests wait for processes of their own, and two cores are busier so.
# In the order of collection, or the short soak, one test in a file of its own, would come last.
TESTS = $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

test: lint types
	$(TESTS) -m 'not slow and not gpu'

test-all: lint types
	$(TESTS) -m 'not gpu'

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
