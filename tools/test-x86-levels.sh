#!/usr/bin/env bash
# Runs the Rust tests on emulated x86-64 processors that have less than this
# one, once for each level of dispatch up to AVX2: a kernel that uses an
# instruction its level does not promise dies here of an illegal instruction,
# where the native run with BITNET_RS_ISA would let it pass. AVX-512 is the
# business of test-avx512-emulated.sh: this emulator has none.
#
# With --set-up it only fetches what it needs. Other arguments go to `cargo test`; the environment reaches the tests, of which
# BITNET_RS_TEST_ONE_IN=1 runs all cases. BITNET_RS_TEST_LEVELS names the levels, all of them if it is unset.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/debs.sh

[[ $(uname -m) == x86_64 ]] || {
  echo "this needs an x86-64 machine; on $(uname -m), run: cargo test" >&2
  exit 1
}
unpack_debs target/cross/qemu qemu-user-static
if [[ ${1:-} == --set-up ]]; then
  exit
fi
export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER=$PWD/target/cross/qemu/usr/bin/qemu-x86_64-static

# Opteron_G1 ends at SSE3; Conroe has SSSE3 but no SSE4.1; SandyBridge has AVX without
# AVX2, FMA and F16C; Haswell all of these. Floats are slow
# here, and multiply-adds in software, which the others need, slower: few cases.
# What is taken away ends warnings that the emulator lacks it; no test is about it.
export BITNET_RS_TEST_ONE_IN=${BITNET_RS_TEST_ONE_IN:-7}
for level in ${BITNET_RS_TEST_LEVELS:-Opteron_G1:generic Conroe:ssse3 SandyBridge:ssse3 Haswell-noTSX:avx2}; do
  echo "== x86-64, emulated ${level%:*}: kernels up to ${level#*:} =="
  # Without this, a level that the emulator does not show would pass by testing less.
  QEMU_CPU=${level%:*},-pcid,-x2apic,-tsc-deadline,-invpcid BITNET_RS_TEST_HIGHEST_ISA=${level#*:} \
    cargo test --locked --quiet --lib --tests "$@"
done
