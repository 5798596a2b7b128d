# blockrepl. `make` lists the targets.

PYTHON := .venv/bin/python
ROWS ?=
SECONDS ?= 600
N ?= 1000
ROUNDS ?= 200

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench soak sim slow kills fuzz clean

help: ## list the targets
	@echo "usage: make TARGET"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 10

setup: ## install what is missing: Debian packages (as root) and .venv
	@scripts/setup.sh

demo: setup ## a guest loses its data and gets it back from an instant of its history (< 5 minutes)
	@$(PYTHON) scripts/demo.py

test: setup ## the whole test suite, on up to four cores; what failed leaves its files
	@base=$$(mktemp -d /tmp/blockrepl-XXXXXX) && $(PYTHON) -m pytest \
	  --numprocesses auto --maxprocesses 4 --dist loadfile --basetemp "$$base" && rm -rf "$$base"

check: setup ## formatting, lint, types (mypy strict) and import contracts
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m mypy
	@.venv/bin/lint-imports --no-logo

bench: setup ## measure against the peers; ROWS="name name" runs some; writes build/bench.json
	@$(PYTHON) scripts/bench.py $(ROWS)

soak: setup ## the point-in-time oracle for SECONDS (default 600); every power loss, every failed call
	@BLOCKREPL_SOAK_SECONDS=$(SECONDS) $(PYTHON) -m pytest -m soak --timeout=0

fuzz: setup ## every parser of foreign bytes, coverage-guided, for SECONDS in all (default 600)
	@$(PYTHON) -m pip install --quiet $$($(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["fuzz"])')
	@nice $(PYTHON) tests/fuzz.py $(SECONDS)

slow: setup ## a link at a tenth of what the guest writes, for SECONDS; its points and latencies
	@BLOCKREPL_SLOW_SECONDS=$(SECONDS) $(PYTHON) -m pytest -m soak --timeout=0 -s -k tenth_of_the_load

kills: setup ## kill -9 server, agent and receiver in random order for ROUNDS rounds (default 200)
	@BLOCKREPL_KILL_ROUNDS=$(ROUNDS) $(PYTHON) -m pytest -m soak --timeout=0 -s -k rounds_of_kills

sim: setup ## the simulation with N seeds (default 1000), faults decided by each seed
	@$(PYTHON) scripts/simulate.py --count $(N)

clean: ## remove what was built (.venv stays)
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find blockrepl plugins scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
	@find blockrepl -name '*.so' -delete
	@rm -f .venv/.blockrepl-stamp
