//! The GEMM tile of AVX-512 VNNI: four rows and six tokens of unpacked codes,
//! within the blocking of `tiles.rs`.
//!
//! 24 of the 32 registers are int32 sums, 4 hold a register of codes of each
//! row and one the activations that meet them: 10 loads for 24 `vpdpbusd`. Two
//! tiles make a run, so that activations come from L1, and sums of four rows
//! are added together by a transposition, 9 instructions for a token, once a
//! chunk.
//!
//! Not timed: written on a machine without AVX-512. By count, a tile of a
//! whole chunk takes 480 `vpdpbusd` of 64 products, on the one or two pipes
//! that have it, besides 200 loads and 84 other instructions; unpacking adds
//! 240 for all tokens. Before, four rows and four tokens of i2 took 320
//! `vpdpbusd`, 100 loads, 140 shifts and masks, and for K = 2560 another 80 of
//! 160 to add the lanes of one sum after the other; it reached 52 % of the
//! `vpdpbusd` peak (Zen 4), and its activations came from L2.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::{PackedMatrix, Prepared};
use super::tiles::{self, ROWS};
pub(super) use super::tiles::{CHUNK, Codes, UnpackCodes};

/// Tokens of a tile.
const TOKENS: usize = 6;

/// Columns of one register.
const STEP: usize = 64;

/// Multiplies rows of any layout whose row groups hold four rows, as
/// [`Kernel::gemm`](super::super::Kernel::gemm) does.
///
/// # Safety
/// The CPU has the instructions that `unpack` is compiled for.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
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
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
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
            [a, b, c, d, e, f] => add_tile(codes, [a, b, c, d, e, f], start, cols, sums),
            [a, b, c, d, e] => add_tile(codes, [a, b, c, d, e], start, cols, sums),
            [a, b, c, d] => add_tile(codes, [a, b, c, d], start, cols, sums),
            [a, b, c] => add_tile(codes, [a, b, c], start, cols, sums),
            [a, b] => add_tile(codes, [a, b], start, cols, sums),
            [a] => add_tile(codes, [a], start, cols, sums),
            _ => unreachable!("chunks of {TOKENS}"),
        }
    }
}

/// Adds the products of a tile of four rows and `T` tokens over one chunk.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
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
    let mut acc = [[_mm512_setzero_si512(); T]; ROWS];
    for s in 0..steps {
        let mut code = [_mm512_setzero_si512(); ROWS];
        for i in 0..ROWS {
            code[i] = load(&c[i][s]);
        }
        for t in 0..T {
            let q = load_i8(&q[t][s]);
            for i in 0..ROWS {
                acc[i][t] = _mm512_dpbusd_epi32(acc[i][t], code[i], q);
            }
        }
    }
    for t in 0..T {
        add_sums(&mut sums[t], [acc[0][t], acc[1][t], acc[2][t], acc[3][t]]);
    }
}

/// Adds the sums of the lanes of four registers.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn add_sums(sums: &mut [i32; ROWS], v: [__m512i; ROWS]) {
    // A transposition whose parts are added on the way.
    let ab = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
    let cd = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
    let abcd = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    let abcd = _mm256_add_epi32(_mm512_castsi512_si256(abcd), _mm512_extracti64x4_epi64::<1>(abcd));
    let abcd = _mm_add_epi32(_mm256_castsi256_si128(abcd), _mm256_extracti128_si256::<1>(abcd));
    let at = sums.as_mut_ptr().cast();
    // SAFETY: the array has the 16 bytes that are read and written; neither
    // needs alignment.
    unsafe { _mm_storeu_si128(at, _mm_add_epi32(_mm_loadu_si128(at), abcd)) };
}

/// Loads 64 codes.
#[target_feature(enable = "avx512f")]
#[inline]
fn load(bytes: &[u8; STEP]) -> __m512i {
    // SAFETY: the array has the 64 bytes that are read; the load needs no alignment.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

/// Loads 64 activations.
#[target_feature(enable = "avx512f")]
#[inline]
fn load_i8(bytes: &[i8; STEP]) -> __m512i {
    // SAFETY: as in `load`.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}
