# The study's commands. `make` alone prints them.
# All paths are relative, so the clone may live in a folder with spaces in its name.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-builtin-rules
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?= python3
JOBS ?= 2

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

# One thread a process: numbers do not depend on the machine's load, and two processes share two cores.
export OMP_NUM_THREADS := 1
export MKL_NUM_THREADS := 1
export PYTHONUNBUFFERED := 1
# Silences what a kernel's debugger says about frozen modules at every start.
export PYDEVD_DISABLE_FILE_VALIDATION := 1

NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))
# Not _build/executed: there `leaklib run` puts the runs of people, with any parameters.
EXECUTED := $(NOTEBOOKS:notebooks/%=_build/smoke/%)
# What a notebook's output depends on besides itself: the library, the embedded pictures, the recorded runs.
LIBRARY := $(sort $(shell find leaklib -name '*.py'))
DATA := $(sort $(shell find data -type f -not -path 'data/sets/*' -not -name '* *'))

# The book is built from a copy of its sources: nothing else that lies about can get into it.
define stage
	@rm -rf _build/stage && mkdir -p _build/stage/data
	@cp -R _config.yml _toc.yml book notebooks _build/stage/
	@if [ -d data/results ]; then cp -R data/results _build/stage/data/; fi
endef
# Every warning is an error; warnings go to stderr, stdout is chatter.
BUILD_BOOK := $(VENV)/bin/jupyter-book build _build/stage
STRICT := --all -n -W --keep-going -q >/dev/null

.PHONY: help book executed html test lint unit notebooks regression book-strict bench picture env clean

help: ## print this list
	@echo "Commands (VENV=$(VENV), JOBS=$(JOBS)):"
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' \
	  | while IFS=$$'\t' read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

# --- environment --------------------------------------------------------------------------------

env: $(STAMP) ## the environment only, in .venv

$(STAMP): requirements.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "expected Python 3.11 or newer, found no '$(PYTHON)'; install one, or say: make PYTHON=python3.12 book" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"expected Python 3.11 or newer, got {v[0]}.{v[1]} from $(PYTHON); say for example: make PYTHON=python3.12 book")'
	@test -x $(PY) && $(PY) -m pip --version >/dev/null 2>&1 || { echo "env   making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@echo "env   installing requirements.txt into $(VENV) (a few minutes and 7 GB the first time)"
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

# --- the book -----------------------------------------------------------------------------------

book: $(STAMP) ## run every notebook again, then build the HTML
	@$(MAKE) --no-print-directory -j$(JOBS) -k executed || { \
	  echo "make book: a notebook failed, see above. The finished ones are kept: 'make book' goes on from here." >&2; exit 1; }
	$(stage)
	@$(if $(EXECUTED),cp $(EXECUTED) _build/stage/notebooks/)
	@echo "html  building"
	@$(BUILD_BOOK) --path-output . $(STRICT)
	@echo "book  open _build/html/index.html"

executed: $(EXECUTED)

_build/smoke/%.ipynb: notebooks/%.ipynb $(LIBRARY) $(DATA) $(STAMP)
	@mkdir -p $(@D)
	@echo "run   $<"; start=$$SECONDS; \
	if $(VENV)/bin/leaklib run $< $@ --quiet >$(@:.ipynb=.log) 2>&1; then \
	  touch $@; echo "done  $<  $$((SECONDS - start)) s"; \
	else \
	  tail -n 30 $(@:.ipynb=.log) >&2; echo "FAIL  $<  $$((SECONDS - start)) s; whole log: $(@:.ipynb=.log)" >&2; exit 1; \
	fi

html: $(STAMP) ## the HTML from the notebooks as committed, in seconds
	$(stage)
	@echo "html  building"
	@$(BUILD_BOOK) --path-output . $(STRICT)
	@echo "html  open _build/html/index.html"

# --- tests --------------------------------------------------------------------------------------

STAGES := lint unit notebooks regression book-strict

test: $(STAMP) ## everything that is checked, in order: lint, unit, notebooks, regression, book-strict
	@for stage in $(STAGES); do \
	  echo "test  == $$stage"; start=$$SECONDS; \
	  $(MAKE) --no-print-directory $$stage || { echo "test  == $$stage FAILED after $$((SECONDS - start)) s; alone: make $$stage" >&2; exit 1; }; \
	  echo "test  == $$stage passed in $$((SECONDS - start)) s"; \
	done
	@echo "test  everything passed"

lint: $(STAMP) ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m mypy

unit: $(STAMP) ## unit tests
	$(PY) -m pytest -q tests -n $(JOBS) --ignore=tests/regression --ignore=tests/benchmarks

# loadscope keeps a notebook's cells on one worker.
notebooks: $(STAMP) ## the committed notebooks executed again and compared with their stored outputs
	$(if $(NOTEBOOKS),$(PY) -m pytest -q --nbval --nbval-current-env notebooks -n $(JOBS) --dist loadscope,@echo "no notebooks")

regression: $(STAMP) ## tables and figure data of that run against data/reference
	$(if $(wildcard tests/regression/test_*.py),$(PY) -m pytest -q tests/regression,@echo "no regression tests")

book-strict: $(STAMP) ## the book from the committed notebooks, every warning an error
	$(stage)
	@echo "html  building"
	@$(BUILD_BOOK) --path-output _build/strict $(STRICT)
	BOOK_HTML=_build/strict/_build/html $(PY) -m pytest -q tests/test_book_pages.py

bench: $(STAMP) ## speed against naive references: attacks, recursion, hybrid, ghost gradients, influence (prints ratios, checks nothing)
	$(PY) tests/benchmarks/attack_throughput.py
	$(PY) tests/benchmarks/recursion_cost.py
	$(PY) tests/benchmarks/hybrid_cost.py
	$(PY) tests/benchmarks/ghost_cost.py
	$(PY) tests/benchmarks/influence_cost.py

# --- housekeeping -------------------------------------------------------------------------------

picture: $(STAMP) ## renew the README's picture from the first notebook's stored output
	$(PY) book/_ext/notebook_pictures.py

clean: ## remove everything built (keeps .venv and data)
	rm -rf _build .pytest_cache .mypy_cache .ruff_cache .hypothesis
