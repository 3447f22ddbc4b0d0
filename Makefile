# Everything here sets itself up in a virtual environment of its own; it needs Python >= 3.11 and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test check coverage soak bench format clean

help:
	@echo "make demo      five emulated gateways, one killed and one slowed under load"
	@echo "make test      the tests                      make check   types, lint, import rules"
	@echo "make coverage  the tests, with the coverage figures this project holds itself to"
	@echo "make soak      the long tests                 make bench   the measurements"

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "pathlb needs Python >= 3.11; run: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable . --group dev
	@touch $@

demo: $(READY)
	$(BIN)/pathlb demo

test: $(READY)
	$(BIN)/python -m pytest -n 4 -m "not soak"

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

coverage: $(READY)
	$(BIN)/python -m pytest -n auto -m "not soak" --cov --cov-report=
	$(BIN)/coverage report --include='pathlb/core/*' --fail-under=100
	$(BIN)/coverage report --omit='pathlb/core/*' --fail-under=95

soak: $(READY)
	$(BIN)/python -m pytest -m soak --timeout=1800

bench: $(READY)
	$(BIN)/python -m benchmarks.throughput
	$(BIN)/python -m benchmarks.in_flight
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.faults
	$(BIN)/python -m benchmarks.classification
	$(BIN)/python -m benchmarks.jsonrpc
	$(BIN)/python -m benchmarks.gateway
	$(BIN)/python -m benchmarks.gateway_faults
	$(BIN)/python -m benchmarks.gateway_memory
	$(BIN)/python -m benchmarks.frontend

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-* .coverage .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
