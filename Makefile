# make demo: install and show the second look. make test: the suite. make check: all that CI runs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.sdrpn-installed

.PHONY: demo test check lint types tiny

demo: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python -m sdrpn_eval.demo.run --out out/demo

test: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

check: lint types test

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/pyright

# Trains the embedded model, its RPN and the benchmark anew, into out/tiny.
tiny: $(INSTALLED)
	$(BIN)/python -m sdrpn_eval.demo.build --out out/tiny

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "sdrpn needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e ".[test]"
	touch $@
