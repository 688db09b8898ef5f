# quickstart: from a fresh clone to a fine-tuned model.   test: install what is needed and run the fast tests.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
MODEL := .models/SmolLM2-135M-Instruct
TOKENIZERS := .models/tokenizers
PYTEST := $(VENV)/bin/python -m pytest
SHARE ?= 0/1
JOBS ?= 2

.PHONY: quickstart test test-faults test-hosts test-gpu test-browser test-all lint install model tokenizers prerequisites

quickstart: install
	$(VENV)/bin/python -m finetune quickstart $(QUICKSTART_FLAGS)

test: install model tokenizers
	$(PYTEST) -n $(JOBS) --dist loadfile

test-faults: install model tokenizers
	$(PYTEST) -m faults --share $(SHARE)

test-hosts: install model tokenizers
	$(PYTEST) -m "hosts and not faults"

test-gpu: install model tokenizers
	$(PYTEST) -m gpu

test-browser: install model
	$(PYTEST) -m browser

test-all: install model tokenizers
	$(PYTEST) -m ""

lint: install
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

install: prerequisites $(READY)

model: install $(MODEL)/model.safetensors

tokenizers: install $(TOKENIZERS)/.ready

$(READY): requirements.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -r requirements.txt
	$(VENV)/bin/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $(READY)

$(MODEL)/model.safetensors: | install
	$(VENV)/bin/python -m finetune quickstart --only_model

$(TOKENIZERS)/.ready: tests/make_tokenizers.py | install
	$(VENV)/bin/python tests/make_tokenizers.py $(TOKENIZERS)

prerequisites:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: Python 3.10 or newer is needed, found $$($(PYTHON) --version)" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: this Python makes no virtual environments: apt-get install python3-venv" >&2; exit 2; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || \
	  { echo "error: DeepSpeed compiles its operators with a C++ compiler: apt-get install g++" >&2; exit 2; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' || \
	  { echo "error: the headers of this Python are missing: apt-get install python3-dev" >&2; exit 2; }
