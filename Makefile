# make demo: install and show the second look. make app: the same in the browser.
# make test: the suite; make test-fast: its fast part.
# make check: all that CI runs.
# make fresh SEED=7: all proposers on scenes drawn from that seed.
# make check LOCK=: the same with the newest libraries. make check-oldest: the suite on the oldest
# supported libraries. make dist: wheel and sdist.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.sdrpn-installed
# The versions that environments get; empty: the newest ones.
LOCK ?= constraints-lock.txt
APP := .venv-app
APP_INSTALLED := $(APP)/.sdrpn-installed
OLDEST := .venv-oldest
OLDEST_INSTALLED := $(OLDEST)/.sdrpn-installed

.PHONY: demo app install lock test test-fast check check-oldest contracts lint mutate types dist site trio tiny fresh

demo: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python -m sdrpn_eval.demo --out out/demo

# An environment of its own: Gradio needs an older Pillow than the tests.
app: $(APP_INSTALLED)
	$(APP)/bin/sdrpn app

install: $(INSTALLED)

test: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --dist worksteal

# Without the tests marked slow: under 2 minutes on 2 cores.
test-fast: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

check: lint types contracts test

# Not part of check: its environment is one of its own, with another torch of several GB.
check-oldest: $(OLDEST_INSTALLED)
	HF_HUB_OFFLINE=1 $(OLDEST)/bin/python -m pytest -n auto --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -p no:xdist tools/lint/*.py

types: $(INSTALLED)
	$(BIN)/pyright

# Who may import whom, in pyproject.toml.
contracts: $(INSTALLED)
	$(BIN)/lint-imports

# Mutation tests of the modules that decide numbers: hours, so not part of check. Survivors:
# mutmut results. A part: make mutate MUTANTS="sdrpn.roi.*".
mutate: $(INSTALLED)
	$(BIN)/pip install -q -e ".[mutate]"
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/mutmut run $(MUTANTS)

# dist/: the sdist, and the wheel that is built from it.
dist: $(INSTALLED)
	rm -rf build dist
	$(BIN)/python -m build

# Draws scenes that nobody has seen and scores every proposer on them: make fresh SEED=7.
SEED ?= 1
fresh: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python -m tools.tiny_trio.score --scenes-seed $(SEED)

# out/site: the documentation as a site; any warning is an error.
site: $(INSTALLED)
	$(BIN)/mkdocs build

# Trains the embedded model and its RPN anew, into out/trio; tiny: the one that tests use.
trio: $(INSTALLED)
	$(BIN)/python -m tools.tiny_trio.build --out out/trio

tiny: $(INSTALLED)
	$(BIN)/python -m tools.tiny_vstar.build --out out/tiny

# The lock anew; needs uv. make lock UPGRADE=--upgrade: with the newest versions. 3.11.5: older patch
# releases of Python 3.11 are refused by a tool of the documentation.
lock:
	uv pip compile pyproject.toml --extra test --universal --python-version 3.11.5 --no-annotate \
	  --custom-compile-command "make lock" -q -o constraints-lock.txt $(UPGRADE)

$(INSTALLED): pyproject.toml $(LOCK)
	$(call install,$(VENV),test,$(if $(LOCK),-c $(LOCK)))

$(APP_INSTALLED): pyproject.toml
	$(call install,$(APP),app)

$(OLDEST_INSTALLED): pyproject.toml constraints-oldest.txt
	$(call install,$(OLDEST),test,-c constraints-oldest.txt)

# A new environment (1) with sdrpn and its extra (2), under constraints (3).
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "sdrpn needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(1)
	$(1)/bin/pip install -q -e ".[$(2)]" $(3)
	touch $@
endef
