//! GEMM over unpacked codes: the blocking that the tiles of all instruction
//! sets share (`avx2_tile.rs`, `avxvnni_tile.rs`, `avx512_tile.rs`). Weights
//! are unpacked once for all tokens, 2 or 512, whatever their layout.
//!
//! ```text
//! for tokens in blocks of 64                      activations stay in L2
//!   for row groups in fours
//!     for columns in chunks of 1280
//!       unpack the 16 rows                        20 KB, in L2
//!       for tokens in runs of 12                  activations stay in L1: 15 KB
//!         for row group in the four               its codes, too: 5 KB
//!           tiles of four rows and some tokens
//!     rescale the sums
//! ```

use std::ops::Range;

/// Rows that layouts interleave are those that a tile multiplies together.
pub(super) use super::super::generic::blocks::ROWS;
use super::super::{PackedMatrix, Prepared};
use super::prefetch_at;

/// Columns that are unpacked together: a common multiple of the 256 columns of
/// an i2 block and the 320 of a t5 block. Two of them would overflow the int16
/// sums of `avx2_tile.rs`.
pub(super) const CHUNK: usize = 1280;

/// Codes `t + 1` of a row group, in the order of the columns.
pub(super) type Codes = [[u8; CHUNK]; ROWS];

/// Writes the codes of the columns `start..min(start + CHUNK, cols)` of a row
/// group of a matrix with `cols` columns; `start` is a multiple of [`CHUNK`].
/// What stands after the last column may be any code: activations are zero
/// there.
///
/// # Safety
/// To be called on a CPU that has the instructions it is compiled for.
pub(super) type UnpackCodes = unsafe fn(group: &[u8], cols: usize, start: usize, out: &mut Codes);

/// Adds to `sums[t]` the products of the codes of one row group and `xs[t]`
/// over `cols` columns, which begin at column `start` of the activations. It
/// may run on to the end of the last register: activations are zero there.
///
/// # Safety
/// To be called on a CPU that has the instructions it is compiled for.
pub(super) type AddRun<P> = unsafe fn(
    proof: P,
    codes: &Codes,
    xs: &[Prepared],
    start: usize,
    cols: usize,
    sums: &mut [[i32; ROWS]],
);

/// Row groups that are unpacked together. They share the trip of the
/// activations from L2 to L1.
const GROUPS: usize = 4;

/// Tokens whose activations of one chunk share L1 with one row group's codes:
/// a multiple of the tokens of every tile (3 and 6).
const RUN: usize = 12;

/// Tokens whose activations share L2: 64 of 2560 to 6912 columns are 164 to
/// 442 KB. Unpacking i2 is a thirtieth of the work at 64.
const TOKEN_BLOCK: usize = 64;

/// Codes begin on cache lines, and rows of [`CHUNK`] bytes keep to that.
#[repr(align(64))]
struct Unpacked([Codes; GROUPS]);

/// Multiplies as [`Kernel::gemm`](super::super::Kernel::gemm) does. `proof` is
/// for `add_run`, if it needs to know more than that it may be called.
///
/// # Safety
/// The CPU has the instructions that `unpack` and `add_run` are compiled for.
pub(super) unsafe fn gemm<P: Copy>(
    proof: P,
    w: &PackedMatrix,
    rows: Range<usize>,
    xs: &[Prepared],
    ys: &mut [&mut [f32]],
    unpack: UnpackCodes,
    add_run: AddRun<P>,
) {
    let mut codes = Unpacked([[[0; CHUNK]; ROWS]; GROUPS]);
    for (xs, ys) in xs.chunks(TOKEN_BLOCK).zip(ys.chunks_mut(TOKEN_BLOCK)) {
        for first in rows.clone().step_by(GROUPS * ROWS) {
            let end = rows.end.min(first + GROUPS * ROWS);
            let groups = (end - first).div_ceil(ROWS);
            let mut sums = [[[0; ROWS]; TOKEN_BLOCK]; GROUPS];
            for start in (0..w.cols).step_by(CHUNK) {
                for (g, codes) in codes.0[..groups].iter_mut().enumerate() {
                    // The same columns of the next groups: weights that are in no cache come
                    // in pieces, which hardware prefetchers do not follow.
                    let group = w.group(first + g * ROWS);
                    let at = start * group.len() / w.cols;
                    let piece = &group[at..group.len().min(at + CHUNK * group.len() / w.cols)];
                    prefetch_at(piece, GROUPS * group.len());
                    // SAFETY: the caller says that the CPU has what it needs.
                    unsafe { unpack(group, w.cols, start, codes) };
                }
                let cols = CHUNK.min(w.cols - start);
                for (r, xs) in xs.chunks(RUN).enumerate() {
                    for (codes, sums) in codes.0[..groups].iter().zip(&mut sums) {
                        let sums = &mut sums[r * RUN..][..xs.len()];
                        // SAFETY: as above.
                        unsafe { add_run(proof, codes, xs, start, cols, sums) };
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
