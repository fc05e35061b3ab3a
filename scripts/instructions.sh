#!/usr/bin/env bash
# Instructions that each operation takes in fixed steps of benches/instructions.rs, against the table in benches/instructions.txt. A kernel
# that became slower by more work is found without a clock; one that waits longer for memory is not. Needs valgrind and AVX2.
#
# scripts/instructions.sh            fails if an operation takes over 2 % more or less than the table says
# scripts/instructions.sh --update   writes the table
set -euo pipefail
cd "$(dirname "$0")/.."

table=benches/instructions.txt
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

target=$(rustc -vV | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')
{
    echo "# Instructions by step and operation on AVX2, counted by scripts/instructions.sh --update with $(rustc --version | cut -d' ' -f1-2)."
    for case in paper paper-bf16 dual training standard; do
        export "CARGO_TARGET_${target}_RUNNER=valgrind --quiet --tool=callgrind --callgrind-out-file=$out/$case"
        cargo bench --quiet --bench instructions -- "$case" >&2
        # Whole calls of the operations in the table, which are methods that are not generic.
        callgrind_annotate --inclusive=yes --threshold=100 --auto=no "$out/$case" |
            sed -En "s/^ *([0-9,]+) .*CpuElement>::([a-z_]+)( .*)?$/\2 \1/p" | tr -d , | sort -k1,1 -k2,2nr | awk -v step="$case" \
            '$1 != last { print step, $1, $2; last = $1 }'
    done
} > "$out/table"

if [ "${1:-}" = --update ]; then
    cp "$out/table" "$table"
    cat "$table"
    exit
fi

# The operations must be the same ones, too.
awk '
    FNR == 1 { if (NR == 1) was = $0; else now = $0; next }
    NR == FNR { expected[$1 " " $2] = $3; next }
    {
        key = $1 " " $2
        if (!(key in expected)) { printf "%s is not in the table\n", key; bad = 1; next }
        change = 100 * ($3 / expected[key] - 1)
        off = change > 2 || change < -2
        bad = bad || off
        printf "%-32s %12d, was %12d: %+.1f %%%s\n", key, $3, expected[key], change, off ? "  <==" : ""
        delete expected[key]
    }
    END {
        for (key in expected) { printf "%s was not counted\n", key; bad = 1 }
        if (bad) {
            if (was != now) print "The table is of another compiler:\n" was "\n" now
            print "If that is meant: scripts/instructions.sh --update"
        }
        exit bad
    }' "$table" "$out/table"
