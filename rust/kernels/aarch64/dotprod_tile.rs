//! A tile of four rows and up to four tokens with `sdot`, which multiplies 16
//! trits by 16 activations and adds four products to each int32 lane: 16 of
//! them for 8 loads, in 16 chains.

use std::arch::aarch64::*;
use std::arch::asm;

use super::super::Prepared;
use super::neon_tile::{load_i8, reduce};
use super::tile::{ROWS, STEP, Sums, Trits, tiles};

/// Tokens of a tile: with four rows, 16 sums, and 8 registers to load into.
/// The cores known do two or four `sdot` a cycle and two or three loads.
const TOKENS: usize = 4;

/// Adds four products of int8 to each lane. The intrinsic, `vdotq_s32`, is
/// newer than the compilers that this crate supports.
#[target_feature(enable = "neon,dotprod")]
#[inline]
pub(super) fn sdot(mut acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction exists, since `dotprod` is this function's
    // feature; it reads and writes the three registers named and nothing else.
    unsafe {
        asm!(
            "sdot {acc:v}.4s, {a:v}.16b, {b:v}.16b",
            acc = inout(vreg) acc,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    acc
}

/// An [`AddRun`](super::tile::AddRun).
#[target_feature(enable = "neon,dotprod")]
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

#[target_feature(enable = "neon,dotprod")]
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
    let mut acc = [[vdupq_n_s32(0); T]; ROWS];
    for s in 0..steps {
        let mut qs = [vdupq_n_s8(0); T];
        for t in 0..T {
            qs[t] = load_i8(&q[t][s]);
        }
        for i in 0..ROWS {
            let row = load_i8(&w[i][s]);
            for t in 0..T {
                acc[i][t] = sdot(acc[i][t], row, qs[t]);
            }
        }
    }
    for t in 0..T {
        let found = reduce([acc[0][t], acc[1][t], acc[2][t], acc[3][t]]);
        for i in 0..ROWS {
            sums[t][i] += found[i];
        }
    }
}
