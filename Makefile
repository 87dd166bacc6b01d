# Each target makes .venv and installs what it needs, then says what it does. PYTHON picks the interpreter.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint types bench clean

demo: .venv/installed  ## train, generate in ten rows, score and report
	$(BIN)/orderlab reproduce --scale demo

test: .venv/installed lint  ## lint, types, tests
	$(BIN)/pytest -n 2

lint: .venv/installed
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/pyrefly check

bench: .venv/installed  ## the KV-cache step against its floor (GPT-B, needs about 6 GiB)
	$(BIN)/orderlab bench sample

.venv/installed: pyproject.toml constraints.txt
	@echo "making .venv and installing orderlab into it (about a minute)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv
