# What a developer types. `make` alone lists it.
# Everything runs in .venv, made on first use; a later call finds it and starts at once. test-lowest has a .venv-lowest.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
LOWEST := .venv-lowest
# what touches other libraries: kernels, models and their layers, adapters, training in one and several processes, evaluation
LOWEST_TESTS := tests/test_patches.py tests/contract tests/kernels tests/adapters tests/layers tests/models tests/training \
	tests/evaluation tests/cli tests/processes/test_distributed.py tests/processes/test_sharding.py
OFFLINE := HF_HUB_OFFLINE=1
# files in the order that tests/conftest.py gives them: the long ones first, so that both processes end together
DIST := --dist loadfile --no-loadscope-reorder
ARGS ?=

.PHONY: help
help: ## list these targets
	@echo "usage: make TARGET [ARGS='further arguments of the command']"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: quickstart
quickstart: $(STAMP) ## fine-tune the bundled model offline: preprocess, train, evaluate before and after, report
	@$(OFFLINE) $(PY) -m sparseft.cli.quickstart $(ARGS)

.PHONY: test
test: $(STAMP) ## every test that a CPU can run in minutes
	@$(OFFLINE) $(PY) -m pytest -q -n 2 $(DIST) -m "not slow and not gpu" $(ARGS)

.PHONY: test-slow
test-slow: $(STAMP) ## the tests that take longer
	@$(OFFLINE) $(PY) -m pytest -q -n 2 $(DIST) -m "slow and not gpu" $(ARGS)

.PHONY: test-gpu
test-gpu: $(STAMP) ## the tests that need a CUDA device; fails where there is none
	@$(OFFLINE) SPARSEFT_REQUIRE_GPU=1 $(PY) -m pytest -q -m gpu $(ARGS)

.PHONY: test-lowest
test-lowest: $(LOWEST)/.installed ## the tests that touch other libraries, at the lowest versions that pyproject.toml allows
	@$(OFFLINE) $(LOWEST)/bin/python -m pytest -q -n 2 $(DIST) -m "not slow and not gpu" $(LOWEST_TESTS) $(ARGS)

.PHONY: lint
lint: $(STAMP) ## check style, formatting and which way imports point, change nothing
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(VENV)/bin/lint-imports --no-cache --no-logo

.PHONY: format
format: $(STAMP) ## sort imports, format, and fix what can be fixed safely
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

.PHONY: docs
docs: $(STAMP) ## build the documentation as pages of HTML, offline: site/index.html
	@$(OFFLINE) NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet $(ARGS)
	@echo "built: site/index.html; with search: python3 -m http.server -d site"

.PHONY: bench
bench: $(STAMP) ## training steps against their targets on the CPU; fails where one is missed
	@status=0; for row in step_1024_fp32 step_1024_bf16 below_floor; do \
		$(VENV)/bin/sparseft bench train experiment=$$row $(ARGS) || { status=$$?; [ $$status -eq 1 ] || exit $$status; }; \
	done; exit $$status

.PHONY: install
install: $(STAMP) ## create .venv and install, no more

.PHONY: clean
clean: ## remove caches and build products; outputs/ and the environments stay
	@rm -rf build dist site .pytest_cache .ruff_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -path ./$(LOWEST) -prune -o -path ./.git -prune -o -type d -name __pycache__ -exec rm -rf {} +

# A stamp is newer than what it was installed from, so editing either file installs again. torch goes first and alone:
# from the constraint pip may then take a CPU build, where one is on offer, before anything else asks for torch.
$(STAMP): PINS := constraints.txt
$(STAMP): WHAT := '.[dev]'
$(STAMP): constraints.txt
$(LOWEST)/.installed: PINS := constraints-lowest.txt
$(LOWEST)/.installed: WHAT := . pytest pytest-xdist hypothesis
$(LOWEST)/.installed: constraints-lowest.txt
$(STAMP) $(LOWEST)/.installed: pyproject.toml
	@if ! $(@D)/bin/python -m pip --version >/dev/null 2>&1; then \
		found=; \
		for candidate in python3.11 python3.12 python3.13 python3; do \
			if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
				found="$$candidate"; break; \
			fi; \
		done; \
		if [ -z "$$found" ]; then \
			echo "make: no Python 3.11 or newer with the venv module on the PATH." >&2; \
			echo "      Install one (Debian, Ubuntu: python3.11 and python3.11-venv) and call make again." >&2; \
			exit 1; \
		fi; \
		echo "make: creating $(@D) with $$("$$found" --version)"; \
		"$$found" -m venv --clear $(@D); \
	fi
	@echo "make: installing sparseft and what it needs into $(@D) (some minutes the first time)"
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(PINS) torch
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(PINS) --editable $(WHAT)
	@touch $@
	@echo "make: installed"
