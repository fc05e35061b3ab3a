#!/usr/bin/env bash
# A CUDA driver library whose GPU is the PTX emulator (emulator/README.md): builds it, and runs a command with it, or prints how to use it.
#     scripts/emulated-driver.sh cargo test --features cuda --test cuda_hardware -- conformance
#     eval "$(scripts/emulated-driver.sh)"
set -euo pipefail
cd "$(dirname "$0")/.."
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
cargo build --quiet --profile test -p ptx-emulator-driver
folder=$target/emulated-driver
mkdir -p "$folder"
cp "$target/debug/libptx_emulator_driver.so" "$folder/libcuda.so.1.new"
mv "$folder/libcuda.so.1.new" "$folder/libcuda.so.1"
ln -sf libcuda.so.1 "$folder/libcuda.so"
# Of our own package cargo says where its kernels are; the other programs' are in one of these.
images=$(printf '%s:' "$target"/*/build/sae-kernels-*/out)
variables=("LD_LIBRARY_PATH=$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" "SAE_KERNELS_PTX_DIR=${images%:}")
if [ $# = 0 ]; then
    printf 'export %s\n' "${variables[@]@Q}"
else
    exec env "${variables[@]}" "$@"
fi
