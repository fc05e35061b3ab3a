#!/usr/bin/env bash
# What no emulator sees, from the machine code: registers, shared memory, stack, spills and local memory of every kernel against
# kernels/resources.txt; that the products use tensor cores (HMMA), ldmatrix (LDSM) and 16-byte asynchronous copies (LDGSTS.128), without a
# division in their loops; and that the kernels bound by memory read and write f32 16 bytes at a time (LDG.128, STG.128).
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

for source in kernels/*.cu; do
    # Test kernels of the emulator.
    [ "$source" = kernels/conformance.cu ] && continue
    ptx=$out/$(basename "$source" .cu).ptx
    # One PTX for all, as build.rs does.
    "$nvcc" -std=c++17 -O3 -ptx -arch=compute_80 -o "$ptx" "$source"
    for architecture in ${architectures//,/ }; do
        cubin=$out/$(basename "$source" .cu).sm_$architecture.cubin
        "$nvcc" -O3 -cubin -arch="sm_$architecture" -o "$cubin" "$ptx"
        # " Function encode_f32:" / "  REG:122 STACK:0 SHARED:0 LOCAL:0 ..."
        "$cuobjdump" -res-usage "$cubin" 2>&1 | awk -v architecture="sm_$architecture" '
            /Function/ { sub(/:$/, "", $2); name = $2 }
            /REG:/ { match($0, /REG:[0-9]+/); registers = substr($0, RSTART, RLENGTH)
                     match($0, /SHARED:[0-9]+/); shared = substr($0, RSTART, RLENGTH)
                     match($0, /STACK:[0-9]+/); stack = substr($0, RSTART, RLENGTH)
                     match($0, /LOCAL:[0-9]+/); local = substr($0, RSTART, RLENGTH)
                     print architecture, name, registers, shared, stack, local }' >> "$out/resources"
        "$cuobjdump" -sass "$cubin" | awk -v architecture="sm_$architecture" '
            /Function :/ { name = $3 }
            / HMMA\./ { hmma[name]++ } / LDSM\./ { ldsm[name]++ } / LDGSTS\..*128/ { ldgsts[name]++ }
            / LDG\..*128/ { ldg[name]++ } / STG\..*128/ { stg[name]++ }
            / (LDL|STL)/ { local[name]++ }
            # A loop is a jump backwards, from one address (four or five digits) to another; integers are divided by way of a reciprocal.
            /Function :/ { delete kind; lines = 0 }
            /\/\*[0-9a-f]+\*\/.*;/ { line = ++lines; at[line] = sprintf("%6s", substr($1, 3, length($1) - 4))
                                    kind[line] = / HMMA\./ ? "multiply" : / MUFU\.RCP / ? "divide" : "" }
            / BRA 0x/ { match($0, /BRA 0x[0-9a-f]+/); target = sprintf("%6s", substr($0, RSTART + 6, RLENGTH - 6))
                        multiplies = divides = 0
                        for (i = lines; i > 0 && at[i] >= target; --i) { multiplies += kind[i] == "multiply"; divides += kind[i] == "divide" }
                        if (target < at[lines] && multiplies) inside[name] += divides }
            END { for (name in hmma) print architecture, name, "HMMA:" hmma[name], "LDSM:" ldsm[name] + 0, "LDGSTS.128:" ldgsts[name] + 0
                  for (name in inside) if (inside[name]) print architecture, name, "divides in its loop"
                  for (name in ldg) print architecture, name, "LDG.128"
                  for (name in stg) print architecture, name, "STG.128"
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
if grep 'divides in its loop' "$out/sass"; then
    failed=1
fi
# What reads, and what writes, 16 bytes at a time.
wide_reads="activation_sums_f32 adam_f32 column_sums_f32 pointwise_f32 prepare_f32 responsibilities_f32 row_norms_f32 sgd_f32 through_norms_f32"
wide_writes="adam_f32 pointwise_f32 responsibilities_f32 sgd_f32 through_norms_f32"
for architecture in ${architectures//,/ }; do
    for name in $wide_reads; do
        grep -q "^sm_$architecture $name LDG.128" "$out/sass" || { echo "sm_$architecture $name reads in small pieces"; failed=1; }
    done
    for name in $wide_writes; do
        grep -q "^sm_$architecture $name STG.128" "$out/sass" || { echo "sm_$architecture $name writes in small pieces"; failed=1; }
    done
done
if [ "${1:-}" = --update ]; then
    cp "$out/resources" kernels/resources.txt
else
    for architecture in ${architectures//,/ }; do
        diff <(grep "^sm_$architecture " kernels/resources.txt) <(grep "^sm_$architecture " "$out/resources") || failed=1
    done
fi
grep -vE ' STACK:0 LOCAL:0$' "$out/resources" && { echo "stack or local memory in use"; failed=1; }
echo "$(wc -l < "$out/resources") kernels checked"
exit $failed
