#!/usr/bin/env bash
# Makes a folder that tests and measures the CUDA backend on a GPU host without Rust or a CUDA toolkit: the test and benchmark programs,
# golden vectors, and a run.sh that runs them and leaves results.txt.
#     eval "$(scripts/cuda-toolchain.sh)"; scripts/gpu-bundle.sh [folder]        (default: target/gpu-bundle)
# There, with an NVIDIA driver and glibc no older than here:
#     ./run.sh [all | tests | sanitizer | benches]...
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-target/gpu-bundle}
export SAE_KERNELS_REQUIRE_NVCC=1

tests=(cuda_hardware differential edge_cases golden integers optimizers promises)

# Copies the programs that cargo builds, without what only a debugger reads.
collect() {
    cargo "$@" --features cuda --no-run --message-format=json-render-diagnostics | python3 -c '
import json, sys
for message in map(json.loads, sys.stdin):
    if message.get("executable"):
        print(message["target"]["name"], message["executable"])' |
        while read -r name path; do strip -o "$folder/$name" "$path"; done
}

rm -rf "$folder"
mkdir -p "$folder/tests"
cp -r tests/golden "$folder/tests/"
collect test --release "${tests[@]/#/--test=}"
collect bench --bench=kernels

cat > "$folder/run.sh" <<'RUN'
#!/usr/bin/env bash
# Runs the CUDA backend's tests and benchmarks on this machine's GPU; the output is also in results.txt.
set -uo pipefail
cd "$(dirname "$0")"
# A GPU that cannot be used is a failure; golden vectors lie beside the programs.
export SAE_KERNELS_REQUIRE_GPU=1 CARGO_MANIFEST_DIR=$PWD
# What each instruction gives on this chip, to be kept in emulator/tests/golden/.
export SAE_KERNELS_RECORD=$PWD
failed=0
step() {
    printf '\n== %s\n' "$*"
    "$@" || { echo "== failed: $*"; failed=1; }
}
tests() {
    step ./cuda_hardware
    for name in integers differential optimizers edge_cases promises golden; do
        step "./$name" cuda_
    done
}
sanitizer() {
    command -v compute-sanitizer > /dev/null || { echo "no compute-sanitizer on PATH: left out"; return; }
    for tool in memcheck racecheck initcheck synccheck; do
        step compute-sanitizer --tool "$tool" --error-exitcode 1 ./cuda_hardware smallest
    done
}
benches() {
    step ./kernels --bench cuda
}
all() {
    tests
    sanitizer
    benches
}
main() {
    date -u +%F
    nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem --format=csv,noheader || true
    echo "command: ./run.sh $*"
    for part in "${@:-all}"; do
        case $part in
            all | tests | sanitizer | benches) "$part" ;;
            *) echo "no part $part: all, tests, sanitizer or benches"; failed=1 ;;
        esac
    done
    exit $failed
}
main "$@" 2>&1 | tee results.txt
exit "${PIPESTATUS[0]}"
RUN
chmod +x "$folder/run.sh"
du -sh "$folder"
