#!/usr/bin/env bash
# Fuzzes the C functions: calls with right and wrong arguments under AddressSanitizer, against the header's rules, against themselves and
# against the reference; see fuzz/fuzz_targets/capi/main.rs. Installs cargo-fuzz if it is missing; needs a C++ compiler.
#
# scripts/fuzz.sh [SECONDS]   for 600 seconds, or as many as are given; inputs that reach something new stay in fuzz/corpus/capi
#
# The instrumented library takes minutes of processor time to build, more than its fuzzing would in CI: so it is not there.
# An input that fails is left in fuzz/artifacts/capi: RUSTC_BOOTSTRAP=1 cargo fuzz run capi FILE runs it again.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-600}
cargo fuzz --version > /dev/null 2>&1 || cargo install --quiet --locked cargo-fuzz

# What cargo-fuzz asks of the compiler stable Rust has behind this switch.
export RUSTC_BOOTSTRAP=1
corpus=fuzz/corpus/capi
# An input is some hundred bytes, which the fuzzer would be long to grow from none.
mkdir -p $corpus
[ -n "$(ls $corpus)" ] || for seed in {1..32}; do head -c 512 /dev/urandom > "$corpus/seed-$seed"; done
cargo fuzz run capi $corpus -- -len_control=0 -max_len=512 -max_total_time="$seconds" -print_final_stats=1
