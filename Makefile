# Two commands do all set-up: `make demo` and `make test`. Each works from a bare checkout with only
# Python 3.11+ and pip, and a second call reuses what the first one made.

PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
# peers_bergson.py runs inside the environment that peers.py makes for it.
BENCHMARKS := $(filter-out benchmarks/_% benchmarks/peers_bergson.py,$(wildcard benchmarks/*.py))
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# One thread per worker: more would fight over the cores, and change the last bits of a sum.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

.PHONY: help demo test test-all bench docs pages lint types clean

help:
	@echo "make demo      the main job on a real model and real tasks, under 12 minutes on 2 cores"
	@echo "make test      the test suite, about 20 minutes on 2 cores"
	@echo "make test-all  the slow tests too: the real model, long random kills"
	@echo "make bench     every benchmark; BENCH_FLAGS=--quick for a short look"
	@echo "make docs      the site, into site/; it needs no network to be read"
	@echo "make pages     the pages of docs/ that are made from the code"
	@echo "make lint      ruff and codespell"
	@echo "make types     pyright, strict"
	@echo "make clean     remove the environment and caches; runs/ stays"
	@echo "PYTHON=/path/to/python3.12 chooses the interpreter, WORKERS=8 the test processes"

demo: $(VENV)/.stamp-run
	$(BIN)/selectune demo

test: $(VENV)/.stamp-dev
	$(TEST)

test-all: $(VENV)/.stamp-dev
	$(TEST) -m ""

bench: $(VENV)/.stamp-dev
	@set -e; for script in $(BENCHMARKS); do \
	  echo "== $$script $(BENCH_FLAGS)"; $(BIN)/python $$script $(BENCH_FLAGS); \
	done

# The notice is that mkdocs-material ends in May 2027: docs/decisions.md.
docs: $(VENV)/.stamp-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

pages: $(VENV)/.stamp-dev
	$(BIN)/python -m selectune.cli.pages

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: $(VENV)/.stamp-dev
	$(BIN)/pyright

clean:
	rm -rf $(VENV) build dist site src/*.egg-info .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is older than what it depends on as soon as a dependency changes: then pip runs again.
$(VENV)/.stamp-run: $(VENV)/.stamp-venv pyproject.toml constraints.txt
	@echo "installing what constraints.txt pins into $(VENV); a few minutes the first time"
	@$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-venv pyproject.toml constraints.txt
	@echo "installing what constraints.txt pins into $(VENV), tools too; minutes the first time"
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.stamp-run

# The pages are read, not imported: what builds them needs nothing of selectune.
$(VENV)/.stamp-docs: $(VENV)/.stamp-venv pyproject.toml constraints.txt
	@$(PIP_INSTALL) "$$(sed -n 's/^docs = \["\(.*\)"\]/\1/p' pyproject.toml)"
	@touch $@

# Not $(BIN)/python: that is a link into the system, and has the system's date.
$(VENV)/.stamp-venv:
	@set -e; \
	for python in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "making $(VENV) with $$("$$python" --version)"; \
	    "$$python" -m venv --clear $(VENV) || { \
	      echo "$$python cannot make a virtual environment; on Debian and Ubuntu:" >&2; \
	      echo "  apt-get install python3-venv" >&2; exit 1; }; \
	    touch $@; exit 0; \
	  fi; \
	done; \
	echo "selectune needs Python 3.11 or newer; found: $$(python3 --version 2>&1)" >&2; \
	echo "install one, or name it: make test PYTHON=/path/to/python3.12" >&2; \
	exit 1
