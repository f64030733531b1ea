//! Many tokens with AVX2, whatever the layout: weights are unpacked once, into
//! bytes in L1, and every token meets them there.
//!
//! ```text
//! for tokens in blocks of 64                      activations stay in L2
//!   for row groups in fours
//!     for columns in chunks of 1280
//!       unpack the 16 rows                        20 KB
//!       for tokens in runs of 12                  activations stay in L1: 15 KB
//!         for row group in the four
//!           for tokens in threes
//!             4 x 3 sums of 16-bit lanes over the chunk, then of 32 bits
//!     rescale the sums
//! ```
//!
//! `vpmaddubsw` multiplies 32 codes by 32 activations and adds pairs, and takes
//! one of two pipes; the addition of its result takes one of the others, so
//! that 64 multiplications a cycle are the limit of this arithmetic.
//!
//! The bound: codes are 0 to 2 and activations -128 to 127, so one
//! `vpmaddubsw` lies in [-512, 508], and the [`CHUNK`] / 32 = 40 of a chunk add
//! up to -20480 at most. (Even a code 3, which no packer writes, would keep to
//! -30720.) Nothing is widened inside the innermost loop.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::{PackedMatrix, Prepared};

/// Columns that are unpacked together: a common multiple of the 256 columns of
/// an i2 block and the 320 of a t5 block. Two would overflow int16.
pub(super) const CHUNK: usize = 1280;

/// Rows that layouts interleave, and that a tile multiplies together.
pub(super) const ROWS: usize = 4;

/// Codes `t + 1` of a row group, in the order of the columns.
pub(super) type Codes = [[u8; CHUNK]; ROWS];

/// Writes the codes of the columns `start..min(start + CHUNK, cols)` of a row
/// group. What stands after the last column may be any code: activations are
/// zero there. `start` is a multiple of [`CHUNK`].
///
/// To be called on a CPU that has AVX2.
pub(super) type UnpackCodes = unsafe fn(group: &[u8], cols: usize, start: usize, out: &mut Codes);

/// Row groups that are unpacked together. They share the trip of the
/// activations from L2 to L1.
const GROUPS: usize = 4;

/// Tokens whose activations of one chunk share L1 with one row group's codes.
const RUN: usize = 12;

/// Tokens whose activations share L2 with the codes. Unpacking is a thirtieth
/// of the work at 64.
const TOKEN_BLOCK: usize = 64;

/// Tokens of a tile.
const TOKENS: usize = 3;

/// Tokens of a tile whose activations are held in registers: 12 accumulators,
/// 2 of these, a code and a product are all 16. With a third held, the
/// compiler spills an accumulator, and adding to memory takes as long as all
/// the rest (100 instead of 136 GMAC/s on Zen 3; a 4 x 2 tile: 124).
const HELD: usize = 2;

/// Columns of one register.
const STEP: usize = 32;

/// Rows of [`CHUNK`] bytes then begin on cache lines.
#[repr(align(64))]
struct Unpacked([Codes; GROUPS]);

/// Multiplies rows of any layout whose row groups hold four rows, as
/// [`Kernel::gemm`](super::super::Kernel::gemm) does.
///
/// `unpack` must be sound to call with any row group of `w`.
#[target_feature(enable = "avx2")]
pub(super) fn gemm_codes(
    w: &PackedMatrix,
    rows: Range<usize>,
    xs: &[Prepared],
    ys: &mut [&mut [f32]],
    unpack: UnpackCodes,
) {
    let mut codes = Unpacked([[[0; CHUNK]; ROWS]; GROUPS]);
    for (xs, ys) in xs.chunks(TOKEN_BLOCK).zip(ys.chunks_mut(TOKEN_BLOCK)) {
        for first in rows.clone().step_by(GROUPS * ROWS) {
            let end = rows.end.min(first + GROUPS * ROWS);
            let groups = (end - first).div_ceil(ROWS);
            let mut sums = [[[0i32; ROWS]; TOKEN_BLOCK]; GROUPS];
            for start in (0..w.cols).step_by(CHUNK) {
                for (g, codes) in codes.0[..groups].iter_mut().enumerate() {
                    // SAFETY: this function's own feature is AVX2.
                    unsafe { unpack(w.group(first + g * ROWS), w.cols, start, codes) };
                }
                let steps = CHUNK.min(w.cols - start).div_ceil(STEP);
                for (r, xs) in xs.chunks(RUN).enumerate() {
                    for (codes, sums) in codes.0[..groups].iter().zip(&mut sums) {
                        add_run(codes, xs, start, steps, &mut sums[r * RUN..]);
                    }
                }
            }
            for (t, (x, y)) in xs.iter().zip(ys.iter_mut()).enumerate() {
                let y = &mut y[first - rows.start..end - rows.start];
                for (y, sums) in y.chunks_mut(ROWS).zip(&sums) {
                    for (y, sum) in y.iter_mut().zip(sums[t]) {
                        *y = x.rescale(sum - x.sum, w.scale);
                    }
                }
            }
        }
    }
}

/// Adds the products of one row group and a run of tokens over one chunk.
#[target_feature(enable = "avx2")]
fn add_run(codes: &Codes, xs: &[Prepared], start: usize, steps: usize, sums: &mut [[i32; ROWS]]) {
    for (xs, sums) in xs.chunks(TOKENS).zip(sums.chunks_mut(TOKENS)) {
        match xs {
            [a, b, c] => add_tile(codes, [a, b, c], start, steps, sums),
            [a, b] => add_tile(codes, [a, b], start, steps, sums),
            [a] => add_tile(codes, [a], start, steps, sums),
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
    steps: usize,
    sums: &mut [[i32; ROWS]],
) {
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
    for t in 0..T {
        add_sums(&mut sums[t], [acc[0][t], acc[1][t], acc[2][t], acc[3][t]]);
    }
}

/// Adds the sums of four registers of int16 lanes.
#[target_feature(enable = "avx2")]
#[inline]
fn add_sums(sums: &mut [i32; ROWS], acc: [__m256i; ROWS]) {
    let ones = _mm256_set1_epi16(1);
    let mut v = acc;
    for i in 0..ROWS {
        v[i] = _mm256_madd_epi16(v[i], ones);
    }
    // A transposition whose halves are added on the way.
    let ab = _mm256_add_epi32(_mm256_unpacklo_epi32(v[0], v[1]), _mm256_unpackhi_epi32(v[0], v[1]));
    let cd = _mm256_add_epi32(_mm256_unpacklo_epi32(v[2], v[3]), _mm256_unpackhi_epi32(v[2], v[3]));
    let abcd = _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
    let abcd = _mm_add_epi32(_mm256_castsi256_si128(abcd), _mm256_extracti128_si256::<1>(abcd));
    let at = sums.as_mut_ptr().cast();
    // SAFETY: the array has the 16 bytes that are read and written; neither
    // needs alignment.
    unsafe { _mm_storeu_si128(at, _mm_add_epi32(_mm_loadu_si128(at), abcd)) };
}

/// Loads 32 codes.
#[target_feature(enable = "avx2")]
#[inline]
fn load(bytes: &[u8; STEP]) -> __m256i {
    // SAFETY: the array has the 32 bytes that are read; the load needs no alignment.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

/// Loads 32 activations.
#[target_feature(enable = "avx2")]
#[inline]
fn load_i8(bytes: &[i8; STEP]) -> __m256i {
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
