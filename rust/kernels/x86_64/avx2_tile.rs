//! The GEMM tile of AVX2: four rows and three tokens of unpacked codes, within
//! the blocking of `tiles.rs`. For t5, which takes long to unpack; i2 does it in registers
//! (`avx2_i2_runs.rs`).
//!
//! `vpmaddubsw` multiplies 32 codes by 32 activations and adds pairs, on two of
//! four pipes; the other two add its result, so that 64 multiplications a cycle
//! are the limit of this arithmetic.
//!
//! The bound: codes are 0 to 2 and activations -128 to 127, so one
//! `vpmaddubsw` lies in [-512, 508], and the [`CHUNK`] / 32 = 40 of a chunk add
//! up to -20480 at most. (Even a code 3, which no packer writes, would keep to
//! -30720.) Nothing is widened inside the innermost loop.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::{PackedMatrix, Prepared};
use super::tiles::{self, ROWS};
pub(super) use super::tiles::{CHUNK, Codes, UnpackCodes};

/// Tokens of a tile.
const TOKENS: usize = 3;

/// Tokens of a tile whose activations are held in registers: 12 accumulators,
/// 2 of these, a code and a product are all 16. With a third held, the
/// compiler spills an accumulator, and adding to memory takes as long as all
/// the rest (100 instead of 133 GMAC/s on Zen 3; a 4 x 2 tile: 124). The same
/// loop alone, in assembly, comes to 170: additions that take the pipes of
/// `vpmaddubsw` keep it from 207. Longer runs, more row groups and no bounds
/// checks changed nothing.
const HELD: usize = 2;

/// Columns of one register.
const STEP: usize = 32;

/// Multiplies rows of any layout whose row groups hold four rows, as
/// [`Kernel::gemm`](super::super::Kernel::gemm) does.
///
/// # Safety
/// The CPU has the instructions that `unpack` is compiled for.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn gemm_codes(
    w: &PackedMatrix,
    rows: Range<usize>,
    xs: &[Prepared],
    ys: &mut [&mut [f32]],
    unpack: UnpackCodes,
) {
    // SAFETY: `unpack` by the caller's word; `add_run` has the features of
    // this function.
    unsafe { tiles::gemm((), w, rows, xs, ys, unpack, add_run) }
}

/// The [`tiles::AddRun`] of this tile.
#[target_feature(enable = "avx2")]
fn add_run(
    _: (),
    codes: &Codes,
    xs: &[Prepared],
    start: usize,
    cols: usize,
    sums: &mut [[i32; ROWS]],
) {
    for (xs, sums) in xs.chunks(TOKENS).zip(sums.chunks_mut(TOKENS)) {
        match xs {
            [a, b, c] => add_tile(codes, [a, b, c], start, cols, sums),
            [a, b] => add_tile(codes, [a, b], start, cols, sums),
            [a] => add_tile(codes, [a], start, cols, sums),
            _ => unreachable!("chunks of {TOKENS}"),
        }
    }
}

/// Adds the products of a tile of four rows and `T` tokens over one chunk.
#[target_feature(enable = "avx2")]
#[inline]
fn add_tile<const T: usize>(
    codes: &Codes,
    xs: [&Prepared; T],
    start: usize,
    cols: usize,
    sums: &mut [[i32; ROWS]],
) {
    let steps = cols.div_ceil(STEP);
    let mut q: [&[[i8; STEP]]; T] = [&[]; T];
    for t in 0..T {
        q[t] = &xs[t].padded()[start..].as_chunks().0[..steps];
    }
    let mut c: [&[[u8; STEP]]; ROWS] = [&[]; ROWS];
    for i in 0..ROWS {
        c[i] = &codes[i].as_chunks().0[..steps];
    }
    let mut acc = [[_mm256_setzero_si256(); T]; ROWS];
    for s in 0..steps {
        let mut held = [_mm256_setzero_si256(); T];
        for t in 0..T.min(HELD) {
            held[t] = load_i8(&q[t][s]);
        }
        for i in 0..ROWS {
            let code = load(&c[i][s]);
            for t in 0..T {
                let q = if t < HELD { held[t] } else { load_again(&q[t][s]) };
                acc[i][t] = _mm256_add_epi16(acc[i][t], _mm256_maddubs_epi16(code, q));
            }
        }
    }
    let ones = _mm256_set1_epi16(1);
    for t in 0..T {
        let mut wide = [_mm256_setzero_si256(); ROWS];
        for i in 0..ROWS {
            wide[i] = _mm256_madd_epi16(acc[i][t], ones);
        }
        let found = add_lanes(wide);
        for i in 0..ROWS {
            sums[t][i] += found[i];
        }
    }
}

/// The sums of the int32 lanes of four registers.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn add_lanes(v: [__m256i; ROWS]) -> [i32; ROWS] {
    // A transposition whose parts are added on the way.
    let ab = _mm256_add_epi32(_mm256_unpacklo_epi32(v[0], v[1]), _mm256_unpackhi_epi32(v[0], v[1]));
    let cd = _mm256_add_epi32(_mm256_unpacklo_epi32(v[2], v[3]), _mm256_unpackhi_epi32(v[2], v[3]));
    let abcd = _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
    let abcd = _mm_add_epi32(_mm256_castsi256_si128(abcd), _mm256_extracti128_si256::<1>(abcd));
    let mut sums = [0; ROWS];
    // SAFETY: the array has the 16 bytes that are written; no alignment is needed.
    unsafe { _mm_storeu_si128(sums.as_mut_ptr().cast(), abcd) };
    sums
}

/// Loads 32 codes.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn load(bytes: &[u8; STEP]) -> __m256i {
    // SAFETY: the array has the 32 bytes that are read; the load needs no alignment.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

/// Loads 32 activations.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn load_i8(bytes: &[i8; STEP]) -> __m256i {
    // SAFETY: as in `load`.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

/// Loads 32 activations each time it is called: to the compiler, a volatile
/// read is never one that it has made before. It becomes an operand in memory.
#[target_feature(enable = "avx2")]
#[inline]
fn load_again(bytes: &[i8; STEP]) -> __m256i {
    /// A vector without its alignment.
    #[repr(C, packed)]
    struct Unaligned(__m256i);
    // SAFETY: the array has the 32 bytes that are read, any bytes are a vector
    // of integers, and the type has no alignment.
    unsafe { std::ptr::read_volatile(bytes.as_ptr().cast::<Unaligned>()).0 }
}
