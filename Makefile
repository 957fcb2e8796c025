# `make demo` and `make test` do all the set-up they need; everything works on a machine without a GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow check bench docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(INSTALLED)  ## predict, train, export and reload a small model on embedded data (under 3 minutes)
	$(BIN)/zoo demo

test: $(INSTALLED)  ## run the test-suite (CPU; GPU tests run where a GPU is present)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: $(INSTALLED)  ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow

check: $(INSTALLED)  ## lint and check the formatting, as pre-commit does
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(INSTALLED)  ## time the ops and models on this machine (a GPU gives meaningful numbers)
	$(BIN)/zoo bench

$(VENV)/.docs: $(INSTALLED)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[docs]"
	@touch $@

docs: $(VENV)/.docs  ## build the documentation site into site/, warnings are errors
	NO_MKDOCS_2_WARNING=1 PATH="$(abspath $(BIN)):$$PATH" $(BIN)/mkdocs build --strict

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache site
