# make demo: three systems of three eras draw the same captions (about 12 minutes on two cores)
# make test: everything that CI checks

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint install

demo: .venv/ready
	$(BIN)/lineage compare retrieval gan_int_cls ddpm --minutes 5 --out demo
	@echo "Open demo/report.html"

test: .venv/ready-dev lint
	$(BIN)/python -m pytest

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
