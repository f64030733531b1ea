//! A tile of up to 16 rows and four tokens with `smmla`, which multiplies two
//! rows of eight trits by two tokens of eight activations: four sums of eight
//! products, twice the work of `sdot`.
//!
//! ```text
//! trits: [row 0, columns 0-7 | row 1, columns 0-7]     paired when unpacked
//! q:     [token 0, columns 0-7 | token 1, columns 0-7] paired here, by trn1 and trn2
//! sums:  [r0 t0, r0 t1, r1 t0, r1 t1]
//! ```
//!
//! For 16 columns of a full tile: 32 `smmla` in 16 chains, 4 `trn`, 20 loads.
//! Tiles of 8 rows and 8 tokens load a fifth less, but pair twice as many
//! activations, on the pipes that `smmla` needs; the cores known have loads to
//! spare.

use std::arch::aarch64::*;
use std::arch::asm;

use super::super::Prepared;
use super::neon_tile::{load_i8, store_i8};
use super::tile::{ROWS, STEP, Sums, Trits};

/// Tokens of a tile, in two pairs: with 16 rows 16 sums, 4 registers of paired
/// activations, and what is left of 32 for trits on their way.
const TOKENS: usize = 4;

/// Adds two rows (halves of `a`) times two tokens (halves of `b`). The
/// intrinsic, `vmmlaq_s32`, is unstable.
#[target_feature(enable = "neon,i8mm")]
#[inline]
fn smmla(mut acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction exists, since `i8mm` is this function's feature;
    // it reads and writes the three registers named and nothing else.
    unsafe {
        asm!(
            "smmla {acc:v}.4s, {a:v}.16b, {b:v}.16b",
            acc = inout(vreg) acc,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    acc
}

/// The low halves of two registers, and the high halves.
#[target_feature(enable = "neon")]
#[inline]
fn pair(a: int8x16_t, b: int8x16_t) -> [int8x16_t; 2] {
    let (a, b) = (vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b));
    [vreinterpretq_s8_s64(vtrn1q_s64(a, b)), vreinterpretq_s8_s64(vtrn2q_s64(a, b))]
}

/// Turns unpacked rows into the form that [`add_run`] reads, in place: 16
/// columns of rows 0 and 1 become the low eight of both, where row 0 was, and
/// the high eight of both; rows 2 and 3 likewise.
#[target_feature(enable = "neon")]
pub(super) fn pair_rows(trits: &mut Trits) {
    let [a, b, c, d] = trits;
    for (even, odd) in [(a, b), (c, d)] {
        for (even, odd) in even.as_chunks_mut().0.iter_mut().zip(odd.as_chunks_mut().0) {
            let [low, high] = pair(load_i8(even), load_i8(odd));
            store_i8(even, low);
            store_i8(odd, high);
        }
    }
}

/// An [`AddRun`](super::tile::AddRun) of rows that [`pair_rows`] has paired.
#[target_feature(enable = "neon,i8mm")]
pub(super) fn add_run(
    trits: &[Trits],
    xs: &[Prepared],
    start: usize,
    steps: usize,
    sums: &mut Sums,
) {
    for (n, xs) in xs.chunks(TOKENS).enumerate() {
        match xs {
            [a, b, c, d] => add_tokens(trits, [[a, b], [c, d]], start, steps, n * TOKENS, sums),
            // The last of an odd number is its own neighbour; nobody reads that sum.
            [a, b, c] => add_tokens(trits, [[a, b], [c, c]], start, steps, n * TOKENS, sums),
            [a, b] => add_tokens(trits, [[a, b]], start, steps, n * TOKENS, sums),
            [a] => add_tokens(trits, [[a, a]], start, steps, n * TOKENS, sums),
            _ => {}
        }
    }
}

/// Adds the products of all groups and `P` pairs of tokens, which are number
/// `t` and following.
#[target_feature(enable = "neon,i8mm")]
#[inline]
fn add_tokens<const P: usize>(
    trits: &[Trits],
    xs: [[&Prepared; 2]; P],
    start: usize,
    steps: usize,
    t: usize,
    sums: &mut Sums,
) {
    match trits {
        [a, b, c, d] => add_tile([a, b, c, d], xs, start, steps, t, sums),
        [a, b, c] => add_tile([a, b, c], xs, start, steps, t, sums),
        [a, b] => add_tile([a, b], xs, start, steps, t, sums),
        [a] => add_tile([a], xs, start, steps, t, sums),
        _ => {}
    }
}

#[target_feature(enable = "neon,i8mm")]
#[inline]
fn add_tile<const G: usize, const P: usize>(
    trits: [&Trits; G],
    xs: [[&Prepared; 2]; P],
    start: usize,
    steps: usize,
    t: usize,
    sums: &mut Sums,
) {
    let mut q: [[&[[i8; STEP]]; 2]; P] = [[&[]; 2]; P];
    for p in 0..P {
        for half in 0..2 {
            q[p][half] = &xs[p][half].padded()[start..].as_chunks().0[..steps];
        }
    }
    let mut w: [[&[[i8; STEP]]; ROWS]; G] = [[&[]; ROWS]; G];
    for g in 0..G {
        for i in 0..ROWS {
            w[g][i] = &trits[g][i].as_chunks().0[..steps];
        }
    }
    let mut acc = [[[vdupq_n_s32(0); P]; ROWS / 2]; G];
    for s in 0..steps {
        let mut qs = [[vdupq_n_s8(0); 2]; P];
        for p in 0..P {
            qs[p] = pair(load_i8(&q[p][0][s]), load_i8(&q[p][1][s]));
        }
        for half in 0..2 {
            for g in 0..G {
                for i in 0..ROWS / 2 {
                    let rows = load_i8(&w[g][2 * i + half][s]);
                    for p in 0..P {
                        acc[g][i][p] = smmla(acc[g][i][p], rows, qs[p][half]);
                    }
                }
            }
        }
    }
    for g in 0..G {
        for i in 0..ROWS / 2 {
            for p in 0..P {
                let found = acc[g][i][p];
                let t = t + 2 * p;
                sums[g][t][2 * i] += vgetq_lane_s32::<0>(found);
                sums[g][t + 1][2 * i] += vgetq_lane_s32::<1>(found);
                sums[g][t][2 * i + 1] += vgetq_lane_s32::<2>(found);
                sums[g][t + 1][2 * i + 1] += vgetq_lane_s32::<3>(found);
            }
        }
    }
}
