# make demo: three systems of three eras draw the same captions (under 12 minutes on two cores)
# make check: lint, types and a fast part of the tests (under a minute on two cores)
# make test: everything that CI checks

PYTHON ?= python3
BIN := .venv/bin
# One process for each core, and one thread in each: twice as many would only wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8
FAST := tests/test_*.py tests/nn tests/data tests/text

.PHONY: demo check test lint install

demo: .venv/ready
	$(BIN)/lineage compare retrieval gan_int_cls ddpm --minutes 5 --out demo
	@echo "Open demo/report.html"

check: .venv/ready-dev lint
	$(PYTEST) -m "not slow" $(FAST)

test: .venv/ready-dev lint
	$(PYTEST)

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: .venv/ready

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/ready: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/ready-dev: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
