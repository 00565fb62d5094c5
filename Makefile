# Every target sets itself up: a virtual environment in .venv, with the versions of constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# vLLM brings a torch and a transformers of its own, so its tests have an environment of their own.
VLLM := .venv-vllm
VLLM_READY := $(VLLM)/.ready
VLLM_TESTS := tests/contracts/test_vllm_engine.py tests/integration/test_vllm_plugin.py \
	tests/contracts/test_server_engine.py tests/integration/test_server.py

# Two OpenMP threads that spin against each other make torch ten times slower when anything else runs.
export OMP_WAIT_POLICY := PASSIVE
export HF_HUB_OFFLINE := 1

.PHONY: demo test test-main test-vllm test-frameworks check format bench clean

demo: $(READY)
	$(BIN)/colqwen3 demo --out demo-output

test: test-main test-vllm test-frameworks

test-main: $(READY)
	$(BIN)/python -m pytest

test-vllm: $(VLLM_READY) $(READY)
	$(VLLM)/bin/python -m pytest $(VLLM_TESTS)
	VLLM_PYTHON=$(abspath $(VLLM))/bin/python $(BIN)/python -m pytest tests/integration/test_notebooks.py -k 4_serving

# The newest frameworks are those of constraints.txt; here are the oldest that pyproject.toml allows.
test-frameworks: $(READY)
	$(BIN)/python scripts/test_frameworks.py langchain-oldest llama-index-oldest

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python benchmarks/maxsim.py
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/rerank.py

# torch first and alone: where a CPU build lies at hand it is taken, and what comes after is content with it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[all,test]'
	touch $(READY)

$(VLLM_READY): pyproject.toml tests/vllm/build.sh tests/vllm/constraints.txt tests/vllm/torchvision_operators.py
	sh tests/vllm/build.sh $(PYTHON) $(VLLM)
	touch $(VLLM_READY)

clean:
	rm -rf $(VENV) $(VLLM) build dist demo-output src/*.egg-info
