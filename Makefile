# What a developer runs. Needs python3 >= 3.10 with venv, a C++17 compiler and make; the rest comes from constraints.txt.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --no-input
STAMP  := $(VENV)/.setup-stamp

# ccache, where it is installed: paths relative to the folder that holds the clones, so that a second clone hits.
export CCACHE_BASEDIR  ?= $(abspath $(CURDIR)/..)
export CCACHE_NOHASHDIR ?= 1

# What an installed tree depends on. Files under python/ are used where they lie (editable install).
SOURCES := pyproject.toml constraints.txt CMakeLists.txt \
           $(shell find src vendor -type f ! -path '*/__pycache__/*')

# The build's own tools, in the environment rather than in pip's throw-away one: their paths stay the same, so that a
# second build compiles only what changed. Their versions are in constraints.txt.
BUILD_TOOLS := pip scikit-build-core pybind11 cmake ninja

.PHONY: help setup demo test sanitize lint bench clean

help:
	@echo 'make setup   create $(VENV) and build fedbpt into it (again: only what changed)'
	@echo 'make demo    tune a small model over three devices on this machine (DEMO_ARGS="--help" for options)'
	@echo 'make test    run every test (TEST_ARGS="tests/unit -k search" for some)'
	@echo 'make sanitize   the native tests under AddressSanitizer and UndefinedBehaviorSanitizer'
	@echo 'make lint    ruff and mypy'
	@echo 'make bench   list the benchmarks; BENCH=name runs one, BENCH=all every one'
	@echo 'make clean   remove what was built; models, data and runs stay'

setup: $(STAMP)
	@:

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "fedbpt needs Python 3.10 or newer as $(PYTHON); another one: make setup PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) has no venv with pip; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(STAMP): $(SOURCES) | $(BIN)/python
	@for compiler in "$${CXX:-c++}" g++ clang++; do command -v $$compiler >/dev/null 2>&1 && exit 0; done; \
	  echo "fedbpt needs a C++17 compiler; on Debian and Ubuntu: apt-get install g++" >&2; exit 1
	@$(BIN)/python -c 'import os, sys, sysconfig; sys.exit(not os.path.isfile(sysconfig.get_path("include") + "/Python.h"))' || \
	  { echo "$(PYTHON) has no C headers; on Debian and Ubuntu: apt-get install python3-dev" >&2; exit 1; }
	$(PIP) install --quiet --constraint constraints.txt $(BUILD_TOOLS)
	@echo 'Installing fedbpt; the first build compiles llama.cpp and takes some minutes'
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

demo: setup
	$(BIN)/fedbpt demo $(DEMO_ARGS)

test: setup
	$(BIN)/python -m pytest $(TEST_ARGS)

# A build of its own: pip puts the package where no editable install comes before it, see run.sh.
SANITIZED := build/sanitize

sanitize: setup
	@echo 'Building fedbpt and llama.cpp with sanitizers; the first time takes half an hour of one core'
	$(PIP) install --quiet --no-deps --no-build-isolation --upgrade --target $(SANITIZED)/site \
	  --config-settings build-dir=$(SANITIZED)/build --config-settings cmake.build-type=RelWithDebInfo \
	  --config-settings cmake.define.FEDBPT_SANITIZE=ON .
	tests/native/sanitize/run.sh $(BIN)/python $(SANITIZED)/site \
	  tests/native --deselect tests/native/test_leaks.py --timeout 1200 $(TEST_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

BENCHMARKS := $(sort $(wildcard benchmarks/bench_*.py))

bench: setup
ifeq ($(BENCH),)
	@for file in $(BENCHMARKS); do printf '%-24s ' "$$(basename $$file .py)"; \
	  $(BIN)/python -c 'import ast, sys; print(ast.get_docstring(ast.parse(open(sys.argv[1]).read())).splitlines()[0])' $$file; done
	@echo 'make bench BENCH=name runs one, BENCH=all every one'
else ifeq ($(BENCH),all)
	@set -e; for file in $(BENCHMARKS); do echo "== $$file"; $(BIN)/python $$file $(BENCH_ARGS); done
else
	$(BIN)/python benchmarks/$(basename $(BENCH)).py $(BENCH_ARGS)
endif

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find python tests benchmarks vendor -name __pycache__ -type d -prune -exec rm -rf {} +
