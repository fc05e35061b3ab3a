#!/usr/bin/env bash
# Makes a folder that tests and measures the CUDA backend on a GPU host without Rust or a CUDA toolkit: the test and benchmark programs, the
# C library for the comparison with PyTorch, golden vectors, and a run.sh that runs them in stages and leaves one report.
#     eval "$(scripts/cuda-toolchain.sh)"; scripts/gpu-bundle.sh [folder]        (default: target/gpu-bundle; what it held is deleted)
# There, with an NVIDIA driver, Python, and glibc no older than here:
#     ./run.sh [--out DIR] [device | tests | sanitizer | conformance | benches | peers | report]...        (default: all; --help says more)
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit ;; esac
cd "$(dirname "$0")/.."
folder=${1:-target/gpu-bundle}
# Machine code for sm_8x and sm_90, and PTX for newer ones: every program has the kernels in it, so all architectures would not fit.
export SAE_KERNELS_REQUIRE_NVCC=1 SAE_KERNELS_CUDA_ARCHS=${SAE_KERNELS_CUDA_ARCHS:-90,90a}
most_mb=60

if [ -e "$folder" ] && [ ! -e "$folder/run.sh" ]; then
    echo "$folder is there and is no bundle: name another folder" >&2
    exit 1
fi
rm -rf "$folder"
mkdir -p "$folder"/{bin,lib,peers,ptx,tests}

# Copies what cargo builds: programs and the C library without what only a debugger reads, and the PTX for the emulated GPU.
collect() {
    cargo "$@" --features capi,cuda --message-format=json-render-diagnostics | python3 -c '
import json, sys
for message in map(json.loads, sys.stdin):
    if message.get("executable"):
        print("bin/" + message["target"]["name"], message["executable"])
    elif "cdylib" in message.get("target", {}).get("crate_types", []) and message["target"]["name"] == "sae_kernels":
        print("lib/libsae_kernels.so", *(name for name in message["filenames"] if name.endswith(".so")))
    for name, value in message.get("env") or []:
        if name == "SAE_KERNELS_PTX_DIR":
            print("ptx", value)' |
        while read -r place path; do
            case $place in
                ptx) cp "$path"/*.ptx "$folder/ptx/" ;;
                *) strip --strip-unneeded -o "$folder/$place" "$path" ;;
            esac
        done
}
tests=(cuda_hardware differential edge_cases golden integers optimizers promises)
collect rustc --release --lib --crate-type cdylib
collect test --release --no-run "${tests[@]/#/--test=}"
collect bench --no-run --bench=kernels

cp -r tests/golden "$folder/tests/"
cp scripts/gpu-bundle/run.{sh,py} "$folder/"
cp benches/peers/{competitors,gpu,gpu_names,gpu_report,peak,problem,roofline}.py "$folder/peers/"

for file in "${tests[@]/#/bin/}" bin/kernels lib/libsae_kernels.so run.sh; do
    [ -x "$folder/$file" ] || { echo "the build left no $file" >&2; exit 1; }
done
compgen -G "$folder/ptx/*.ptx" > /dev/null || { echo "the build left no PTX" >&2; exit 1; }
# Every program has the kernels in it: a dictionary longer than a program finds them again. run.py unpacks it.
python3 - "$folder" bin lib ptx tests << 'END'
import lzma, sys, tarfile
folder, *names = sys.argv[1:]
filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 64 << 20}]
with lzma.open(f"{folder}/programs.tar.xz", "w", filters=filters) as packed, tarfile.open(fileobj=packed, mode="w") as archive:
    for name in names:
        archive.add(f"{folder}/{name}", name)
END
rm -r "$folder"/{bin,lib,ptx,tests}
size=$(du -s --apparent-size --block-size=1000000 "$folder" | cut -f1)
echo "$folder: $size MB"
[ "$size" -lt "$most_mb" ] || { echo "a bundle must have less than $most_mb MB: fewer SAE_KERNELS_CUDA_ARCHS, for one" >&2; exit 1; }
