#!/usr/bin/env bash
# What no emulator sees, from the machine code: registers, shared memory, stack, spills and local memory of every kernel against
# kernels/resources.txt; that the products use tensor cores (HMMA), ldmatrix (LDSM) and 16-byte asynchronous copies (LDGSTS.128), on sm_90a
# wgmma (HGMMA) and bulk copies (UTMALDG; UBLKCP where plain products are stored), without a division or a fence of all memory in their loops;
# and that the kernels bound by memory read and write f32 16 bytes at a time (LDG.128, STG.128).
#     CUDA_HOME=... CUOBJDUMP=... scripts/cuda-static-checks.sh [--update]
# cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump==13.2.51 nvidia-cuda-nvdisasm==13.2.51, in an environment of their own.
set -euo pipefail
cd "$(dirname "$0")/.."
nvcc=${SAE_KERNELS_NVCC:-${CUDA_HOME:+$CUDA_HOME/bin/}nvcc}
cuobjdump=${CUOBJDUMP:-cuobjdump}
PATH="$(dirname "$(command -v "$cuobjdump")"):$PATH"
architectures=${SAE_KERNELS_CUDA_ARCHS:-80 86 89 90 90a 100 120}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
failed=0

for source in kernels/*.cu; do
    case $source in
    kernels/conformance*)
        # Test kernels of the emulator, which a GPU's driver compiles: that they can be.
        architecture=sm_80
        [ "$source" = kernels/conformance_sm90.cu ] && architecture=sm_90a
        "$nvcc" -std=c++17 -cubin -arch=$architecture -o "$out/conformance.cubin" "$source" 2>&1 | tee "$out/warnings"
        if grep -E 'C75(04|08|09|1[0-7])' "$out/warnings"; then failed=1; fi
        continue
        ;;
    esac
    ptx=$out/$(basename "$source" .cu).ptx
    # One PTX for all, as build.rs does.
    "$nvcc" -std=c++17 -O3 -ptx -arch=compute_80 -o "$ptx" "$source"
    for architecture in ${architectures//,/ }; do
        cubin=$out/$(basename "$source" .cu).sm_$architecture.cubin
        if [ "$architecture" = 90a ]; then
            # The other mainloop; only files with products have it.
            grep -q '^GEMM_KERNEL(' "$source" || continue
            "$nvcc" -std=c++17 -O3 -cubin -arch=sm_90a -DSAE_KERNELS_SM90 -o "$cubin" "$source" 2>&1 | tee "$out/warnings"
            # wgmma that waits for each other, setmaxnreg that is ignored.
            if grep -E 'C75(04|08|09|1[0-7])' "$out/warnings"; then failed=1; fi
        else
            "$nvcc" -O3 -cubin -arch="sm_$architecture" -o "$cubin" "$ptx"
        fi
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
            / HGMMA\./ { hgmma[name]++ } / UTMALDG\./ { utmaldg[name]++ } / UBLKCP\.G\.S/ { ublkcp[name]++ }
            / LDG\..*128/ { ldg[name]++ } / STG\..*128/ { stg[name]++ }
            / (LDL|STL)/ { local[name]++ }
            # A loop is a jump backwards, from one address (four or five digits) to another; integers are divided by way of a reciprocal.
            /Function :/ { delete kind; lines = 0 }
            /\/\*[0-9a-f]+\*\/.*;/ { line = ++lines; at[line] = sprintf("%6s", substr($1, 3, length($1) - 4))
                                    kind[line] = / HG?MMA\./ ? "multiply" : / MUFU\.RCP / ? "divide" : / MEMBAR\./ ? "fence" : "" }
            / BRA 0x/ { match($0, /BRA 0x[0-9a-f]+/); target = sprintf("%6s", substr($0, RSTART + 6, RLENGTH - 6))
                        multiplies = divides = fences = 0
                        for (i = lines; i > 0 && at[i] >= target; --i) {
                            multiplies += kind[i] == "multiply"; divides += kind[i] == "divide"; fences += kind[i] == "fence"
                        }
                        # The innermost loop: what goes from tile to tile may divide.
                        if (target < at[lines] && multiplies && !(name in inside)) { inside[name] = divides; fenced[name] = fences } }
            END { for (name in hmma) print architecture, name, "HMMA:" hmma[name], "LDSM:" ldsm[name] + 0, "LDGSTS.128:" ldgsts[name] + 0
                  for (name in hgmma) print architecture, name, "HGMMA:" hgmma[name], "UTMALDG:" utmaldg[name] + 0
                  for (name in ublkcp) print architecture, name, "UBLKCP"
                  for (name in inside) if (inside[name]) print architecture, name, "divides in its loop"
                  for (name in fenced) if (fenced[name]) print architecture, name, "fences all memory in its loop"
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
if grep -E 'LDSM:0|LDGSTS.128:0|UTMALDG:0' "$out/sass"; then
    echo "a product without ldmatrix, 16-byte asynchronous copies or bulk copies"
    failed=1
fi
# Every kernel made by GEMM_KERNEL multiplies on tensor cores.
for name in $(grep -hoE '^GEMM_KERNEL\([a-z0-9_]+' kernels/*.cu | cut -d'(' -f2); do
    for architecture in ${architectures//,/ }; do
        unit=HMMA
        [ "$architecture" = 90a ] && unit=HGMMA
        grep -q "^sm_$architecture $name $unit:" "$out/sass" || { echo "sm_$architecture $name has no $unit"; failed=1; }
    done
done
if [[ " ${architectures//,/ } " = *" 90a "* ]]; then
    for name in comoments product_{nn,nt,tn}_{bf16,f16}; do
        grep -q "^sm_90a $name UBLKCP" "$out/sass" || { echo "sm_90a $name stores without bulk copies"; failed=1; }
    done
fi
if grep 'in its loop' "$out/sass"; then
    failed=1
fi
# What reads, and what writes, 16 bytes at a time.
wide_reads="activation_sums_f32 adam_f32 column_sums_f32 pointwise_f32 prepare_f32 responsibilities_f32 row_norms_f32 sgd_f32 through_norms_f32"
wide_writes="adam_f32 pointwise_f32 responsibilities_f32 sgd_f32 through_norms_f32"
for architecture in ${architectures//,/ }; do
    # The same source as on the others; not every file is there.
    [ "$architecture" = 90a ] && continue
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
