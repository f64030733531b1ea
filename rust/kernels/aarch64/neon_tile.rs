//! A tile of four rows and up to four tokens with NEON alone, and the loads
//! that all aarch64 kernels share.
//!
//! `smlal` and `smlal2` multiply the low and the high eight of 16 trits by
//! activations and add to eight int16 lanes. A register of trits meets four of
//! activations: 32 instructions for 8 loads, in 16 chains.
//!
//! The bound: a product lies in [-127, 128], and a lane takes two of each of
//! the [`CHUNK`] / 16 = 80 registers: at most 20480. Nothing is widened inside
//! the innermost loop.

use std::arch::aarch64::*;

use super::super::Prepared;
use super::tile::{ROWS, STEP, Sums, Trits, tiles};

/// Tokens of a tile: with four rows, 16 sums, 4 registers of trits and up to 4
/// of activations of the 32.
const TOKENS: usize = 4;

/// Loads 16 unsigned bytes.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn load(bytes: &[u8; STEP]) -> uint8x16_t {
    // SAFETY: the array has the 16 bytes that are read; no alignment is needed.
    unsafe { vld1q_u8(bytes.as_ptr()) }
}

/// Loads 16 signed bytes.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn load_i8(bytes: &[i8; STEP]) -> int8x16_t {
    // SAFETY: as in `load`.
    unsafe { vld1q_s8(bytes.as_ptr()) }
}

/// Stores 16 signed bytes.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn store_i8(bytes: &mut [i8; STEP], v: int8x16_t) {
    // SAFETY: the array has the 16 bytes that are written; no alignment is needed.
    unsafe { vst1q_s8(bytes.as_mut_ptr(), v) }
}

/// Adds 16 products to eight int16 lanes, two to each.
#[target_feature(enable = "neon")]
#[inline]
fn add_products(acc: int16x8_t, a: int8x16_t, b: int8x16_t) -> int16x8_t {
    vmlal_high_s8(vmlal_s8(acc, vget_low_s8(a), vget_low_s8(b)), a, b)
}

/// Adds 16 products to 16 int16 lanes.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn add_halves(acc: [int16x8_t; 2], a: int8x16_t, b: int8x16_t) -> [int16x8_t; 2] {
    [vmlal_s8(acc[0], vget_low_s8(a), vget_low_s8(b)), vmlal_high_s8(acc[1], a, b)]
}

/// Moves int16 sums to int32 sums.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn widen(acc: &mut [int32x4_t; ROWS], acc16: &mut [[int16x8_t; 2]; ROWS]) {
    for i in 0..ROWS {
        let [low, high] = acc16[i];
        acc[i] = vpadalq_s16(vpadalq_s16(acc[i], low), high);
        acc16[i] = [vdupq_n_s16(0); 2];
    }
}

/// The sums of four registers of int32 lanes.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn reduce(v: [int32x4_t; ROWS]) -> [i32; ROWS] {
    let sum = vpaddq_s32(vpaddq_s32(v[0], v[1]), vpaddq_s32(v[2], v[3]));
    let mut out = [0; ROWS];
    // SAFETY: the array has the 16 bytes that are written; no alignment is needed.
    unsafe { vst1q_s32(out.as_mut_ptr(), sum) };
    out
}

/// An [`AddRun`](super::tile::AddRun).
#[target_feature(enable = "neon")]
pub(super) fn add_run(
    trits: &[Trits],
    xs: &[Prepared],
    start: usize,
    steps: usize,
    sums: &mut Sums,
) {
    for (trits, sums) in trits.iter().zip(sums) {
        for tile in tiles(xs.len(), TOKENS) {
            let (xs, sums) = (&xs[tile.clone()], &mut sums[tile]);
            match xs {
                [a, b, c, d] => add_tile(trits, [a, b, c, d], start, steps, sums),
                [a, b, c] => add_tile(trits, [a, b, c], start, steps, sums),
                [a, b] => add_tile(trits, [a, b], start, steps, sums),
                [a] => add_tile(trits, [a], start, steps, sums),
                _ => {}
            }
        }
    }
}

#[target_feature(enable = "neon")]
#[inline]
fn add_tile<const T: usize>(
    trits: &Trits,
    xs: [&Prepared; T],
    start: usize,
    steps: usize,
    sums: &mut [[i32; ROWS]],
) {
    let mut q: [&[[i8; STEP]]; T] = [&[]; T];
    for t in 0..T {
        q[t] = &xs[t].padded()[start..].as_chunks().0[..steps];
    }
    let mut w: [&[[i8; STEP]]; ROWS] = [&[]; ROWS];
    for i in 0..ROWS {
        w[i] = &trits[i].as_chunks().0[..steps];
    }
    let mut acc = [[vdupq_n_s16(0); T]; ROWS];
    for s in 0..steps {
        let mut qs = [vdupq_n_s8(0); T];
        for t in 0..T {
            qs[t] = load_i8(&q[t][s]);
        }
        for i in 0..ROWS {
            let row = load_i8(&w[i][s]);
            for t in 0..T {
                acc[i][t] = add_products(acc[i][t], row, qs[t]);
            }
        }
    }
    for t in 0..T {
        let mut wide = [vdupq_n_s32(0); ROWS];
        for i in 0..ROWS {
            wide[i] = vpaddlq_s16(acc[i][t]);
        }
        let found = reduce(wide);
        for i in 0..ROWS {
            sums[t][i] += found[i];
        }
    }
}
