# Each target makes a virtual environment, installs what the lock file pins, tools included, and then does what its comment says.
# PYTHON picks the interpreter (3.11 or newer), VENV the folder, LOCK the versions: requirements-lowest.lock has the oldest supported ones.
PYTHON ?= python3
VENV ?= .venv
LOCK ?= requirements.lock
# Without an NVIDIA GPU, torch's CPU build is installed: from where pip is told to look, or else from PyTorch's own index.
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH ?= $(shell sed -n 's/^torch==\([0-9.]*\).*/\1/p' $(LOCK))

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(LOCK)

.PHONY: demo test lint bench mutants lock clean

demo: $(VENV)/installed  ## train, generate in ten rows, score and report
	$(BIN)/orderlab reproduce --scale demo

test: $(VENV)/installed  ## the tests
	$(BIN)/pytest -n 2 --dist worksteal

lint: $(VENV)/installed  ## ruff, its formatter, and pyrefly
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

bench: $(VENV)/installed  ## the KV-cache step against its floor (GPT-B, needs about 6 GiB)
	$(BIN)/orderlab bench sample

mutants: $(VENV)/installed  ## break the code in one place at a time and see that a test notices
	$(BIN)/python tests/mutants.py

$(VENV)/installed: pyproject.toml $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "orderlab needs Python 3.11 or newer: make PYTHON=python3.11")'
	@echo "making $(VENV) and installing orderlab into it (about a minute)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) hatchling
	@if test "$$(uname -s)" = Linux && ! nvidia-smi >/dev/null 2>&1; then \
		$(PIP) torch==$(TORCH)+cpu 2>/dev/null || \
		$(PIP) torch==$(TORCH)+cpu --no-deps --index-url $(CPU_INDEX) --timeout 10 --retries 0 2>/dev/null || \
		echo "torch's CPU build is not to be had from $(CPU_INDEX); downloading the CUDA build, about 3 GB"; fi
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

lock:  ## resolve afresh into both lock files; TORCH=2.14.0 changes torch, which stays otherwise
	set -e; tools=$$(mktemp -d); trap 'rm -rf "$$tools"' EXIT; $(PYTHON) -m venv $$tools; $$tools/bin/pip install --quiet uv; \
	echo "torch==$(TORCH)" >$$tools/torch.txt; \
	resolve="$$tools/bin/uv pip compile --quiet --universal --python-version 3.11 --extra dev --no-annotate pyproject.toml"; \
	resolve="$$resolve --constraint $$tools/torch.txt --custom-compile-command 'make lock' --upgrade"; \
	eval $$resolve --output-file requirements.lock; \
	eval $$resolve --output-file requirements-lowest.lock --resolution lowest-direct

clean:
	rm -rf $(VENV)
