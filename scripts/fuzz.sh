#!/usr/bin/env bash
# Fuzzes the C functions: calls with right and wrong arguments under AddressSanitizer, against the header's rules, against themselves and
# against the reference; see fuzz/fuzz_targets/capi/main.rs. Installs cargo-fuzz if it is missing; needs a C++ compiler.
#
# scripts/fuzz.sh [SECONDS]            fuzzes for 600 seconds, or as many as are given; what was found to be new stays in fuzz/corpus/capi
# scripts/fuzz.sh --valgrind [SECONDS] gives that corpus to a build for valgrind, which also sees what is read before it is written
#
# An input that fails is left in fuzz/artifacts/capi: RUSTC_BOOTSTRAP=1 cargo fuzz run capi FILE runs it again.
set -euo pipefail
cd "$(dirname "$0")/.."
valgrind=false
if [ "${1:-}" = --valgrind ]; then
    valgrind=true
    shift
fi
seconds=${1:-600}
cargo fuzz --version > /dev/null 2>&1 || cargo install --quiet --locked cargo-fuzz

# What cargo-fuzz asks of the compiler stable Rust has behind this switch.
export RUSTC_BOOTSTRAP=1
corpus=fuzz/corpus/capi
if ! $valgrind; then
    # An input is some hundred bytes, which the fuzzer would be long to grow from none.
    mkdir -p $corpus
    [ -n "$(ls $corpus)" ] || for seed in {1..32}; do head -c 512 /dev/urandom > "$corpus/seed-$seed"; done
    exec cargo fuzz run capi $corpus -- -len_control=0 -max_len=512 -max_total_time="$seconds" -print_final_stats=1
fi
cargo fuzz build --sanitizer none capi
target=$(rustc -vV | sed -n 's/^host: //p')
# Each input once, in turn, until the time is over.
exec timeout --preserve-status "$seconds" valgrind --quiet --error-exitcode=9 \
    "${CARGO_TARGET_DIR:-fuzz/target}/$target/release/capi" -rss_limit_mb=0 -timeout=600 -runs=0 $corpus
