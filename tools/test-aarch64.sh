#!/usr/bin/env bash
# Runs the Rust tests as aarch64 code on an x86-64 machine, once for each level
# of kernels there: an emulated Cortex-A53 has NEON only, a Neoverse N1 dot
# products too, and `max` also matrix products (i8mm). Whatever is given here
# goes to `cargo test`, in front of nothing else: `tools/test-aarch64.sh -- attention`.
#
# With --set-up it only fetches what it needs.
# The environment reaches the tests (BITNET_RS_ISA); BITNET_RS_TEST_ONE_IN=1 runs
# all cases, not the third that is enough for every level here. BITNET_RS_TEST_LEVELS
# names the levels, all of them if it is unset.
# What emulation cannot show: timing, and ARM's weak order of memory accesses.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/debs.sh

target=aarch64-unknown-linux-gnu
debs=target/cross/aarch64
[[ $(uname -m) == x86_64 ]] || {
  echo "this cross-compiles from x86-64; on $(uname -m), run: cargo test" >&2
  exit 1
}

# rustup's toolchain has no standard library for aarch64 without a download of
# its own; Debian packages both. The compiler's libraries have versions in their
# names, and the one of LLVM is a dependency of the other.
rust=$(debs_depends libstd-rust-web-dev 'libstd-rust-web-[0-9.]*')
llvm=$(debs_depends "$rust" 'libllvm[0-9]*')
unpack_debs "$debs" \
  rustc-web "$rust" "$llvm" libstd-rust-web-dev libstd-rust-web-dev:arm64 \
  gcc-12-aarch64-linux-gnu cpp-12-aarch64-linux-gnu binutils-aarch64-linux-gnu libgcc-12-dev-arm64-cross \
  libgcc-s1-arm64-cross libc6-dev-arm64-cross libc6-arm64-cross linux-libc-dev-arm64-cross
unpack_debs target/cross/qemu qemu-user-static
debs=$PWD/$debs

# The unpacked tools look for their libraries in the system's folders.
mkdir -p target/cross/bin
wrap() {
  printf '#!/bin/sh\nLD_LIBRARY_PATH=%s exec %s "$@"\n' "$debs/usr/lib/x86_64-linux-gnu" "$debs/usr/bin/${*:2}" \
    >"target/cross/bin/$1"
  chmod +x "target/cross/bin/$1"
}
wrap rustc rustc
wrap ar aarch64-linux-gnu-ar
wrap cc aarch64-linux-gnu-gcc-12 "--sysroot=$debs" -isystem "$debs/usr/aarch64-linux-gnu/include" \
  "-B$debs/usr/aarch64-linux-gnu/bin" "-B$debs/usr/aarch64-linux-gnu/lib" "-L$debs/usr/aarch64-linux-gnu/lib"

export RUSTC=$PWD/target/cross/bin/rustc
export CARGO_TARGET_DIR=$PWD/target/cross/build
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=$PWD/target/cross/bin/cc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER=$PWD/target/cross/qemu/usr/bin/qemu-aarch64-static
# For C in dependencies.
export CC_aarch64_unknown_linux_gnu=$PWD/target/cross/bin/cc
export AR_aarch64_unknown_linux_gnu=$PWD/target/cross/bin/ar
export QEMU_LD_PREFIX=$debs/usr/aarch64-linux-gnu

if [[ ${1:-} == --set-up ]]; then
  "$RUSTC" --version
  exit
fi
cargo test --locked --quiet --target $target --lib --tests --no-run
export BITNET_RS_TEST_ONE_IN=${BITNET_RS_TEST_ONE_IN:-3}
for level in ${BITNET_RS_TEST_LEVELS:-cortex-a53:neon neoverse-n1:dotprod max:i8mm}; do
  echo "== aarch64, emulated ${level%:*}: kernels up to ${level#*:} =="
  # Without this, a level that the emulator does not show would pass by testing less.
  QEMU_CPU=${level%:*} BITNET_RS_TEST_HIGHEST_ISA=${level#*:} \
    cargo test --locked --quiet --target $target --lib --tests "$@"
done
