#!/usr/bin/env bash
# In nvcc's place (`NVCC=tests/nvcc.sh`) where candle is built for the tests alone: its quantised kernels, which are all that it compiles to
# machine code, take ten minutes, and nothing here launches them. Everything else goes to nvcc itself, of CUDA_HOME.
set -euo pipefail
for argument in "$@"; do
    case $argument in -c) compile=1 ;; *.o) object=$argument ;; esac
done
if [ -n "${compile:-}" ]; then
    exec cc -c -x c /dev/null -o "$object"
fi
exec "$CUDA_HOME/bin/nvcc" "$@"
