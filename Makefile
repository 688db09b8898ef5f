PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
MODEL := .models/SmolLM2-135M-Instruct
TOKENIZERS := .models/tokenizers
PYTEST := $(VENV)/bin/python -m pytest
SHARE ?= 0/1
JOBS ?= 2
PARALLEL = -n $(JOBS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0

.DEFAULT_GOAL := help
.PHONY: help quickstart install install-dev model tokenizers prerequisites lint format \
  test test-unit test-faults test-hosts test-gpu test-browser test-all

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r target text; do \
	  printf '  %-14s %s\n' "$$target" "$$text"; done

quickstart: install ## fine-tune a small model and ask it before and after (QUICKSTART_FLAGS=--short: four steps)
	$(VENV)/bin/python -m finetune quickstart $(QUICKSTART_FLAGS)

test: install-dev model tokenizers ## run all tests but the slow tiers below (JOBS=2 at a time)
	$(PYTEST) $(PARALLEL)

test-unit: install-dev model tokenizers ## run the tests that start no process
	$(PYTEST) -n $(JOBS) tests/unit

test-faults: install-dev model tokenizers ## run whole matrices and inject faults into real runs (SHARE=K/N: one share of N, K from 0)
	$(PYTEST) -m slow --share $(SHARE) $(PARALLEL)
	$(PYTEST) tests/distributed tests/hosts tests/integration -m faults --share $(SHARE)

test-hosts: install-dev model tokenizers ## run on several real hosts over ssh, as root (SHARE=K/N)
	$(PYTEST) tests/hosts -m "hosts and not faults" --share $(SHARE)

test-browser: install-dev model ## open the pages in a real Chromium
	$(PYTEST) tests/browser -m browser

test-gpu: install-dev model tokenizers ## run what needs a GPU
	$(PYTEST) tests/gpu -m gpu

test-all: install-dev model tokenizers ## run every test, slow tiers included
	$(PYTEST) -m ""

lint: install-dev ## check style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: install-dev ## fix style where a tool can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

install: prerequisites $(READY) ## install what running needs into .venv

install-dev: install $(READY_DEV) ## install what tests, checks and documentation need, too

model: install $(MODEL)/model.safetensors ## obtain the small model of the quickstart and the tests

tokenizers: install $(TOKENIZERS)/.ready ## obtain the tokenizers of the tests

# `finetune` was the name of this distribution before 0.2; another project's package on PyPI has it too.
$(READY): requirements.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -r requirements.txt
	$(PIP) uninstall --yes -qq finetune
	$(PIP) install --no-deps --no-build-isolation --editable .
	touch $(READY)

$(READY_DEV): requirements-dev.txt $(READY)
	$(PIP) install -r requirements-dev.txt
	touch $(READY_DEV)

$(MODEL)/model.safetensors: | install
	$(VENV)/bin/python -m finetune quickstart --only_model

$(TOKENIZERS)/.ready: tests/make_tokenizers.py | install
	$(VENV)/bin/python tests/make_tokenizers.py $(TOKENIZERS)

prerequisites:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed, found $$($(PYTHON) --version)" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: this Python makes no virtual environments: apt-get install python3-venv" >&2; exit 2; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || \
	  { echo "error: DeepSpeed compiles its operators with a C++ compiler: apt-get install g++" >&2; exit 2; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' || \
	  { echo "error: the headers of this Python are missing: apt-get install python3-dev" >&2; exit 2; }

.PHONY: docs
docs: install-dev ## build the documentation into site/
	$(VENV)/bin/python docs/generate_flags.py
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict
