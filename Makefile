# Everyday targets. `make train` and `make test` set up all they need on a machine with Python 3.11, git and make.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# One thread a process keeps two cores busy with two test processes, and results identical between machines of one kind.
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help setup train test lint format bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.installed  ## virtual environment .venv with everything that training and the tests need, pinned

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --editable '.[dev]' -c constraints.txt
	@touch $@

train: setup  ## train a small language model with CPPO (about 5 minutes on two cores); ARGS="rule=dppo seed=2"
	$(BIN)/cppo train $(ARGS)

test: setup  ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: setup  ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup  ## apply formatting and safe lint fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup  ## speed and memory as ratios; figures go to benchmarks/results/
	$(BIN)/python -m benchmarks.core --json benchmarks/results/core.json
	$(BIN)/python -m benchmarks.update --json benchmarks/results/update.json

clean:  ## remove the virtual environment and caches (runs/ stays)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist src/*.egg-info
