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
# second build compiles only what changed. setuptools builds rouge-score, which is published without a wheel. Their
# versions are in constraints.txt.
BUILD_TOOLS := pip scikit-build-core pybind11 cmake ninja setuptools

.PHONY: help setup demo docs screenshots test test-fast test-flower faults sanitize wheel wheel-aarch64 test-wheel test-aarch64 lint bench clean

help:
	@echo 'make setup   create $(VENV) and build fedbpt into it (again: only what changed)'
	@echo 'make demo    tune a small model over three devices on this machine (DEMO_ARGS="--help" for options)'
	@echo 'make test    run every test (TEST_ARGS="tests/unit -k search" for some)'
	@echo 'make test-fast   the tests of every day: tests/unit and tests/contract, in parallel, without the C++ and without models'
	@echo 'make test-flower   the tests on Flower, in an environment of its own (Python 3.11 or newer)'
	@echo 'make docs    the documentation as web pages in build/site'
	@echo 'make faults  all faults that a federation must survive, for an hour or so; make test tries a few of each'
	@echo 'make sanitize   the native tests under AddressSanitizer and UndefinedBehaviorSanitizer'
	@echo 'make wheel   the wheels to ship in dist/, for any x86-64 CPU; make wheel-aarch64: for any 64-bit ARM CPU (PYTHONS="3.11" for some)'
	@echo 'make test-wheel   the native tests on the x86-64 wheel; make test-aarch64: on emulated boards, and a federation with them'
	@echo 'make lint    ruff, clang-format and mypy'
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
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation \
	  --config-settings cmake.define.FEDBPT_TRACE=ON --editable '.[dev]'
	@touch $@

demo: setup
	$(BIN)/fedbpt demo $(DEMO_ARGS)

# The pictures in docs/img of a demo's dashboard; SCREENSHOT_ARGS="--store runs/demo-0/runs.db" for a run that there is.
screenshots: setup
	$(BIN)/python tools/screenshots.py $(SCREENSHOT_ARGS)

# The documentation as pages in build/site, which fetch nothing from elsewhere; `python -m http.server` there lets them search.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# File by file, in the order in which they are collected: tests/conftest.py puts slow ones first. A process more than there are
# cores, since many tests wait; at most four, since each may take 2 GB.
PROCESSES   := $(shell cores=$$(getconf _NPROCESSORS_ONLN); echo $$((cores < 4 ? cores + 1 : 4)))
IN_PARALLEL := -n $(PROCESSES) --dist loadfile --no-loadscope-reorder

test: setup
	$(BIN)/python -m pytest $(IN_PARALLEL) $(TEST_ARGS)

test-fast: setup
	$(BIN)/python -m pytest tests/contract tests/unit -q -m "not slow" $(IN_PARALLEL) $(TEST_ARGS)

# Flower's dependencies clash with ours in constraints.txt: an environment of its own, which takes the rest from $(VENV).
FLOWER       := build/flower
FLOWER_STAMP := $(FLOWER)/.setup-stamp
FLOWER_RUNS  := $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))'

$(FLOWER_STAMP): tests/flower/constraints.txt | setup
	@echo 'Installing Flower and Ray; they take some 500 MB'
	$(PYTHON) -m venv $(FLOWER)
	$(FLOWER)/bin/python -m pip --disable-pip-version-check --no-input install --quiet \
	  --constraint tests/flower/constraints.txt 'flwr[simulation]'
	$(FLOWER)/bin/python -c 'import sysconfig, pathlib, sys; \
	  pathlib.Path(sysconfig.get_path("purelib"), "fedbpt.pth").write_text(f"import site; site.addsitedir({sys.argv[1]!r})")' \
	  "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	@touch $@

test-flower: setup
	@if $(FLOWER_RUNS); then $(MAKE) --no-print-directory $(FLOWER_STAMP) && \
	  FLWR_TELEMETRY_ENABLED=0 $(FLOWER)/bin/python -m pytest $(or $(TEST_ARGS),tests/flower); \
	  else echo 'Flower needs Python 3.11 or newer: its tests are left out'; fi

