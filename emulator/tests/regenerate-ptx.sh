#!/bin/sh
# Compiles tests/kernels/*.cu and ../kernels/conformance*.cu to tests/ptx/*.ptx; with --check only compares.
# Needs nvcc 13.0: NVCC, or CUDA_HOME, or one on PATH. For example:
#   python3 -m venv V && V/bin/pip install "cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]==13.0.2"
#   CUDA_HOME=V/lib/python3.11/site-packages/nvidia/cu13 tests/regenerate-ptx.sh
set -eu
cd "$(dirname "$0")"
nvcc=${NVCC:-${CUDA_HOME:+$CUDA_HOME/bin/nvcc}}
nvcc=${nvcc:-nvcc}
out=ptx
if [ "${1:-}" = --check ]; then
  out=$(mktemp -d)
  trap 'rm -rf "$out"' EXIT
fi
mkdir -p "$out"
for source in kernels/*.cu ../../kernels/conformance*.cu; do
  [ -e "$source" ] || continue
  name=$(basename "$source" .cu)
  case $name in
  hopper* | *_sm90) arch=compute_90a ;;
  *) arch=compute_80 ;;
  esac
  # The paths of headers would differ between machines: file names only.
  "$nvcc" -std=c++17 -ptx -lineinfo -arch="$arch" -Ikernels -o - "$source" |
    sed -E 's|^(\t\.file\t[0-9]+ ").*/([^/"]+")(.*)|\1\2|' > "$out/$name.ptx"
done
if [ "$out" != ptx ]; then
  # nvcc names functions without a name of their own by a hash of the path.
  diff -r -I '^\.b8' -I '_INTERNAL_' -I '_GLOBAL__N_' ptx "$out"
fi
