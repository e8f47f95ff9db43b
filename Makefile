# Needs Python 3.11 to 3.13 with pip, and make. `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Named after the content of what decides the environment: a fresh checkout or a touched file installs nothing again.
STAMP := $(VENV)/installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)

# What `make ui` serves: the place where runs are recorded unless STEADYMOE_HOME says otherwise.
STEADYMOE_HOME ?= $(CURDIR)
UI_PORT ?= 5000

.PHONY: help install train test test-slow check ui clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## /  make \1: /p' $(firstword $(MAKEFILE_LIST))

install: $(STAMP)  ## make .venv and install everything there by exact versions; costs nothing the second time

# One resolver run for everything, torch too: pip's own settings (index, wheels on disk) decide which build of it.
$(STAMP):
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v[:2] <= (3, 13) else "steadymoe needs Python 3.11 to 3.13, but $(PYTHON) is %d.%d; name another: make install PYTHON=python3.12" % v[:2])'
	@test -x $(BIN)/python || { echo "Making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing into $(VENV) (about two minutes; log in $(VENV)/install.log)"
	@set -o pipefail; $(BIN)/python -m pip install --disable-pip-version-check --no-input -e '.[dev]' -c constraints.txt 2>&1 \
	  | tee $(VENV)/install.log \
	  | while IFS= read -r line; do case "$$line" in \
	      *Downloading*[0-9][0-9]" MB"*|*Downloading*[0-9][0-9].[0-9]" MB"*) \
	        name="$${line##*Downloading }"; name="$${name%%-py3*}"; echo "  downloading $${name%%-cp*} ($${line##*\(}" ;; \
	      "Installing collected"*) echo "  unpacking" ;; \
	    esac; done \
	  || { tail -n 20 $(VENV)/install.log; echo "The installation failed; the whole log is $(VENV)/install.log"; exit 1; }
	@rm -f $(VENV)/installed-*
	@touch $@
	@echo "Installed; the command is $(BIN)/steadymoe"

train: install  ## install if needed, then train the preset tiny
	@$(BIN)/steadymoe train

test: install  ## install if needed, then everything that a newcomer should run (some eight minutes on 2 cores)
	@$(BIN)/python -m pytest -m "not slow"

test-slow: install  ## the long tests: whole runs, kills, outages, clusters, the browser (some forty minutes)
	@status=0; $(BIN)/python -m pytest -m slow --timeout 1200 || status=$$?; \
	if [ $$status -eq 5 ]; then echo "There is no slow test yet."; else exit $$status; fi

check: install  ## ruff, mypy and the import contracts
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

ui: install  ## the MLflow UI of all runs, on this machine only
	@STEADYMOE_HOME='$(STEADYMOE_HOME)' $(BIN)/python -m infra.tracking_server --port $(UI_PORT)

clean:  ## remove caches and builds; runs, corpora and .venv stay
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find moe pipelines tuning infra tests -name __pycache__ -type d -prune -exec rm -rf {} +
