# Every target sets itself up: a virtual environment in .venv, with the versions of constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# vLLM brings a torch and a transformers of its own, so its tests have an environment of their own; Triton comes with it.
VLLM := .venv-vllm
VLLM_READY := $(VLLM)/.ready
VLLM_TESTS := tests/contracts/test_vllm_engine.py tests/integration/test_vllm_plugin.py \
	tests/contracts/test_server_engine.py tests/integration/test_server.py \
	tests/contracts/test_fused_kernel.py

PEERS := build/peers
PEERS_READY := $(PEERS)/.ready
BENCH_CACHE := build/bench
TIMED := env -u OMP_WAIT_POLICY

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
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Every table of benchmarks/ anew, in hours; WRITE=--write puts them into their files, but for store.md, which has more
# to say than its tables. Who waits actively is measured as it would run by itself: the policy above is for tests. The
# peers stand in an environment of their own.
bench: $(READY) $(PEERS_READY)
	$(TIMED) $(PEERS)/bin/python benchmarks/encoding.py $(WRITE)
	$(TIMED) $(PEERS)/bin/python benchmarks/encoding_time.py $(WRITE)
	$(TIMED) $(PEERS)/bin/python benchmarks/queries.py $(WRITE)
	$(TIMED) $(PEERS)/bin/python benchmarks/maxsim.py $(WRITE)
	$(TIMED) $(BIN)/python benchmarks/rerank.py $(WRITE)
	$(TIMED) $(BIN)/python benchmarks/growth.py $(WRITE)
	$(TIMED) $(BIN)/python benchmarks/wire.py
	mkdir -p $(BENCH_CACHE)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/store.py --cache $(BENCH_CACHE)
	$(TIMED) $(BIN)/python benchmarks/bridge.py --cache $(BENCH_CACHE) $(WRITE)
	$(TIMED) $(BIN)/python benchmarks/compression.py --cache $(BENCH_CACHE) $(WRITE)
	$(TIMED) $(BIN)/python benchmarks/quality.py
	$(TIMED) $(BIN)/python benchmarks/regions.py --cache $(BENCH_CACHE) $(WRITE)
	$(TIMED) $(BIN)/python benchmarks/gpu.py $(if $(shell command -v nvidia-smi),$(WRITE),--quick)

# torch first and alone: where a CPU build lies at hand it is taken, and what comes after is content with it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[all,test,test-chat]'
	touch $(READY)

$(VLLM_READY): pyproject.toml tests/vllm/build.sh tests/vllm/constraints.txt tests/vllm/torchvision_operators.py
	sh tests/vllm/build.sh $(PYTHON) $(VLLM)
	touch $(VLLM_READY)

$(PEERS_READY): pyproject.toml benchmarks/peers.sh benchmarks/peers-constraints.txt tests/vllm/torchvision_operators.py
	sh benchmarks/peers.sh $(PYTHON) $(PEERS)
	touch $(PEERS_READY)

clean:
	rm -rf $(VENV) $(VLLM) build dist demo-output src/*.egg-info
