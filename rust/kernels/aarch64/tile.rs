//! Many tokens, whatever the layout and the instructions: weights are unpacked
//! once, into bytes in L1, and every token meets them there.
//!
//! ```text
//! for tokens in blocks of 64                      activations stay in L2
//!   for row groups in fours
//!     for columns in chunks of 1280
//!       unpack the 16 rows                        20 KB
//!       for tokens in runs of 8                   activations stay in L1: 10 KB
//!         add the products of 16 rows x 8 tokens  a tile of one level
//!     rescale the sums
//! ```
//!
//! Two tokens and five hundred take the same path. Unpacked weights are trits,
//! not codes `t + 1`: the subtraction is paid once for all tokens, products are
//! half as large, which 16-bit sums need ([`CHUNK`]), and nothing is left to
//! correct at the end.

use std::ops::Range;

/// Rows that layouts interleave are those that a tile multiplies together.
pub(super) use super::super::generic::blocks::ROWS;
use super::super::{PackedMatrix, Prepared};

/// Columns that are unpacked together: a common multiple of the 256 columns of
/// an i2 block and the 320 of a t5 block. 30 KB of L1 hold all that a chunk
/// needs, of 32 on the smallest cores.
pub(super) const CHUNK: usize = 1280;

/// Columns of one register.
pub(super) const STEP: usize = 16;

/// Tokens that meet a chunk together.
pub(super) const RUN: usize = 8;

/// Row groups that are unpacked together. They share the trip of the
/// activations from L2 to L1.
const GROUPS: usize = 4;

/// Tokens whose activations share L2 with the trits: unpacking, about as much
/// work as one token, is a small part of 64.
const TOKEN_BLOCK: usize = 64;

/// Trits of the rows of a group, in the order of the columns.
pub(super) type Trits = [[i8; CHUNK]; ROWS];

/// Writes the trits of the columns `start..min(start + CHUNK, cols)` of a row
/// group. What stands after the last column may be anything: activations are
/// zero there. `start` is a multiple of [`CHUNK`].
pub(super) type Unpack = unsafe fn(group: &[u8], cols: usize, start: usize, out: &mut Trits);

/// `sums[g][t][i]` of row `i` of group `g` and token `t`.
pub(super) type Sums = [[[i32; ROWS]; RUN]; GROUPS];

/// Adds the products of at most [`RUN`] tokens and all the groups of `trits`,
/// over `steps` registers of columns from `start` on.
pub(super) type AddRun =
    unsafe fn(trits: &[Trits], xs: &[Prepared], start: usize, steps: usize, sums: &mut Sums);

/// Cuts `n` tokens into tiles of at most `most` and nearly equal size: five are
/// three and two, where tiles hold four.
#[inline(always)]
pub(super) fn tiles(n: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let mut start = 0;
    std::iter::from_fn(move || {
        let left = n - start;
        let first = start;
        start += left.div_ceil(left.div_ceil(most).max(1));
        (left > 0).then_some(first..start)
    })
}

/// Rows then begin on cache lines.
#[repr(align(64))]
struct Unpacked([Trits; GROUPS]);

/// Multiplies rows of any layout whose row groups hold [`ROWS`] rows, as
/// [`Kernel::gemm`](super::super::Kernel::gemm) does.
///
/// # Safety
/// The CPU has the instructions that `unpack` and `add_run` are compiled for.
pub(super) unsafe fn gemm(
    w: &PackedMatrix,
    rows: Range<usize>,
    xs: &[Prepared],
    ys: &mut [&mut [f32]],
    unpack: Unpack,
    add_run: AddRun,
) {
    let mut trits = Unpacked([[[0; CHUNK]; ROWS]; GROUPS]);
    for (xs, ys) in xs.chunks(TOKEN_BLOCK).zip(ys.chunks_mut(TOKEN_BLOCK)) {
        for first in rows.clone().step_by(GROUPS * ROWS) {
            let end = rows.end.min(first + GROUPS * ROWS);
            let trits = &mut trits.0[..(end - first).div_ceil(ROWS)];
            let mut sums: [Sums; TOKEN_BLOCK / RUN] =
                [[[[0; ROWS]; RUN]; GROUPS]; TOKEN_BLOCK / RUN];
            for start in (0..w.cols).step_by(CHUNK) {
                for (g, trits) in trits.iter_mut().enumerate() {
                    // SAFETY: by this function's contract.
                    unsafe { unpack(w.group(first + g * ROWS), w.cols, start, trits) };
                }
                let steps = CHUNK.min(w.cols - start).div_ceil(STEP);
                for (xs, sums) in xs.chunks(RUN).zip(&mut sums) {
                    // SAFETY: as above.
                    unsafe { add_run(trits, xs, start, steps, sums) };
                }
            }
            for (t, (x, y)) in xs.iter().zip(ys.iter_mut()).enumerate() {
                let y = &mut y[first - rows.start..end - rows.start];
                for (y, sums) in y.chunks_mut(ROWS).zip(&sums[t / RUN]) {
                    for (y, sum) in y.iter_mut().zip(sums[t % RUN]) {
                        *y = x.rescale(sum, w.scale);
                    }
                }
            }
        }
    }
}
