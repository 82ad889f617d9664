# The commands of this repository; CI runs the same ones. `make` alone lists them.

VENV := .venv
BIN := $(VENV)/bin
PLUGINS := $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml))
PROJECTS := pyproject.toml $(wildcard plugins/*/pyproject.toml)
QUESTION ?= When was the present dome opened?

# The first Python that is new enough; `make PYTHON=… setup` chooses another.
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)

# uv where there is one, pip otherwise and in CI. uv can pick the build of torch that suits the machine.
UV := $(if $(CI),,$(shell command -v uv 2>/dev/null))
TORCH_BACKEND ?= auto
INSTALL := $(if $(UV),uv pip install --quiet --python $(BIN)/python,$(BIN)/python -m pip install --quiet)

# Pins are for the CPU build: nobody with a GPU is forced onto it.
HAS_GPU := $(if $(CI),,$(shell command -v nvidia-smi 2>/dev/null))
PINS := $(if $(HAS_GPU),,-c constraints.txt)

# Two test workers, one torch thread each.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2 --dist worksteal --durations=25

.PHONY: help setup setup-dev demo test test-slow check check-api fix docs screenshots bench
.DEFAULT_GOAL := help

help: ## List these commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.models ## Make .venv with the core, its extras, all plugins and the default models

setup-dev: $(VENV)/.setup-dev $(VENV)/.models ## The same and the development tools

demo: setup ## Answer a question about a document
	$(BIN)/calpaca run retrieval_qa --file examples/handbook.md --question "$(QUESTION)"

test: setup-dev ## Run the tests, about ten minutes
	$(PYTEST) -m "not slow and not suite"

test-slow: setup-dev $(VENV)/.setup-deepspeed ## Run the tests that take long or fetch a large asset
	$(PYTEST) -m "slow and not suite"

check-api: $(VENV)/.setup-api $(VENV)/.models ## Run the outside suites for the server (Node.js 20 for one of them)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -m suite plugins/openai_api/tests/suites

check: setup-dev ## Format, lint, types, import contracts, docs fresh
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy calpaca $(wildcard plugins/*/calpaca_*)
	$(BIN)/lint-imports --no-cache
	$(BIN)/python docs/generate.py --check

fix: setup-dev ## Format, and repair what the linter can
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format --quiet .

docs: setup-dev ## Write the generated pages of docs/ again
	$(BIN)/python docs/generate.py

screenshots: setup-dev ## Draw the pictures of docs/chat.md again
	$(BIN)/python docs/screenshots.py

bench: setup-dev ## Run the benchmarks
	for script in bench/*.py; do $(BIN)/python $$script || exit 1; done

# Stamps inside .venv: removing it starts afresh, and nothing runs when nothing changed.

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "calpaca needs Python 3.11 or newer. Install one, or name it: make PYTHON=… setup" >&2; exit 1; }
	$(if $(UV),uv venv --quiet --python $(PYTHON) $(VENV),$(PYTHON) -m venv $(VENV))

# torch comes first and alone: resolved together with everything else, pip may choose the CUDA build of several GB.
$(VENV)/.setup: $(PROJECTS) constraints.txt | $(BIN)/python
	$(if $(UV),,$(INSTALL) --upgrade "pip>=25.1")
	$(INSTALL) $(PINS) $(if $(and $(UV),$(TORCH_BACKEND)),--torch-backend $(TORCH_BACKEND)) torch
	$(INSTALL) $(PINS) -e ".[torch,web,chroma,qdrant,pdf,office,openvino,llama-cpp]" $(foreach plugin,$(PLUGINS),-e ./$(plugin))
	@touch $@

$(VENV)/.setup-dev: $(VENV)/.setup
	$(INSTALL) $(PINS) --group dev
	@touch $@

$(VENV)/.setup-api: $(VENV)/.setup-dev
	$(INSTALL) $(PINS) --group api-suites
	@touch $@

# Without its compiled parts; the one for processes on a CPU is compiled when it is first used. Not part of .setup-dev:
# wherever DeepSpeed is installed, Accelerate imports it, which takes two seconds.
$(VENV)/.setup-deepspeed: $(VENV)/.setup-dev
	DS_BUILD_OPS=0 $(INSTALL) $(PINS) -e "./plugins/trainer[deepspeed,tensorboard]"
	@touch $@

$(VENV)/.models: $(VENV)/.setup
	$(BIN)/calpaca models pull smollm2-135m-instruct multilingual-e5-small >/dev/null
	@touch $@
