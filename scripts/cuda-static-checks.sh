#!/usr/bin/env bash
# What no emulator sees, from the machine code: registers, stack, spills and local memory of every kernel against kernels/resources.txt, and
# that the products use tensor cores (HMMA), ldmatrix (LDSM) and 16-byte asynchronous copies (LDGSTS.128).
#     CUDA_HOME=... CUOBJDUMP=... scripts/cuda-static-checks.sh [--update]
# cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump==13.2.51 nvidia-cuda-nvdisasm==13.2.51, in an environment of their own.
set -euo pipefail
cd "$(dirname "$0")/.."
nvcc=${SAE_KERNELS_NVCC:-${CUDA_HOME:+$CUDA_HOME/bin/}nvcc}
cuobjdump=${CUOBJDUMP:-cuobjdump}
PATH="$(dirname "$(command -v "$cuobjdump")"):$PATH"
architectures=${SAE_KERNELS_CUDA_ARCHS:-80 86 89 90 100 120}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
failed=0

for architecture in ${architectures//,/ }; do
    for source in kernels/*.cu; do
        # Test kernels of the emulator.
        [ "$source" = kernels/conformance.cu ] && continue
        cubin=$out/$(basename "$source" .cu).sm_$architecture.cubin
        "$nvcc" -std=c++17 -O3 -cubin -arch="sm_$architecture" -o "$cubin" "$source"
        # " Function encode_f32:" / "  REG:122 STACK:0 SHARED:0 LOCAL:0 ..."
        "$cuobjdump" -res-usage "$cubin" 2>&1 | awk -v architecture="sm_$architecture" '
            /Function/ { sub(/:$/, "", $2); name = $2 }
            /REG:/ { match($0, /REG:[0-9]+/); registers = substr($0, RSTART, RLENGTH)
                     match($0, /STACK:[0-9]+/); stack = substr($0, RSTART, RLENGTH)
                     match($0, /LOCAL:[0-9]+/); local = substr($0, RSTART, RLENGTH)
                     print architecture, name, registers, stack, local }' >> "$out/resources"
        "$cuobjdump" -sass "$cubin" | awk -v architecture="sm_$architecture" '
            /Function :/ { name = $3 }
            / HMMA\./ { hmma[name]++ } / LDSM\./ { ldsm[name]++ } / LDGSTS\..*128/ { ldgsts[name]++ }
            / (LDL|STL)/ { local[name]++ }
            END { for (name in hmma) print architecture, name, "HMMA:" hmma[name], "LDSM:" ldsm[name] + 0, "LDGSTS.128:" ldgsts[name] + 0
                  for (name in local) print architecture, name, "uses local memory" }' >> "$out/sass"
    done
done
sort -o "$out/resources" "$out/resources"
sort -o "$out/sass" "$out/sass"

if grep -q 'local memory' "$out/sass"; then
    grep 'local memory' "$out/sass"
    failed=1
fi
if grep -E 'LDSM:0|LDGSTS.128:0' "$out/sass"; then
    echo "a product without ldmatrix or 16-byte asynchronous copies"
    failed=1
fi
# Every kernel made by GEMM_KERNEL multiplies on tensor cores.
for name in $(grep -hoE '^GEMM_KERNEL\([a-z0-9_]+' kernels/*.cu | cut -d'(' -f2); do
    for architecture in ${architectures//,/ }; do
        grep -q "^sm_$architecture $name HMMA:" "$out/sass" || { echo "sm_$architecture $name has no HMMA"; failed=1; }
    done
done
if [ "${1:-}" = --update ]; then
    cp "$out/resources" kernels/resources.txt
else
    for architecture in ${architectures//,/ }; do
        diff <(grep "^sm_$architecture " kernels/resources.txt) <(grep "^sm_$architecture " "$out/resources") || failed=1
    done
fi
grep -vE 'STACK:0 LOCAL:0$' "$out/resources" && { echo "stack or local memory in use"; failed=1; }
echo "$(wc -l < "$out/resources") kernels checked"
exit $failed
