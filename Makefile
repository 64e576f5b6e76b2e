# The everyday commands. Everything happens in .venv, build/ and .demo/; nothing else is touched.
#   make demo [KEEP=1]   make test [ARGS=...]   make lint   make format   make build   make clean
#   make gpu-test   make gpu-sanitize   make gpu-bench [SUITE=...]   make gpu-kit

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
BUILD := build/dev
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# torch held at the tested version.
CONSTRAINTS := -c .ci/constraints.txt
export PATH := $(BIN):$(PATH)

BUILD_FILES := CMakeLists.txt setup.py pyproject.toml $(wildcard cmake/* third_party/*.cmake)
SOURCES := $(shell find csrc include python/deltazip -name '*.so' -prune -o -name __pycache__ -prune \
             -o -type f -print)

.PHONY: help demo test test-cpp test-python build lint lint-cpp lint-python format sanitize fuzz \
  gpu-test gpu-sanitize gpu-bench gpu-kit clean

help:
	@sed -n 's/^#  *make/make/p' Makefile

# ---- Set-up, each step once

$(VENV)/.created:
	PYTHON=$(PYTHON) third_party/install_system_packages.sh
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -U pip
	touch $@

# What building outside pip's isolation needs: the build-system requirements of pyproject.toml.
$(VENV)/.build-tools: pyproject.toml | $(VENV)/.created
	$(PIP) install $$(sed -n 's/^requires = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '",')
	touch $@

$(VENV)/.system-test-packages: | $(VENV)/.created
	PYTHON=$(PYTHON) third_party/install_system_packages.sh test
	touch $@

$(BUILD)/CMakeCache.txt: $(BUILD_FILES) CMakePresets.json | $(VENV)/.build-tools $(VENV)/.system-test-packages
	cmake --preset dev -DPython_EXECUTABLE=$(BIN)/python
	touch $@

# One compilation serves the C++ tests and the installed module.
build: $(BUILD)/CMakeCache.txt
	cmake --build $(BUILD)

# Editable: Python sources are read in place, the module is copied from $(BUILD).
$(VENV)/.dev: $(SOURCES) $(BUILD_FILES) | build
	@echo "installing DeltaZip for development, torch and the linters included"
	DELTAZIP_BUILD_DIR=$(BUILD) $(PIP) install --no-build-isolation $(CONSTRAINTS) -e '.[dev]'
	rm -f $(VENV)/.demo
	touch $@

# ---- Tests

test: test-cpp test-python

test-cpp: build
	ctest --test-dir $(BUILD) --output-on-failure -j 2

test-python: build $(VENV)/.dev | test-cpp
	$(BIN)/python -m pytest $(ARGS)

# The C++ suite under ASan and UBSan, the threaded parts under TSan.
sanitize: $(VENV)/.build-tools $(VENV)/.system-test-packages
	.ci/sanitize

fuzz: $(VENV)/.build-tools
	.ci/fuzz $(SECONDS_EACH)

# ---- On a machine with a GPU. Without package registries: first `make gpu-kit` on another one

gpu-test:
	benchmarks/gpu/host.sh test

gpu-sanitize:
	benchmarks/gpu/host.sh sanitize

gpu-bench:
	benchmarks/gpu/host.sh bench $(SUITE)

gpu-kit: $(VENV)/.build-tools $(VENV)/.system-test-packages
	benchmarks/gpu/pack.sh $(ARGS)

# ---- Lint

lint: lint-cpp lint-python

lint-cpp: $(VENV)/.dev
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs clang-format --dry-run -Werror
	.ci/clang_tidy $(BUILD)

lint-python: $(VENV)/.dev
	ruff check
	ruff format --check
	mypy

format: $(VENV)/.dev
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs clang-format -i
	ruff check --fix
	ruff format

# ---- Demo

$(VENV)/.demo: $(SOURCES) $(BUILD_FILES) | $(VENV)/.created
	@echo "building and installing DeltaZip"
	DELTAZIP_CUDA=0 $(PIP) install $(CONSTRAINTS) '.[demo]'
	rm -f $(VENV)/.dev
	touch $@

demo: $(VENV)/.demo
	$(BIN)/python examples/demo/run.py $(if $(KEEP),--keep)

clean:
	rm -rf build dist .venv python/deltazip.egg-info python/deltazip/_C*.so