faults: setup
	FEDBPT_FAULTS=1 $(BIN)/python -m pytest tests/faults $(TEST_ARGS)

# A build of its own: pip puts the package where no editable install comes before it, see run.sh.
SANITIZED := build/sanitize

sanitize: setup
	@echo 'Building fedbpt and llama.cpp with sanitizers; the first time takes half an hour of one core'
	$(PIP) install --quiet --no-deps --no-build-isolation --upgrade --target $(SANITIZED)/site \
	  --config-settings build-dir=$(SANITIZED)/build --config-settings cmake.build-type=RelWithDebInfo \
	  --config-settings cmake.define.FEDBPT_SANITIZE=ON --config-settings cmake.define.FEDBPT_TRACE=ON .
	tests/native/sanitize/run.sh $(BIN)/python $(SANITIZED)/site \
	  tests/native --deselect tests/native/test_leaks.py --timeout 1200 $(TEST_ARGS)

# The wheels to ship, see docs/wheels.md.
PYTHONS     ?=
WHEEL_TOOLS := $(VENV)/.wheel-stamp

$(WHEEL_TOOLS): pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Fetching what builds wheels; the compiler has 100 MB'
	$(PIP) install --quiet --constraint constraints.txt cmake ninja pyelftools ziglang
	@touch $@

wheel: $(WHEEL_TOOLS)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/build_wheels.py x86_64 $(if $(PYTHONS),--pythons $(PYTHONS))

wheel-aarch64: $(WHEEL_TOOLS)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/build_wheels.py aarch64 $(if $(PYTHONS),--pythons $(PYTHONS))

# What is tested is the wheel and not the editable install: that hooks itself in by a .pth file, which the interpreter behind
# the environment does not read.
test-wheel: setup $(WHEEL_TOOLS)
	$(MAKE) --no-print-directory wheel PYTHONS="$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
	$(PIP) install --quiet --no-deps --upgrade --target build/wheel-site \
	  dist/fedbpt-*-$$($(BIN)/python -c 'import sys; print("cp%d%d" % sys.version_info[:2])')-*_x86_64.whl
	PYTHONPATH="build/wheel-site:$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')" \
	  "$$($(BIN)/python -c 'import os, sys; print(os.path.realpath(sys.executable))')" -m pytest tests/native $(TEST_ARGS)
	$(BIN)/python tools/emulated_boards.py --x86 build/wheel-site
	FEDBPT_X86_BOARDS=$(BOARDS) $(BIN)/python -m pytest tests/emulated/test_x86.py

# The wheel for 64-bit ARM in emulated boards, see docs/wheels.md for what is left out and why.
BOARDS := build/boards
# A test takes some 4 seconds of a core there: those that compare scores with numpy, for every kind of weights and model.
EMULATED_TESTS := tests/native/test_scoring_reference.py tests/native/test_label_head.py \
                  -k "narrow_weights or many_candidates or label"

test-aarch64: setup $(WHEEL_TOOLS)
	$(MAKE) --no-print-directory wheel-aarch64 PYTHONS="$$($(BIN)/python tools/emulated_boards.py)"
	$(BIN)/python tools/emulated_boards.py dist/fedbpt-*_aarch64.whl
	for cpu in cortex-a76 cortex-a57; do \
	  timeout 1500 nice $(BOARDS)/$$cpu/python -m pytest -p no:cacheprovider --timeout 600 $(EMULATED_TESTS) || exit 1; done
	FEDBPT_BOARDS=$(BOARDS) $(BIN)/python -m pytest tests/emulated

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror src/fedbpt_native/*.cpp src/fedbpt_native/*.h
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
	find python tests tools benchmarks vendor -name __pycache__ -type d -prune -exec rm -rf {} +
