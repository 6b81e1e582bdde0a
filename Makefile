# SPDX-License-Identifier: Apache-2.0
# Every target sets up what it needs in .venv: python3 (3.11 or newer), make, git and g++ are enough to start.

PYTHON ?= python3
PYTEST_ARGS ?=
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PROJECT := $(PIP) --no-build-isolation --editable
TORCH := $(shell grep '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help demo test gpu-test lint check bundle loader wheels docker-check clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile

demo: $(VENV)/runtime.stamp ## quantise, prepack and multiply; works with and without a GPU
	$(VENV)/bin/machete-aot demo

test: $(VENV)/test.stamp ## every test that needs no GPU, some kernels compiled anew among them
	$(PY) -m pytest -m "not gpu and not slow" $(PYTEST_ARGS)

gpu-test: $(VENV)/test.stamp ## the tests that need a Hopper GPU
	$(PY) -m pytest -m gpu $(PYTEST_ARGS)

lint: $(VENV)/dev.stamp ## ruff, mypy, clang-format and licence headers, as .pre-commit-config.yaml lists them
	$(VENV)/bin/pre-commit run --all-files --show-diff-on-failure

check: lint test ## lint and test

bundle: $(VENV)/test.stamp ## compile the kernels and write the embedded bundle, its manifest and its pin
	$(PY) -m build_kernels

loader: $(VENV)/runtime.stamp ## compile csrc/loader into the package, again after a change
	$(PY) tools/build_loader.py

wheels: $(VENV)/runtime.stamp ## wheels with the loader for x86-64 and arm64, into dist
	$(PIP) ziglang
	$(PY) tools/build_loader.py --wheel dist

docker-check: ## build bundle, manifest and wheel in a container, into dist, and compare them; needs docker or buildah
	tools/docker_check.sh

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist machete_aot/native *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, found " + sys.version if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# numpy only because torch warns at import without it
$(VENV)/runtime.stamp: pyproject.toml constraints.txt | $(PY)
	$(PIP) setuptools numpy
	$(PIP) $(TORCH)
	$(PROJECT) .
	@touch $@

$(VENV)/test.stamp: $(VENV)/runtime.stamp
	$(PROJECT) '.[build,models,test]'
	$(PIP) --no-deps nvidia-cutlass
	@touch $@

$(VENV)/dev.stamp: $(VENV)/test.stamp
	$(PROJECT) '.[dev]'
	@touch $@
