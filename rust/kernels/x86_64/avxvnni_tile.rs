//! The GEMM tile of `vpdpbusd` on 256 bits: four rows and three tokens of
//! unpacked codes, within the blocking of `tiles.rs`.
//!
//! `vpdpbusd` multiplies 32 codes by 32 activations and adds fours into int32
//! lanes, so nothing is widened and nothing can overflow: a column adds at most
//! 2 * 128, and `MAX_COLS` of them stay below 2^26. Twelve sums hide its 4 or 5
//! cycles on two pipes; with three registers of activations and one of codes
//! they are the 16 that the VEX encoding can name.
//!
//! The instruction has two encodings, which are two CPU features. The code is
//! written once, over [`Dpbusd`], and compiled for both: everything between a
//! function that has the feature and the instruction is `#[inline(always)]`.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::{PackedMatrix, Prepared};
use super::avx2_tile::{add_lanes, load, load_i8};
use super::tiles::{self, Codes, ROWS, UnpackCodes};
use crate::cpu::{AvxVnni, Evex, Vex};

/// `vpdpbusd` in one of its encodings, by the proof that the CPU has it. The
/// features of both contain AVX2.
pub(super) trait Dpbusd: Copy {
    /// Adds to each int32 lane the products of its four unsigned bytes of
    /// `codes` and its four signed bytes of `q`. A call unless it is inlined
    /// into a function that has the feature.
    fn dpbusd(self, sums: __m256i, codes: __m256i, q: __m256i) -> __m256i;
}

impl Dpbusd for Vex {
    #[inline(always)]
    fn dpbusd(self, sums: __m256i, codes: __m256i, q: __m256i) -> __m256i {
        // SAFETY: `self` proves that the CPU has AVX-VNNI.
        unsafe { _mm256_dpbusd_avx_epi32(sums, codes, q) }
    }
}

impl Dpbusd for Evex {
    #[inline(always)]
    fn dpbusd(self, sums: __m256i, codes: __m256i, q: __m256i) -> __m256i {
        // SAFETY: `self` proves that the CPU has AVX-512 VNNI and VL.
        unsafe { _mm256_dpbusd_epi32(sums, codes, q) }
    }
}

/// Tokens of a tile.
const TOKENS: usize = 3;

/// Columns of one register.
const STEP: usize = 32;

/// Multiplies rows of any layout whose row groups hold four rows, as
/// [`Kernel::gemm`](super::super::Kernel::gemm) does.
///
/// # Safety
/// The CPU has the instructions that `unpack` is compiled for.
pub(super) unsafe fn gemm_codes(
    proof: AvxVnni,
    w: &PackedMatrix,
    rows: Range<usize>,
    xs: &[Prepared],
    ys: &mut [&mut [f32]],
    unpack: UnpackCodes,
) {
    // SAFETY: `unpack` by the caller's word; `proof` has what `add_run` needs.
    unsafe {
        match proof {
            AvxVnni::Vex(proof) => tiles::gemm(proof, w, rows, xs, ys, unpack, add_run_vex),
            AvxVnni::Evex(proof) => tiles::gemm(proof, w, rows, xs, ys, unpack, add_run_evex),
        }
    }
}

/// [`add_run`] with AVX-VNNI.
#[target_feature(enable = "avx2,avxvnni")]
fn add_run_vex(
    proof: Vex,
    codes: &Codes,
    xs: &[Prepared],
    start: usize,
    cols: usize,
    sums: &mut [[i32; ROWS]],
) {
    add_run(proof, codes, xs, start, cols, sums);
}

/// [`add_run`] with AVX-512 VNNI and VL.
#[target_feature(enable = "avx2,avx512vl,avx512vnni")]
fn add_run_evex(
    proof: Evex,
    codes: &Codes,
    xs: &[Prepared],
    start: usize,
    cols: usize,
    sums: &mut [[i32; ROWS]],
) {
    add_run(proof, codes, xs, start, cols, sums);
}

/// The [`tiles::AddRun`] of this tile.
#[inline(always)]
pub(super) fn add_run<D: Dpbusd>(
    proof: D,
    codes: &Codes,
    xs: &[Prepared],
    start: usize,
    cols: usize,
    sums: &mut [[i32; ROWS]],
) {
    for (xs, sums) in xs.chunks(TOKENS).zip(sums.chunks_mut(TOKENS)) {
        match xs {
            [a, b, c] => add_tile(proof, codes, [a, b, c], start, cols, sums),
            [a, b] => add_tile(proof, codes, [a, b], start, cols, sums),
            [a] => add_tile(proof, codes, [a], start, cols, sums),
            _ => unreachable!("chunks of {TOKENS}"),
        }
    }
}

/// Adds the products of a tile of four rows and `T` tokens over one chunk.
#[inline(always)]
fn add_tile<D: Dpbusd, const T: usize>(
    proof: D,
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
    // SAFETY: `proof` has AVX2, which is all that these calls need.
    unsafe {
        let mut acc = [[_mm256_setzero_si256(); T]; ROWS];
        for s in 0..steps {
            let mut qs = [_mm256_setzero_si256(); T];
            for t in 0..T {
                qs[t] = load_i8(&q[t][s]);
            }
            for i in 0..ROWS {
                let code = load(&c[i][s]);
                for t in 0..T {
                    acc[i][t] = proof.dpbusd(acc[i][t], code, qs[t]);
                }
            }
        }
        for t in 0..T {
            let found = add_lanes([acc[0][t], acc[1][t], acc[2][t], acc[3][t]]);
            for i in 0..ROWS {
                sums[t][i] += found[i];
            }
        }
    }
}
