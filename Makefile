# Rorqual's front door. `make up` talks to the bundled model; `make test` checks everything quick to check.
#   PORT=8001      where `make up` listens (127.0.0.1 only)
#   TORCH=cuda     install torch with CUDA instead of the CPU build; remembered in .venv
#   PYTHON=...     the interpreter to make .venv with (3.11 or newer)

PORT   ?= 8000
TORCH  ?= $(shell cat .venv/.torch 2>/dev/null || echo cpu)
PYTHON ?=
JOBS   ?= 2

BIN         := .venv/bin
PIP         := $(BIN)/python -m pip --disable-pip-version-check install --quiet
CONSTRAINTS := $(if $(filter cuda,$(TORCH)),,-c constraints-cpu.txt)
INSTALLED   := .venv/.installed-$(TORCH)
TESTABLE    := .venv/.testable-$(TORCH)
LINTABLE    := .venv/.lintable-$(TORCH)
# One thread a process: the tests run side by side, and a fixed count keeps floating-point results the same.
PYTEST      := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

.PHONY: help install up test test-slow sandbox-tools lint format docs bench clean

help:
	@echo "make up         talk to the bundled model in the browser (PORT=8000)"
	@echo "make test       install what tests need and run the quick suite"
	@echo "make test-slow  the slow tests: training, parity over many configurations, the page in a browser"
	@echo "                (RORQUAL_TEST_FULL=1: with as many kills as were once shown)"
	@echo "make install    only make .venv (TORCH=cuda for a GPU)"
	@echo "make sandbox-tools  install what containers and virtual machines run on (Debian, Ubuntu; root)"
	@echo "make lint       format check, lint, types      make format  apply the format"
	@echo "make docs       rewrite docs/cli.md            make bench   measure speed and memory"
	@echo "make clean      remove .venv, builds and caches"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints-cpu.txt scripts/environment.sh
	@PYTHON='$(PYTHON)' sh scripts/environment.sh .venv $(TORCH)
	@echo "Installing Rorqual into .venv"
	@$(PIP) $(CONSTRAINTS) -e '.[serve,plots]'
	@rm -f .venv/.installed-* .venv/.testable-* .venv/.lintable-*
	@touch $@

$(TESTABLE): $(INSTALLED)
	@echo "Installing what the tests need"
	@$(PIP) $(CONSTRAINTS) -e '.[test]'
	@touch $@

$(LINTABLE): $(INSTALLED)
	@$(PIP) $(CONSTRAINTS) -e '.[dev]'
	@touch $@

up: $(INSTALLED)
	@$(BIN)/python -m rorqual up --port $(PORT)

test: $(TESTABLE)
	$(PYTEST) -m 'not slow'

test-slow: $(TESTABLE)
	$(PYTEST) -m slow

sandbox-tools:
	sh scripts/sandbox_tools.sh

lint: $(LINTABLE)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(LINTABLE)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(INSTALLED)
	$(BIN)/python docs/make_cli.py

bench: $(TESTABLE)
	@for name in decode prefill serving prefix_cache index_scan index_recall matvec speculation quantised_quality exactness \
		kill_disk_cache train_speed prefill_memory minke_quality plan_bounds journal sandbox_start sandbox_density \
		sandbox_load referee_latency referee_checks; do \
		$(BIN)/python "benchmarks/$$name.py" --json --quick || exit 1; done

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
