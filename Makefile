# Every target sets itself up: a virtual environment in .venv, with the versions of constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Two OpenMP threads that spin against each other make torch ten times slower when anything else runs.
export OMP_WAIT_POLICY := PASSIVE
export HF_HUB_OFFLINE := 1

.PHONY: demo test check format bench clean

demo: $(READY)
	$(BIN)/colqwen3 demo --out demo-output

test: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python benchmarks/maxsim.py

# torch first and alone: where a CPU build lies at hand it is taken, and what comes after is content with it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[all,test]'
	touch $(READY)

clean:
	rm -rf $(VENV) build dist demo-output src/*.egg-info
