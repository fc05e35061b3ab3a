#!/usr/bin/env bash
# Installs nvcc and what it needs into a Python virtual environment, without root, and prints how to use it.
#     scripts/cuda-toolchain.sh [folder]        (default: target/cuda-toolchain)
#     eval "$(scripts/cuda-toolchain.sh)"
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-target/cuda-toolchain}
if [ ! -x "$folder/bin/pip" ]; then
    python3 -m venv "$folder"
fi
# All five extras at one version: nvcc alone pulls in newer ones, whose PTX its ptxas rejects.
"$folder/bin/pip" install --quiet "cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]==13.0.2" >&2
home=$(echo "$PWD/$folder"/lib/python3*/site-packages/nvidia/cu13)
case "$folder" in /*) home=$(echo "$folder"/lib/python3*/site-packages/nvidia/cu13) ;; esac
"$home/bin/nvcc" --version >&2
echo "export CUDA_HOME=$home"
