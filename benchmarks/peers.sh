#!/bin/sh
# Builds the environment in which the peers run beside this package, in one process: build/peers.
#     sh benchmarks/peers.sh [PYTHON [FOLDER]]
set -eu

python=${1:-python3}
environment=${2:-build/peers}
here=$(dirname "$0")

"$python" -m venv "$environment"
pip="$environment/bin/pip"

# torch first and alone: where a CPU build lies at hand it is taken, and the peers are content with it
"$pip" install --quiet --constraint "$here/peers-constraints.txt" torch
"$pip" install --quiet --constraint "$here/peers-constraints.txt" \
    sentence-transformers colpali_engine maxsim-cpu torchvision
"$pip" install --quiet --constraint "$here/peers-constraints.txt" --editable '.[torch,qdrant,pooling]' qdrant-edge-py

# torchvision's default build wants CUDA; beside a CPU torch two of its operators have to be described first
packages=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp "$here/../tests/vllm/torchvision_operators.py" "$packages/"
echo 'import torchvision_operators' > "$packages/torchvision_operators.pth"

"$environment/bin/python" -c 'import colpali_engine.models, maxsim_cpu, sentence_transformers; print("peers are ready")'
