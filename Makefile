# Requirements: Python 3.11 or 3.12, gcc, g++ and make. Main targets:
#   make study   create the environment, build the corpus, run the quickstart study and write its report
#   make test    use the same environment; run lint, type checks and tests
#   make results measure every number of README and docs again (an hour; includes mechanisms and probes)
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Prevents Python from importing the repository's folders under their bare names.
export PYTHONSAFEPATH := 1

.PHONY: help study test test-all test-gpu results mechanisms uptrain wgqa wgqa-small wgqa-base probes plans parity soak chaos checkpoint-cost lint types format clean
help:
	@sed -n '1,4s/^# \{0,1\}//p' Makefile

# The stamp file is newer than the files that define the installation, so a second call installs nothing.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || { \
	  echo "Headway needs Python 3.11 or 3.12; $$($(PYTHON) --version) was found. Say: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "installing into $(VENV) (about 3 minutes, 3.5 GB) ..."
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pyright --version >/dev/null
	touch $@

study: $(VENV)/.installed
	$(BIN)/headway data build yaml/data/stdlib.yaml
	$(BIN)/headway study run yaml/quickstart.yaml

# Measures every number of the README and docs again. Needs an otherwise idle machine.
RESULTS := docs/results
BENCH := $(BIN)/headway bench
REPORT := report.md report.csv curves.csv study.json loss.png effects.png trend.png routers.png heads.png routers.csv heads.csv
results: study mechanisms probes checkpoint-cost
	mkdir -p $(RESULTS)/quickstart
	cp $(addprefix studies/quickstart/,$(REPORT) timing.json) $(RESULTS)/quickstart/
	$(BENCH) step yaml/base/quickstart.yaml --out $(RESULTS)/bench/step-gqa.json
	$(BENCH) step yaml/base/quickstart.yaml attention.type=rgqa attention.top_k=1 --out $(RESULTS)/bench/step-rgqa-k1.json
	$(BENCH) step yaml/bench/long-2048.yaml --against attention.type=gqa --out $(RESULTS)/bench/step-2048-rgqa-k1-against-gqa.json
	$(BENCH) data yaml/base/quickstart.yaml --out $(RESULTS)/bench/data.json
	$(BENCH) documents yaml/base/quickstart.yaml launch.threads=1 --out $(RESULTS)/bench/documents.json

# Trains every mechanism with its controls (about an hour and a half on one core, estimated), and times each over sequence lengths.
mechanisms: $(VENV)/.installed
	$(BIN)/headway data build yaml/data/stdlib.yaml
	$(BIN)/headway study run yaml/studies/all-mechanisms.yaml
	mkdir -p $(RESULTS)/all-mechanisms
	cp $(addprefix studies/all-mechanisms/,$(REPORT) pareto.png) $(RESULTS)/all-mechanisms/
	$(BENCH) mechanism yaml/studies/all-mechanisms.yaml launch.threads=1 --rounds 11 --out $(RESULTS)/bench/mechanisms.json

# Converts multi-head models to grouped ones, uptrains them, and compares with training from scratch (half an hour).
uptrain: $(VENV)/.installed
	$(BIN)/headway data build yaml/data/stdlib.yaml
	$(BIN)/headway study run yaml/studies/uptrain.yaml

# Fine-tunes learned merges of heads from multi-head models of two sizes, and judges summaries (50 minutes).
wgqa: wgqa-small wgqa-base
wgqa-small: SPEC = summarise
wgqa-small: STUDY = wgqa-summaries
wgqa-base: SPEC = summarise-base
wgqa-base: STUDY = wgqa-summaries-base
wgqa-small wgqa-base: $(VENV)/.installed
	$(BIN)/headway data build yaml/data/functions.yaml
	$(BIN)/headway train yaml/base/$(SPEC)-teacher.yaml
	$(BIN)/headway study run yaml/studies/$(STUDY).yaml
	$(BIN)/headway eval studies/$(STUDY) --summaries datasets/functions --new-tokens 32

probes: $(VENV)/.installed
	$(BIN)/headway probe run yaml/probes.yaml
	mkdir -p $(RESULTS)/probes
	cp studies/probes/{probe.md,probe.csv,recall.png} $(RESULTS)/probes/

# Computes memory and speed of the included layouts and of layouts for 512 GPUs. Takes seconds on any machine.
plans: $(VENV)/.installed
	$(BIN)/python -P -m headway.launcher.plan.tables $(RESULTS)/plans

# Compares the losses of every mechanism on every layout with one process (at most 40 minutes on two cores).
parity: $(VENV)/.installed
	PYTHONPATH=tests/parity $(BIN)/python tests/parity/parity_run.py
	$(BIN)/python tests/parity/start_up.py

# Applies random kills, full disks, damaged files and layout changes for half an hour on two cores.
soak: $(VENV)/.installed
	$(BIN)/python -P tests/faults/soak.py --minutes 30 --kills 200 --out $(RESULTS)/soak.json

# Injects ten kinds of faults into stock DeepSpeed and Headway. Takes three minutes.
chaos: $(VENV)/.installed
	$(BIN)/headway chaos --json $(RESULTS)/chaos.json

# Measures the cost of checkpoints during training. Takes five minutes on one core.
checkpoint-cost: $(VENV)/.installed
	$(BENCH) checkpoint yaml/bench/checkpoint-82m.yaml launch.threads=1 --rounds 10 --out $(RESULTS)/bench/checkpoint.json

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/pyright

# Two workers, each of which runs whole test files. Many tests wait for their own processes, so this keeps two cores
# busier. Files run in the order of collection. Otherwise the short soak, a single test in its own file, would run last.
TESTS = $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

test: lint types
	$(TESTS) -m 'not slow and not gpu'

test-all: lint types
	$(TESTS) -m 'not gpu'

# On a machine with a GPU: every kernel against float64. All are skipped elsewhere.
test-gpu: $(VENV)/.installed
	$(BIN)/pytest -m gpu tests/kernels

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
