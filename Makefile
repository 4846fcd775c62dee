# Commands of the project; `make` without arguments lists them.

# The Python of the environment, 3.11 or 3.12, and the location of the environment.
PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
STAMP := $(VENV)/.installed
DEMO := runs/digits

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow bench docs lint format check hooks pins clean

help: ## list the commands
	@echo "make COMMAND [PYTHON=python3.12] [VENV=.venv]"
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' $(MAKEFILE_LIST)

setup: $(STAMP) ## create the environment in .venv with pinned versions

# The stamp is updated last, so an interrupted setup starts again.
$(STAMP): pyproject.toml $(wildcard requirements/*.txt)
	@command -v $(PYTHON) > /dev/null || \
	  { echo "make: $(PYTHON) not found. Use Python 3.11 or 3.12: make setup PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v in ((3, 11), (3, 12)) or sys.exit( \
	  "make: $(PYTHON) is Python %d.%d; must be 3.11 or 3.12. Use: make setup PYTHON=python3.12" % v)'
	@echo "Installing the pinned packages in $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -r requirements/python$$($(BIN)/python -c \
	  'import sys; print("%d.%d" % sys.version_info[:2])').txt
	@$(PIP) install --no-deps --no-build-isolation -e .
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

test-slow: setup ## run the slow tests, which repeat the checks on full runs
	$(BIN)/python -m pytest -m slow $(ARGS)

bench: setup ## compare speed with the stored result; to store a new one: make bench STORE=--store
	$(BIN)/python -m benchmarks.regression $(STORE)

docs: setup ## generate docs/configuration.md and build the documentation in build/docs
	$(PIP) install --no-build-isolation -e '.[docs]' -c requirements/python$$($(BIN)/python -c \
	  'import sys; print("%d.%d" % sys.version_info[:2])').txt
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

# In a new environment, with the latest versions that pyproject.toml allows. pip freeze writes no
# hashes or URLs, so the file does not depend on the package index. --all keeps setuptools, which
# TensorBoard needs and which builds this package.
pins: ## update the pinned versions for one Python: make pins PYTHON=python3.12
	@rm -rf build/pins
	@$(PYTHON) -m venv --upgrade-deps build/pins
	@build/pins/bin/python -m pip -qq --disable-pip-version-check install '.[dev]'
	@pins=requirements/python$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt; \
	  build/pins/bin/python -m pip freeze --all --exclude pip --exclude inception-jax > \
	  $$pins && echo "Wrote $$pins"

clean: ## remove the environment and caches; keep runs/
	rm -rf $(VENV) build docs/build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name .venv\* -prune -o -name __pycache__ -prune -exec rm -rf {} +
