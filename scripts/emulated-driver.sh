#!/usr/bin/env bash
# A CUDA driver library whose GPU is the PTX emulator (emulator/README.md): builds it, and runs a command with it, or prints how to use it.
#     scripts/emulated-driver.sh cargo test --features cuda --test cuda_hardware -- conformance
#     eval "$(scripts/emulated-driver.sh)"
# With --foreign before the command, programs that are linked to cuBLAS, cuRAND, NVRTC and the runtime find it in their places, too: it has
# the handles of the first three, and nothing of the last.
set -euo pipefail
cd "$(dirname "$0")/.."
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
cargo build --quiet --profile test -p ptx-emulator-driver
folder=$target/emulated-driver
mkdir -p "$folder/foreign"
# Programs that use the old one keep it.
cp "$target/debug/libptx_emulator_driver.so" "$folder/new"
mv "$folder/new" "$folder/libcuda.so.1"
ln -sf libcuda.so.1 "$folder/libcuda.so"
for name in cublas cublasLt cudart curand nvrtc; do ln -sf ../libcuda.so.1 "$folder/foreign/lib$name.so"; done
# Of our own package cargo says where its kernels are; the other programs' are in one of these.
images=$(printf '%s:' "$target"/*/build/sae-kernels-*/out)
path=$folder
if [ "${1:-}" = --foreign ]; then
    shift
    path=$folder:$folder/foreign
fi
variables=("LD_LIBRARY_PATH=$path${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" "SAE_KERNELS_PTX_DIR=${images%:}")
variables+=("LIBRARY_PATH=$path${LIBRARY_PATH:+:$LIBRARY_PATH}")
if [ $# = 0 ]; then
    printf 'export %s\n' "${variables[@]@Q}"
else
    exec env "${variables[@]}" "$@"
fi
