#!/usr/bin/env bash
# Builds the C library and installs it: scripts/install-c.sh PREFIX (say /usr/local, or "$HOME/.local"); DESTDIR is put in front, as packagers do.
# PREFIX is an absolute path. SAE_KERNELS_FEATURES=cuda adds CUDA contexts, for which nvcc must be there.
# Then: PKG_CONFIG_PATH=PREFIX/lib/pkgconfig cc program.c $(pkg-config --cflags --libs sae_kernels), or --static for the archive.
set -euo pipefail
prefix=${1:?usage: scripts/install-c.sh PREFIX}
cd "$(dirname "$0")/.."
cargo rustc --release --lib --crate-type cdylib,staticlib --features "capi${SAE_KERNELS_FEATURES:+,$SAE_KERNELS_FEATURES}"
target=${CARGO_TARGET_DIR:-target}/release
to=${DESTDIR:-}$prefix
install -Dm644 include/sae_kernels.h "$to/include/sae_kernels.h"
for library in "$target"/libsae_kernels.{a,so,dylib}; do
    if [ -f "$library" ]; then install -Dm644 "$library" "$to/lib/$(basename "$library")"; fi
done
mkdir -p "$to/lib/pkgconfig"
cat > "$to/lib/pkgconfig/sae_kernels.pc" << PC
prefix=$prefix
libdir=\${prefix}/lib
includedir=\${prefix}/include

Name: sae_kernels
Description: Kernels for sparse autoencoders
Version: $(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
Cflags: -I\${includedir}
Libs: -L\${libdir} -lsae_kernels
Libs.private: -lpthread -ldl -lm
PC
echo "installed into $to"
