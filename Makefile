# Everything a fresh machine needs is made by the targets themselves; each is quick when repeated.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV ?= .venv
EXTRAS ?= train,test
CONSTRAINTS ?= constraints.txt
RUN := $(VENV)/bin/python

.PHONY: help setup train test test-oldest lab lint bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(VENV)/.installed ## make the virtual environment in .venv and install everything into it

$(VENV)/.installed: pyproject.toml setup.cfg $(CONSTRAINTS)
	@python=""; for candidate in python3 python3.14 python3.13 python3.12 python; do \
	  if $$candidate -c 'import sys; raise SystemExit(sys.version_info < (3, 12))' >/dev/null 2>&1; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "error: jattn needs Python 3.12 or newer and none of python3, python3.12 ... is one."; \
	  echo "       Debian/Ubuntu: apt install python3.12 python3.12-venv;  macOS: brew install python@3.12;"; \
	  echo "       anywhere: uv python install 3.12, or pyenv install 3.12; then run make again."; exit 2; \
	fi; \
	echo "Setting up $(VENV) with $$($$python --version); the first time takes about a minute"; \
	start=$$SECONDS; \
	$$python -m venv $(VENV) && \
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[$(EXTRAS)]' && \
	touch $@ && echo "Set up in $$((SECONDS - start)) s"

train: setup ## train the byte-level language model of Python's own documentation (3 minutes on 2 cores)
	@echo "Training recipe pydoc_lm in runs/pydoc_lm; Ctrl-C saves, the same command goes on"
	@$(RUN) -m train run pydoc_lm --workdir runs/pydoc_lm

test: setup lint ## all checks and tests
	@start=$$SECONDS; echo "Running the tests"; \
	$(RUN) -m pytest -p tests.cores --ignore tests/lab -n auto --dist worksteal; status=$$?; \
	echo "Tests took $$((SECONDS - start)) s"; exit $$status

lab: ## compile for TPU pods and H100 with neither present
	@$(MAKE) --no-print-directory setup VENV=.venv-lab EXTRAS=test,lab
	@start=$$SECONDS; echo "Compiling for chips that are not here"; \
	JAX_PLATFORMS=cpu .venv-lab/bin/python -m pytest tests/lab -n 2 --dist loadfile; status=$$?; \
	echo "The lab took $$((SECONDS - start)) s"; exit $$status

lint: setup ## format, lint and type checks
	@echo "Checking format, lint and types"
	@$(RUN) -m ruff format --check --quiet . || { echo "error: run $(VENV)/bin/ruff format ."; exit 1; }
	@$(RUN) -m ruff check --quiet .
	@$(RUN) -m mypy --no-error-summary

test-oldest: ## the tests on the oldest jax that is supported
	@$(MAKE) --no-print-directory test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

bench: setup ## run every benchmark and print its table
	@$(RUN) -m benchmarks all

clean: ## remove environments and caches (not runs/)
	rm -rf .venv .venv-oldest .venv-lab build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
