# Commands of the project; `make` without arguments lists them.

# The Python of the environment; if empty, that of an existing environment, else the newest installed
# one that is supported. The location of the environment. The versions that are installed in it.
PYTHON ?=
VENV ?= .venv
PINS ?= requirements/python$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
STAMP := $(VENV)/.installed
DEMO := runs/digits

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-quick test-slow bench docs lint format check hooks pins clean

help: ## list the commands
	@echo "make COMMAND [PYTHON=python3.13] [VENV=.venv]"
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' $(MAKEFILE_LIST)

setup: $(STAMP) ## create the environment in .venv with pinned versions

# The stamp is updated last, so an interrupted setup starts again. An environment of another Python is
# replaced; anything else in its place is left alone.
$(STAMP): pyproject.toml $(wildcard requirements/*.txt)
	@present=$$(.ci/find_python $(BIN)/python 2> /dev/null); \
	if [ -n "$(PYTHON)" ]; then found=$$(.ci/find_python "$(PYTHON)") || exit; \
	else found=$${present:-$$(.ci/find_python)} && [ -n "$$found" ] || exit 2; fi; \
	found=$$(echo "$$found" | head -n 1); version=$${found%% *} python=$${found#* } clear=; \
	if [ -e $(VENV)/pyvenv.cfg ] && [ "$${present%% *}" != "$$version" ]; then clear=--clear; fi; \
	echo "Using Python $$version: $$python"; "$$python" -m venv $$clear $(VENV)
	@echo "Installing the pinned packages in $(VENV) ..."
	@$(PIP) install -r $(PINS)
	@$(PIP) install --no-deps --no-build-isolation -e .
	@cp $(PINS) $(VENV)/pins.txt
	@touch $@
	@echo "Ready: $(BIN)/python -m inception_jax.main --help"

demo: setup ## train on the built-in digits, evaluate and plot
	@if [ -d $(DEMO) ]; then echo "$(DEMO) contains an earlier run, which is resumed unless it is" \
	  "finished; to start over: rm -r $(DEMO)"; fi
	$(BIN)/python -m inception_jax.main --config experiments/digits.py --workdir $(DEMO) \
	  --config.data.directory=runs/data
	$(BIN)/python -m inception_jax.main --config experiments/digits.py --workdir $(DEMO) \
	  --config.data.directory=runs/data --mode=eval
	$(BIN)/python -m inception_jax.tools.plot $(DEMO)
	@echo "Report:      $(DEMO)/report.html"
	@echo "Result:      $(DEMO)/result.json"
	@echo "Metrics:     $(DEMO)/metrics.jsonl"
	@echo "Plots:       $(DEMO)/plots/"
	@echo "TensorBoard: $(BIN)/tensorboard --logdir $(DEMO)/tensorboard"

test: setup ## run all but the slow tests; a selection: make test ARGS="tests/models -k norm"
	$(BIN)/python -m pytest $(ARGS)

# What depends on the versions of Python and libraries, in a few minutes on two cores: a short
# training and its resume, checkpoints, files of earlier versions, storage and buckets, archives, input,
# telemetry, plots, and the server.
QUICK := tests/test_api.py tests/integration/test_old_files.py tests/training/test_checkpoints.py \
  tests/training/test_workdir.py tests/storage $(wildcard tests/integration/test_bucket*.py) \
  tests/datasets/sources tests/datasets/test_decode.py tests/input/test_pipeline.py tests/telemetry \
  tests/reporting/test_plots.py tests/inference/server/test_app.py tests/test_config.py \
  tests/test_packaging.py tests/test_private.py

test-quick: setup ## run the tests that depend most on versions of Python and libraries
	$(BIN)/python -m pytest $(QUICK) $(ARGS)

test-slow: setup ## run the slow tests, which repeat the checks on full runs
	$(BIN)/python -m pytest -m slow $(ARGS)

bench: setup ## compare speed with the stored result; to store a new one: make bench STORE=--store
	$(BIN)/python -m benchmarks.regression $(STORE)

docs: setup ## generate docs/configuration.md and build the documentation in build/docs
	$(PIP) install --no-build-isolation -e '.[docs]' -c $(VENV)/pins.txt
	@mkdir -p build
	$(BIN)/python -m inception_jax.config.reference > build/configuration.md
	@mv build/configuration.md docs/configuration.md
	$(BIN)/sphinx-build -q -W --keep-going docs build/docs
	@echo "Documentation: build/docs/index.html"

lint: setup ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Quick checks of what breaks easily. git checks uncommitted changes for whitespace errors and conflict
# markers; outside a repository this is skipped.
check: lint ## run the checks of a commit: lint, whitespace, and the tests of files and documentation
	@! git rev-parse --is-inside-work-tree > /dev/null 2>&1 || git --no-pager diff --check HEAD
	$(BIN)/python -m pytest --numprocesses=2 tests/test_architecture.py tests/test_documentation.py \
	  tests/test_docstrings.py tests/test_packaging.py

hooks: ## install a git hook that runs `make check` before each commit
	@hook=$$(git rev-parse --git-path hooks)/pre-commit; \
	  if [ -e "$$hook" ]; then echo "make: $$hook already exists and was not changed" >&2; exit 2; fi; \
	  mkdir -p "$$(dirname "$$hook")" && printf '%s\n' '#!/bin/sh' \
	  'unset $$(git rev-parse --local-env-vars)' 'exec make check' > "$$hook" && \
	  chmod +x "$$hook" && echo "Wrote $$hook"

format: setup ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Resolved by uv, which needs no Python of those versions. Only wheels count, except for promise, which
# has none and is pure Python: a package without a wheel for a new Python is named here, not when a
# user's compiler fails. Files contain names and versions alone, so they do not depend on the package
# index. lowest.txt has the oldest versions that pyproject.toml allows on the oldest Python.
RESOLVE := build/pins/bin/uv pip compile pyproject.toml --quiet --extra=dev --upgrade --no-header \
  --no-annotate --python-platform=x86_64-manylinux_2_28 --only-binary=:all: --no-binary=promise
VERSIONS := $(sort $(patsubst requirements/python%.txt,%,$(wildcard requirements/python3.*.txt)))

pins: ## update the pinned versions, for every supported Python
	@found=$$(.ci/find_python $(PYTHON) | head -n 1); [ -n "$$found" ] || exit 2; \
	rm -rf build/pins; "$${found#* }" -m venv build/pins
	@build/pins/bin/python -m pip -qq --disable-pip-version-check install uv
	@set -e; for version in $(VERSIONS); do pins=requirements/python$$version.txt; \
	  $(RESOLVE) --python-version=$$version --output-file=$$pins > /dev/null; echo "Wrote $$pins"; done
	@$(RESOLVE) --python-version=$(firstword $(VERSIONS)) --resolution=lowest-direct \
	  --output-file=requirements/lowest.txt > /dev/null && echo "Wrote requirements/lowest.txt"

clean: ## remove the environments and caches; keep runs/
	rm -rf $(VENV) $(VENV)-3.* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name .venv\* -prune -o -name __pycache__ -prune -exec rm -rf {} +
