# make demo: what ten systems draw, in seconds; then three of three eras are trained (under 12 minutes
#     on two cores)
# make check: lint, types and a fast part of the tests (under a minute on two cores)
# make test: everything that CI checks
# make notebooks: open the notebooks in JupyterLab
# make build-notebooks: run the notebooks' sources and write them again (see notebooks/build.py)
# make pretrained: train the runs that come with the package again

PYTHON ?= python3
BIN := .venv/bin
# One process for each core, and one thread in each: twice as many would only wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal
FAST := tests/test_*.py tests/nn tests/data tests/text

.PHONY: demo check test lint install pretrained notebooks build-notebooks

demo: .venv/ready
	$(BIN)/python -m lineage.comparison.gallery demo/pretrained.html
	@echo "Open it now; three systems are trained meanwhile"
	$(BIN)/lineage compare retrieval gan_int_cls ddpm --minutes 5 --out demo
	@echo "Open demo/report.html"

check: .venv/ready-dev lint
	$(PYTEST) -m "not slow" $(FAST)

test: .venv/ready-dev lint
	$(PYTEST)

pretrained: .venv/ready
	$(BIN)/python benchmarks/pretrained.py

notebooks: .venv/ready-notebooks
	$(BIN)/jupyter lab notebooks

build-notebooks: .venv/ready-dev
	$(BIN)/python notebooks/build.py

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

.venv/ready-notebooks: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[notebooks]"
	touch $@
