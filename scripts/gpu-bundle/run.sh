#!/usr/bin/env bash
# Tests and measures the CUDA backend on this machine's GPU: see ./run.sh --help. PYTHON names the interpreter that has PyTorch.
exec "${PYTHON:-python3}" "$(dirname "$0")/run.py" "$@"
